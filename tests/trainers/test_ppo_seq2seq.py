"""PPO of an encoder-decoder, from prompts to what a run leaves behind."""

import json

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM

import solotune
from solotune.compat.trlx.data.configs import TRLConfig as TrlxConfig
from solotune.config import Recipe
from solotune.data.prompts import Prompts, cut, encode
from solotune.models.export import merge_adapter
from solotune.models.seq2seq import Seq2SeqPolicy
from solotune.runs.folder import read_lines
from solotune.runs.start import run_recipe
from solotune.trainers.ppo import PPOTrainer
from tests.tiny import EOS
from tests.tiny_seq2seq import ending_tokenizer, save_tiny_seq2seq, tiny_seq2seq, tiny_seq2seq_config

PROMPTS = Prompts(["a film", "another film, a long one", "so", "a film"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_seq2seq(tmp_path_factory.mktemp("models") / "tiny-t5", "t5 1.1")


def vowels(outputs, **_):
    return [sum(character in "aeiou" for character in output) / 6 for output in outputs]


def trainer_of(folder, reward_fn=vowels, prompts=PROMPTS, config=None, **sections) -> PPOTrainer:
    config = config or tiny_seq2seq_config(folder, **sections)
    return PPOTrainer(config, reward_fn, prompts, prompts, accelerator=Accelerator(cpu=True))


def test_it_learns_to_answer_each_prompt_in_its_own_way(folder):
    """Bytes below 128 are wanted after one prompt and above after the other: only the encoder tells them apart."""
    config = tiny_seq2seq_config(
        folder,
        train={"batch_size": 16, "epochs": 100},
        optimizer={"kwargs": {"lr": 1e-2}},
        method={"num_rollouts": 64, "chunk_size": 64, "init_kl_coef": 0.0},
    )
    config.model.model_path = tiny_seq2seq("t5")

    def fitting(prompts, outputs, **_):
        shares = [sum(character.isascii() for character in output) / max(len(output), 1) for output in outputs]
        return [share if prompt == "low" else 1 - share for prompt, share in zip(prompts, shares, strict=True)]

    trainer = trainer_of(folder, fitting, Prompts(["low", "HIGH UP"]), config)
    scores = [trainer.train_round()["objective/score"] for _ in range(8)]
    assert sum(scores[-2:]) / 2 > 0.8, scores


def test_the_encoder_reads_a_whole_text_and_samples_are_prompt_and_output(folder):
    trainer = trainer_of(folder)
    assert isinstance(trainer.model, Seq2SeqPolicy)
    rollouts = trainer.sample_rollouts()
    texts = trainer.sampled.texts(rollouts)
    tokenizer = ending_tokenizer()
    for row, prompt in enumerate(texts.prompts):
        assert rollouts.prompt_tokens(row) == tokenizer(prompt)["input_ids"], "a text that is whole ends with EOS"
        assert rollouts.prompt_tokens(row)[-1] == EOS
        output = tokenizer.decode(rollouts.response_tokens(row), skip_special_tokens=True)
        assert (texts.outputs[row], texts.samples[row]) == (output, f"{prompt} {output}")
    as_trlx = TrlxConfig.from_dict(tiny_seq2seq_config(folder).to_dict())
    trainer = trainer_of(folder, config=as_trlx)
    texts = trainer.sampled.texts(trainer.sample_rollouts())
    assert texts.samples == [f"{p}<sep>{o}" for p, o in zip(texts.prompts, texts.outputs, strict=True)]


def test_minus_one_for_eos_never_stops_and_the_end_of_a_response_is_the_models(folder):
    for eos, finished in ((-1, 0.0), (list(range(259)), 1.0)):
        gen = {"max_new_tokens": 6, "eos_token_id": eos}
        metrics = trainer_of(folder, method={"gen_kwargs": gen}).train_round()
        assert metrics["rollout/finished"] == finished
        assert metrics["rollout/response_tokens"] == (6 if eos == -1 else 1)
        assert metrics["rollout/logprob_gap"] < 1e-5
        assert metrics["policy/ratio"] == pytest.approx(1.0, abs=0.2)


def test_prompts_that_do_not_go_on_keep_the_end_that_the_tokenizer_gives_them():
    tokenizer = ending_tokenizer()
    plain = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert encode(["ab"], tokenizer, 9) == [plain]
    assert encode(["ab"], tokenizer, 9, goes_on=False) == [[*plain, EOS]]
    assert encode(["ab"], tokenizer, 9, add_special_tokens=False, goes_on=False) == [plain]
    for side, kept in (("right", "abc"), ("left", "def")):
        short = cut(Prompts(["abcdef", "ab"]), tokenizer, 4, True, side, goes_on=False)
        assert (short.texts, short.ids) == ([kept, "ab"], [tokenizer(kept)["input_ids"], [*plain, EOS]])


def run_tiny(folder, tmp_path, reward_fn=vowels, **sections):
    config = tiny_seq2seq_config(folder, **sections).evolve(train={"checkpoint_dir": str(tmp_path)})
    return solotune.train(reward_fn=reward_fn, prompts=PROMPTS.texts, config=config), tmp_path / "tiny"


@pytest.mark.parametrize("trained", ["lora", "last two blocks", "everything"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(folder, tmp_path, trained):
    model = {"delta_kwargs": None, "num_layers_unfrozen": 2 if trained == "last two blocks" else -1}
    sections = {} if trained == "lora" else {"model": model}
    _, whole = run_tiny(folder, tmp_path / "whole", **sections)
    calls = []

    def dies_in_round_two(outputs, **_):
        calls.append(1)
        if len(calls) == 4:  # evaluation, round 1, evaluation, round 2
            raise KeyboardInterrupt
        return vowels(outputs)

    with pytest.raises(KeyboardInterrupt):
        run_tiny(folder, tmp_path / "parts", dies_in_round_two, **sections)
    sections["train"] = {"resume_from_checkpoint": str(tmp_path / "parts" / "tiny")}
    _, parts = run_tiny(folder, tmp_path / "parts", **sections)
    assert (whole / "samples.jsonl").read_text() == (parts / "samples.jsonl").read_text()
    rows = [read_lines(run / "metrics.jsonl") for run in (whole, parts)]
    timed = ("time/", "memory/", "rollout/tokens_per_second")
    one, other = ([{k: v for k, v in row.items() if not k.startswith(timed)} for row in each] for each in rows)
    assert one == other
    assert len(one) == 2


def test_a_recipe_leaves_an_adapter_that_peft_loads_and_that_can_be_merged(folder, tmp_path):
    (tmp_path / "reward.py").write_text("def reward_fn(outputs, **_):\n    return [len(set(o)) / 6 for o in outputs]\n")
    recipe = Recipe.from_dict(
        {
            **tiny_seq2seq_config(folder).to_dict(),
            "data": {"prompts": PROMPTS.texts},
            "reward": {"function": f"{tmp_path / 'reward.py'}:reward_fn"},
        }
    )
    trainer = run_recipe(recipe, tmp_path / "run")
    again = run_recipe(Recipe.load_yaml(tmp_path / "run" / "config.yaml"), tmp_path / "again")
    assert again.last_evaluation.samples == trainer.last_evaluation.samples
    base = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    merged = AutoModelForSeq2SeqLM.from_pretrained(merge_adapter(tmp_path / "run", tmp_path / "merged"))
    ids, decoder_ids = torch.randint(0, 256, (2, 5)), torch.randint(0, 256, (2, 4))
    expected = trainer.model.lm(input_ids=ids, decoder_input_ids=decoder_ids).logits
    for lm in (tuned, merged):
        found = lm(input_ids=ids, decoder_input_ids=decoder_ids).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "1-2 (T5Block) x2" in summary["parameter_tree"]
    assert summary["trainable_parameters"] == 2 * 8 * 4 * (32 + 32)
