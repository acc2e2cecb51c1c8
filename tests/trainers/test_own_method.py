"""A method from outside: REINFORCE with the mean of the batch as baseline. Nothing in src knows of it."""

from __future__ import annotations

import os
import signal
from dataclasses import field
from typing import ClassVar, NamedTuple

import pytest
import torch
from pydantic.dataclasses import dataclass

import solotune
from solotune.config import MethodConfig, TRLConfig, register_method
from solotune.config.methods.generation import GenKwargs
from solotune.config.plans import plan_rounds
from solotune.config.values import STRICT, PositiveInt
from solotune.errors import ConfigError, NotYetError
from solotune.runs.lines import read_lines
from solotune.trainers.registry import register_trainer, trainer_of
from solotune.trainers.rounds import RoundTrainer
from tests.tiny import tiny_lm, tiny_ppo_config


@register_method
@dataclass(config=STRICT)
class ReinforceConfig(MethodConfig):
    """num_rollouts: responses a round; each is learned from once."""

    HAS_REFERENCE: ClassVar[bool] = False

    name: str = "ReinforceConfig"
    num_rollouts: PositiveInt = 16
    gen_kwargs: GenKwargs = field(default_factory=lambda: {"max_new_tokens": 6})

    def plan(self, train, n_samples=0, n_processes=1):
        return plan_rounds(train, self.num_rollouts)


class Credit(NamedTuple):
    advantages_NT: torch.Tensor


@register_trainer
class ReinforceTrainer(RoundTrainer):
    METHOD = ReinforceConfig
    CREDIT = Credit
    LOSSES = ("policy/loss",)

    def credit(self, rollouts, scores, measured):
        mask_NT = rollouts.response_mask_NT
        total, n = self.totals(scores, mask_NT.any(-1))
        return Credit((scores - total / n)[:, None] * mask_NT)

    def losses(self, now, then, credit, mask_bT, tokens):
        loss = -(credit.advantages_NT * now.logprobs_bT).sum() / tokens
        return loss, torch.stack([loss])


# ---- that is all of it --------------------------------------------------------------------------------------------


@register_method
@dataclass(config=STRICT)
class BesideReferenceConfig(ReinforceConfig):
    """The same with a reference, which it needs for nothing but to be told the KL."""

    HAS_REFERENCE: ClassVar[bool] = True

    name: str = "BesideReferenceConfig"


PROMPTS = ["hello", "abc def", "x", "what is it", "the end"]
TIMED = ("time/", "memory/", "rollout/tokens_per_second")


def ascii_share(outputs, **_):
    return [sum(character.isascii() for character in output) / 6 for output in outputs]


def config_of(folder, where, method="ReinforceConfig", model=None, num_rollouts=16, **train) -> TRLConfig:
    train = {"checkpoint_dir": str(where), "batch_size": num_rollouts // 4, **train}
    of_ppo = {"num_rollouts": num_rollouts, "chunk_size": num_rollouts}
    sections = tiny_ppo_config(folder, train=train, model=model or {}, method=of_ppo).to_dict()
    return TRLConfig.from_dict({**sections, "method": {"name": method, "num_rollouts": num_rollouts}})


def run(folder, where, method="ReinforceConfig", **settings):
    config = config_of(folder, where, method, **settings)
    trainer = solotune.train(reward_fn=ascii_share, prompts=PROMPTS, eval_prompts=PROMPTS, config=config)
    rows = read_lines(where / "tiny" / "metrics.jsonl")
    return trainer, [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]


@pytest.mark.parametrize(("method", "has_reference"), [("ReinforceConfig", False), ("BesideReferenceConfig", True)])
def test_it_learns_and_has_its_page(tiny_folder, tmp_path, method, has_reference):
    model = {"delta_kwargs": None, "model_path": tiny_lm("gpt2", spread=10.0)}
    often = {"epochs": 24, "eval_interval": 96, "checkpoint_interval": 96}
    trainer, rows = run(tiny_folder, tmp_path, method, model=model, num_rollouts=64, **often)
    assert isinstance(trainer, ReinforceTrainer)
    scores = [row["objective/score"] for row in rows]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.1
    assert (trainer.last_evaluation.kl is not None) == has_reference
    for row in rows:
        assert {"policy/loss", "policy/grad_norm", "objective/score", "objective/entropy"} <= row.keys()
        assert ("objective/kl" in row) == has_reference
        assert not any(name.startswith("value/") for name in row), "there is no critic"
    page = (tmp_path / "tiny" / "report.html").read_text(encoding="utf-8")
    assert method in page
    assert (tmp_path / "tiny" / "model" / "model.safetensors").exists()
    assert not list((tmp_path / "tiny").rglob("value_head.safetensors"))


def test_interrupted_within_a_round_it_ends_as_if_it_had_not_been(tiny_folder, tmp_path, monkeypatch):
    whole, rows = run(tiny_folder, tmp_path / "whole", epochs=3)
    step, seen = ReinforceTrainer.optimizer_step, []

    def interrupted(self, *args):
        seen.append(1)
        if len(seen) == 6:  # the second of round 2
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(ReinforceTrainer, "optimizer_step", interrupted)
        with pytest.raises(SystemExit):
            run(tiny_folder, parts, epochs=3)
    resumed, again = run(tiny_folder, parts, epochs=3, resume_from_checkpoint=str(parts / "tiny"))
    assert again == rows
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_step_does_not_depend_on_its_micro_batches(tiny_folder, tmp_path):
    ends = []
    for rows in (4, 1):
        trainer, _ = run(tiny_folder, tmp_path / str(rows), epochs=1, minibatch_size=rows)
        ends.append([p.detach().clone() for p in trainer.parameters])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_methods_and_trainers_that_do_not_belong_together_are_refused(tiny_folder, tmp_path):
    @dataclass(config=STRICT)
    class WithoutTrainer(MethodConfig):
        name: str = "WithoutTrainer"

    config = config_of(tiny_folder, tmp_path)
    with pytest.raises(ConfigError, match=r"does not fit method\.name = 'ReinforceConfig'"):
        trainer_of(config.evolve(train={"trainer": "AccelerateRFTTrainer"}))
    with pytest.raises(ConfigError, match=r"does not fit method\.name = 'PPOConfig'"):
        trainer_of(tiny_ppo_config(tiny_folder, train={"trainer": "ReinforceTrainer"}))
    config.method = WithoutTrainer()
    with pytest.raises(NotYetError, match="has no trainer"):
        trainer_of(config)
