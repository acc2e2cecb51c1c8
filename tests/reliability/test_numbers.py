"""Gradients that are not finite, and policies that move too far."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from solotune.data.prompts import Prompts
from solotune.errors import ConfigError, TrainingError
from solotune.runs.folder import RunFolder, read_lines
from solotune.trainers.ppo import PPOTrainer
from tests.tiny import tiny_ppo_config

PROMPTS = Prompts(["a film", "so"])


def trainer_of(folder, **sections):
    def vowels(outputs, **_):
        return [sum(character in "aeiou" for character in output) / 6 for output in outputs]

    config = tiny_ppo_config(folder, **sections)
    return PPOTrainer(config, vowels, PROMPTS, PROMPTS, accelerator=Accelerator(cpu=True))


def poison(trainer, steps):
    """The gradient of the steps with these numbers (from 0) has a NaN in it."""
    accumulate, seen = trainer._accumulate, []

    def poisoned(*args):
        totals = accumulate(*args)
        if len(seen) in steps:
            trainer.parameters[0].grad.view(-1)[0] = math.nan
        seen.append(1)
        return totals

    trainer._accumulate = poisoned


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(tiny_folder):
    trainer = trainer_of(tiny_folder)
    poison(trainer, {1})
    states = []
    step = trainer.optimizer_step

    def remember(*args):
        result = step(*args)
        moments = [v.clone() for s in trainer.optimizer.optimizer.state.values() for v in s.values()]
        states.append([*(p.detach().clone() for p in trainer.parameters), *moments])
        return result

    trainer.optimizer_step = remember
    metrics = trainer.train_round()
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))
    assert metrics["policy/skipped_steps"] == 1.0
    assert math.isfinite(metrics["policy/loss"])
    assert math.isfinite(metrics["policy/grad_norm"])
    assert all(torch.isfinite(p).all() for p in trainer.parameters)


def test_too_many_in_a_row_end_the_run_over_the_borders_of_rounds(tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder, train={"max_skipped_steps": 3})
    trainer.run = RunFolder(tmp_path / "run")
    poison(trainer, {0, 3, 4, 5})  # rounds of 4 steps: the last of the first, the first two of the second
    trainer.train_round()
    with pytest.raises(TrainingError, match=r"gradient of 3 steps in a row.*failure.*--resume"):
        trainer.train_round()
    statistics = json.loads((tmp_path / "run" / "failure" / "tensors.json").read_text())
    assert all(values["finite"] == 1.0 for values in statistics.values())
    assert load_file(tmp_path / "run" / "failure" / "rollouts.safetensors")["response_ids_NT"].shape[0] == 8


def test_target_kl_ends_the_passes_of_a_round(tiny_folder):
    free = trainer_of(tiny_folder, method={"ppo_epochs": 4})
    free.train_round()
    held = trainer_of(tiny_folder, method={"ppo_epochs": 4, "target_kl": 1e-9})
    held.learn()
    assert free.steps_done == 8
    assert (held.rounds_done, held.steps_done) == (2, 4), "one pass a round, and no more rounds than train.epochs"


def test_a_kl_that_runs_away_ends_the_run_and_leaves_the_state_of_before(tiny_folder, tmp_path):
    trainer = trainer_of(
        tiny_folder,
        train={"epochs": 50, "checkpoint_interval": 1000},
        optimizer={"kwargs": {"lr": 0.3}},
        method={"max_kl": 0.2},
    )
    trainer.run = RunFolder(tmp_path / "run")
    adapters = {}
    tell = trainer.tell

    def remember(metrics, first_step):
        adapters[trainer.steps_done] = [p.detach().clone() for p in trainer.parameters]
        tell(metrics, first_step)

    trainer.tell = remember
    with pytest.raises(TrainingError, match=r"nats a response after \d+ rounds, above.*max_kl = 0\.2\..*hf_model"):
        trainer.learn()
    kls = [row["objective/kl"] for row in read_lines(trainer.run.metrics)]
    assert max(kls) <= 0.2, "the round that is above it is not learned from"
    assert trainer.rounds_done < 50
    again = trainer_of(tiny_folder, train={"epochs": 50}, method={"max_kl": 0.2})
    again.load(tmp_path / "run")
    assert again.rounds_done == trainer.rounds_done - 1, "the weights of the last round are the ones that ran away"
    assert all(torch.equal(p, q) for p, q in zip(again.parameters, adapters[again.steps_done], strict=True))


def test_going_back_needs_two_checkpoints(tiny_folder):
    with pytest.raises(ConfigError, match=r"train\.keep_checkpoints = 1: must be at least 2 with method\.max_kl"):
        tiny_ppo_config(tiny_folder, train={"keep_checkpoints": 1}, method={"max_kl": 5.0}).check()
