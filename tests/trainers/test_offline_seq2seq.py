"""SFT and ILQL of encoder-decoders: plain references, the cache, learning, bad input."""

import math
import random

import pytest
import torch
import transformers
from accelerate import Accelerator

import solotune
from solotune.data.dialogues import encode_pairs
from solotune.data.prompts import Prompts
from solotune.errors import DataError
from solotune.runs.folder import read_lines
from solotune.trainers.ilql import ILQLTrainer
from solotune.trainers.sft import SFTTrainer
from tests.tiny import EOS, PAD, tiny_offline_config
from tests.tiny_seq2seq import KINDS, ending_tokenizer, save_tiny_seq2seq

SAMPLES = [["a film", "so good"], ["x", "y"], ["another", "one, a longer one"], ["is it", "no"], ["the", "end"]]
REWARDS = [1.0, 0.0, 0.5, 2.0, -1.0]
BOTH = pytest.mark.parametrize("method", ["sft", "ilql"])
TRAINED = {
    "last two blocks": {"num_layers_unfrozen": 2},
    "everything": {"num_layers_unfrozen": -1},
    "lora in the decoder": {"num_layers_unfrozen": -1, "delta_kwargs": {"delta_type": "lora", "lora_r": 4}},
}
WAYS = pytest.mark.parametrize("trained", TRAINED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_seq2seq(tmp_path_factory.mktemp("models") / "tiny-t5", "t5 1.1")


def config_of(folder, kind, model=None, **sections):
    config = tiny_offline_config(folder, kind, model={"model_arch_type": "seq2seq", **(model or {})})
    return config.evolve(**sections) if sections else config


def trainer_of(folder, kind, **sections):
    config, accelerator = config_of(folder, kind, **sections), Accelerator(cpu=True)
    prompts = Prompts(["a film", "is it"])
    torch.manual_seed(0)
    if kind == "sft":
        return SFTTrainer(config, SAMPLES, prompts, accelerator=accelerator)
    trainer = ILQLTrainer(config, SAMPLES, REWARDS, prompts, accelerator=accelerator)
    for parameter in trainer.model.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return trainer


def gradients(trainer):
    """The gradient of one step on all samples, without taking it, and its losses."""
    captured = {}

    def keep():
        captured.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        return torch.tensor(0.0)

    trainer.stepper.step = keep
    return captured, trainer.optimizer_step(torch.arange(len(SAMPLES)))


@WAYS
def test_the_loss_of_sft_is_that_of_transformers(folder, trained):
    trainer = trainer_of(folder, "sft", model=TRAINED[trained])
    captured, totals = gradients(trainer)
    tokenizer = ending_tokenizer()
    given, wanted = (tokenizer([pair[i] for pair in SAMPLES], padding=True, return_tensors="pt") for i in (0, 1))
    labels = wanted.input_ids.masked_fill(wanted.input_ids == PAD, -100)
    mask = given.input_ids != PAD  # the tokenizer pads on the left, the trainer on the right
    labels = torch.stack([torch.cat([row[row != -100], row[row == -100]]) for row in labels])
    trainer.model.zero_grad()
    loss = trainer.model.lm(input_ids=given.input_ids, attention_mask=mask.long(), labels=labels).loss
    loss.backward()
    assert float(totals[0]) == pytest.approx(loss.item(), abs=1e-5)
    assert float(totals[-2]) == (labels != -100).sum()
    expected = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert expected.keys() == captured.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(captured[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@BOTH
@WAYS
def test_the_gradient_depends_neither_on_the_micro_batch_nor_on_the_cache(folder, method, trained):
    found = []
    for size, cached in ((4, True), (1, True), (2, False)):
        limit = {} if cached else {"trunk_cache_gb": None}
        train = {"batch_size": 4, "minibatch_size": size, **limit}
        trainer = trainer_of(folder, method, model=TRAINED[trained], train=train)
        trainer._fill_cache()
        assert (trainer._cache is not None) == (cached and trained == "last two blocks")
        found.append(gradients(trainer))
    for gradient, totals in found[1:]:
        torch.testing.assert_close(totals, found[0][1], atol=1e-4, rtol=1e-4)
        for name, expected in found[0][0].items():
            torch.testing.assert_close(gradient[name], expected, atol=1e-4, rtol=1e-3, msg=name)


def test_a_resumed_run_ends_like_an_uninterrupted_one(folder, tmp_path):
    def run(out, **train):
        config = config_of(folder, "ilql", train={"checkpoint_dir": str(out), **train})
        return solotune.train(samples=SAMPLES, rewards=REWARDS, eval_prompts=["a film"], config=config)

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", total_steps=8)
    resumed = run(tmp_path / "parts", resume_from_checkpoint=str(tmp_path / "parts" / "tiny"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    rows = read_lines(tmp_path / "whole" / "tiny" / "metrics.jsonl")
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_decoding_by_advantages_prefers_what_q_prefers(folder):
    """beta 0 is the policy; with a large beta the token of the largest Q comes first."""
    trainer = trainer_of(folder, "ilql")
    heads, best = trainer.model.heads, trainer.samples.chosen_tokens[3]
    with torch.no_grad():
        for head in heads.target_q_heads:
            head.outer.weight.zero_()
            head.outer.bias.zero_()[heads.rows.of(torch.tensor(best))] = 1.0
    outputs = {}
    for beta in (0, 1000):
        settings = trainer.settings({"max_new_tokens": 4, "beta": beta, "temperature": 0.0})
        outputs[beta] = trainer._sample_eval([0, 1], [0, 1], settings).response_ids_NT
    assert (outputs[1000] == best).all()
    assert not (outputs[0] == best).all()


def test_it_learns_to_reverse_words(tmp_path):
    """From random weights, on words that it has not seen; measured by whole words."""
    ending_tokenizer().save_pretrained(tmp_path)
    draw = random.Random(5)
    words = sorted({"".join(draw.choices("abcdefgh", k=draw.randint(2, 4))) for _ in range(3000)})
    draw.shuffle(words)
    seen, unseen = words[32:], words[:32]
    config = config_of(
        tmp_path,
        "sft",
        train={"seq_length": 16, "batch_size": 96, "total_steps": 400, "eval_interval": 400, "seed": 5, "epochs": 1000,
               "checkpoint_interval": 10000, "save_best": False, "checkpoint_dir": str(tmp_path)},
        optimizer={"kwargs": {"lr": 4e-3}},
        scheduler={"name": "cosine_annealing", "kwargs": {"T_max": 400, "eta_min": 2e-4}},
        method={"gen_kwargs": {"max_new_tokens": 6, "do_sample": False}},
        model=TRAINED["everything"],
    )  # fmt: skip
    sizes = {"d_model": 64, "d_ff": 128, "num_decoder_layers": 2}
    config.model.model_path = transformers.T5Config(**{**KINDS["t5 1.1"][1], **sizes})
    trainer = solotune.train(
        samples=[[word, word[::-1]] for word in seen],
        eval_prompts=unseen,
        reward_fn=lambda prompts, outputs, **_: [float(o == p[::-1]) for p, o in zip(prompts, outputs, strict=True)],
        config=config,
    )
    assert trainer.first_evaluation.reward < 0.1
    assert trainer.last_evaluation.reward >= 0.95


def test_pairs_are_encoded_apart_and_cut_apart(caplog):
    tokenizer = ending_tokenizer()
    plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    samples = encode_pairs([["ab", "cd"], ["abcdef", "ghijkl"]], tokenizer, 4)
    assert samples.prompts == [[*plain("ab"), EOS], [*plain("abc"), EOS]]
    assert [ids[1:] for ids in samples.ids] == [[*plain("cd"), EOS], plain("ghij")]
    assert samples.is_output[0] == [False, True, True, True]
    tokenizer.truncation_side = "left"
    samples = encode_pairs([["abcdef", "g"]], tokenizer, 4, add_special_tokens=False)
    assert samples.prompts == [plain("cdef")]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "no samples"),
        (["a text"], "sample 0 is 'a text'.*learns from .prompt, output."),
        ([["a", "b"], ["a", "b", "c", "d"]], r"sample 1 is \['a', 'b', 'c', 'd'\]"),
        ([["a", ""]], "two texts that are not empty"),
        ([["", "b"]], "two texts that are not empty"),
        ([["a", "b", "c"]], "3 phrases"),
    ],
)
def test_what_is_no_pair_is_said(samples, said):
    with pytest.raises(DataError, match=said):
        encode_pairs(samples, ending_tokenizer(), 8)
