"""Gradients that are not finite, and policies that move too far."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from solotune.data.prompts import Prompts
from solotune.errors import TrainingError
from solotune.trainers.ppo import PPOTrainer
from solotune.trainers.run_folder import RunFolder
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
