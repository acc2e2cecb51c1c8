"""What a person gives `solotune.train` to learn from and cannot be used as it is: one clear error before any step."""

import dataclasses

import pytest
from transformers import GPT2Config, PreTrainedTokenizerFast, T5Config

import solotune
from solotune.config import ILQLConfig
from solotune.errors import ConfigError, DataError, ModelError, NotYetError, RewardError
from tests.tiny import byte_tokenizer, tiny_offline_config, tiny_ppo_config

SAMPLES = [["a film", " so good"], "a text", ["is it", " no"], "b"]


class Table(dict):
    """As a data frame: iterating over it gives its columns' names."""

    columns = ("text", "label")


@pytest.fixture
def train(tiny_folder, tmp_path):
    """SFT, or another method, in two steps of four samples."""

    def run(kind="sft", samples=SAMPLES, model=None, tokenizer=None, sections=None, **arguments):
        config = tiny_offline_config(tiny_folder, kind, train={"total_steps": 2, "checkpoint_dir": str(tmp_path)})
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / "tokenizer")
            config.tokenizer.tokenizer_path = str(tmp_path / "tokenizer")
        if isinstance(model, T5Config):
            config.model.model_arch_type = "seq2seq"
        if model is not None:
            config.model.delta_kwargs = None
        return solotune.train(model, samples=samples, config=config.evolve(**(sections or {})), **arguments)

    return run


def without_ends() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize("samples", ["hello", {"text": ["a", "b"]}, Table(text=["a"], label=[1]), 3, b"bytes"])
def test_what_is_no_list_of_samples_is_not_learned_as_one(train, samples):
    with pytest.raises(DataError, match="has to be a list of texts or dialogues"):
        train(samples=samples)


def test_the_older_spelling_has_two_parts(train):
    with pytest.raises(ConfigError, match=r"dataset= of list: it has to be \(samples, rewards\)"):
        train(samples=None, dataset=["a", "b", "c"])


@pytest.mark.parametrize("rewards", [1.0, "1111"])
def test_rewards_are_a_list(train, rewards):
    with pytest.raises(DataError, match="has to be a list of numbers"):
        train("ilql", rewards=rewards)


@pytest.mark.parametrize("reward", [10**400, 10**5000, 1e101], ids=["400", "5000", "float"])
def test_a_reward_whose_variance_would_overflow_is_refused(train, reward):
    with pytest.raises(DataError, match="the reward of sample 1 is"):
        train("ilql", rewards=[0.0, reward, 0.0, 1.0])


def test_half_a_character_is_named(train):
    with pytest.raises(DataError, match=r"sample 1 holds half a character \('\\ud800x'\)"):
        train(samples=["a", "\ud800x"])


def test_a_text_that_looks_like_a_secret_is_a_text(train):
    assert train(samples=["see https://u:pw@host.org", ["hf_" + "a" * 34, "b"]]).steps_done == 2


def test_prompts_beside_samples_are_said_to_be_of_no_use(train, caplog):
    train(prompts=["a"])
    assert "prompts= is not used: SFTConfig learns from samples=" in caplog.text


GPT2 = GPT2Config(vocab_size=259, n_layer=3, n_embd=16, n_head=2, n_positions=16, eos_token_id=50256)


def test_sequences_have_to_fit_the_table_of_positions(train, tiny_folder, tmp_path):
    fits = {"method": {"gen_kwargs": {"max_new_tokens": 4}}, "model": {"num_layers_unfrozen": 1}}
    assert train(samples=["x" * 15] * 4, model=GPT2, sections=fits, eval_prompts=["a"]).steps_done == 2
    with pytest.raises(
        ModelError, match=r"has 16 positions, but sequences have up to 20 tokens; lower train.seq_length"
    ):
        train(samples=["x" * 19] * 4, model=GPT2, sections=fits, eval_prompts=["a"])
    with pytest.raises(ModelError, match="has 16 positions, but sequences have up to 17 tokens"):
        train(model=GPT2, sections=fits, eval_prompts=["x" * 13])
    config = tiny_ppo_config(tiny_folder, model={"delta_kwargs": None}, train={"checkpoint_dir": str(tmp_path)})
    with pytest.raises(ModelError, match="has 16 positions, but sequences have up to 26 tokens"):
        solotune.train(GPT2, reward_fn=lambda outputs: [0.0] * len(outputs), prompts=["x" * 20], config=config)


def test_an_end_that_the_vocabulary_has_not_is_none(train):
    """GPT2Config's own EOS is GPT-2's, whatever its vocabulary."""
    gen = {"max_new_tokens": 4, "min_new_tokens": 2}
    sections = {"method": {"gen_kwargs": gen}, "model": {"num_layers_unfrozen": 1}}
    assert train(model=GPT2, sections=sections, eval_prompts=["a"]).steps_done == 2


def test_a_tokenizer_without_a_start_needs_evaluation_prompts(train):
    with pytest.raises(ConfigError, match="neither a BOS nor an EOS to start from: give prompts= and eval_prompts="):
        train(tokenizer=without_ends())
    assert train(tokenizer=without_ends(), eval_prompts=["a"]).steps_done == 2


@pytest.mark.parametrize("pair", [["", "b"], ["a", ""]])
def test_an_encoder_decoder_needs_two_texts(train, pair):
    lm = T5Config(vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(DataError, match="two texts that are not empty"):
        train(samples=[["a", "b"], pair], model=lm)


@pytest.mark.parametrize(
    ("kind", "trainer"), [("sft", "AccelerateILQLTrainer"), ("ilql", "accelerateRFTtrainer"), ("sft", "ILQLTrainer")]
)
def test_another_methods_trainer_is_refused(train, kind, trainer):
    with pytest.raises(ConfigError, match=r"does not fit method\.name"):
        train(kind, rewards=[0.0, 1.0, 2.0, 3.0] if kind == "ilql" else None, sections={"train": {"trainer": trainer}})


@pytest.mark.parametrize(("returned", "said"), [(None, "a NoneType"), ([1.0], "a list"), ({"a": "x"}, "no numbers")])
def test_metrics_are_named_numbers(train, returned, said):
    with pytest.raises(RewardError, match=f"metric_fn returned {said}"):
        train(metric_fn=lambda **_: returned)


def test_what_trlx_called_and_nobody_calls_here_is_refused():
    from solotune.compat.trlx.trainer.accelerate_ilql_trainer import AccelerateILQLTrainer

    @dataclasses.dataclass
    class Own(ILQLConfig):
        def loss(self, outputs, labels):
            raise AssertionError

    with pytest.raises(ConfigError, match=r"Own.loss would never be called here"):
        Own().check()
    with pytest.raises(NotYetError, match=r"make_experience would never be called here; override __init__"):
        type("Mine", (AccelerateILQLTrainer,), {"make_experience": None})
    with pytest.raises(NotYetError, match=r"loss would never be called here; override losses"):
        type("Mine", (AccelerateILQLTrainer,), {"loss": None})
