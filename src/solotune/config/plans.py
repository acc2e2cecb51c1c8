"""How runs count: by rounds of rollouts, by growth, or by passes over given samples. A method's config says which."""

from __future__ import annotations

import math
from typing import NamedTuple

from solotune.config.sections import TrainConfig


class StepPlan(NamedTuple):
    """What a run of rounds will do. `rollouts`: a round's; `total_steps` are optimizer steps; `ended_by` a setting."""

    rounds: int
    rollouts: int
    steps_per_round: int
    total_steps: int
    ended_by: str

    @property
    def line(self) -> str:
        """The plan as the one line that is said before the first round."""
        in_last = self.total_steps - (self.rounds - 1) * self.steps_per_round
        last = f" (the last round stops after {in_last})" if in_last < self.steps_per_round else ""
        return (
            f"{_counted(self.rounds, 'round')} of {_counted(self.rollouts, 'rollout')}, "
            f"{_counted(self.steps_per_round, 'optimizer step')} a round: "
            f"{_counted(self.total_steps, 'optimizer step')} in all{last}, ended by {self.ended_by}"
        )

    def __str__(self) -> str:
        return self.line

    def __rich__(self) -> str:
        return self.line


def plan_rounds(train: TrainConfig, rollouts: int, passes: int = 1) -> StepPlan:
    """`train.epochs` rounds of so many passes over so many rollouts, and at most `train.total_steps` steps."""
    steps_per_round = passes * math.ceil(rollouts / train.batch_size)
    total, ended_by = _ended(train, steps_per_round)
    return StepPlan(math.ceil(total / steps_per_round), rollouts, steps_per_round, total, ended_by)


class GrowthPlan(NamedTuple):
    """What a run by growth (RFT) will do. How many optimizer steps a pass has is known once its samples are selected.

    Args:
        rounds: growth steps: all prompts are sampled anew in each.
        passes_per_round: improvement steps on a round's samples, with a rising threshold.
        passes: of the whole run; the last round may have fewer.
        generations_per_prompt: samples of each prompt a round.
        total_steps: optimizer steps at most.
    """

    rounds: int
    passes_per_round: int
    passes: int
    generations_per_prompt: int
    total_steps: int

    def passes_in(self, round_index: int) -> int:
        """Improvement steps of a round, counted from 0."""
        return min(self.passes_per_round, self.passes - round_index * self.passes_per_round)

    @property
    def line(self) -> str:
        """The plan as the one line that is said before the first round."""
        s = "" if self.rounds == 1 else "s"
        return (
            f"{self.rounds:,} round{s} of {self.generations_per_prompt:,} samples a prompt, {self.passes_per_round} "
            f"passes over the best of them a round: {self.passes:,} passes in all, at most {self.total_steps:,} "
            "optimizer steps"
        )

    def __str__(self) -> str:
        return self.line

    def __rich__(self) -> str:
        return self.line


def plan_growth(train: TrainConfig, passes_per_round: int, generations_per_prompt: int) -> GrowthPlan:
    """`train.epochs` improvement steps, so many of them a round, and at most `train.total_steps` optimizer steps."""
    return GrowthPlan(
        rounds=math.ceil(train.epochs / passes_per_round),
        passes_per_round=passes_per_round,
        passes=train.epochs,
        generations_per_prompt=generations_per_prompt,
        total_steps=train.total_steps,
    )


class PassPlan(NamedTuple):
    """What a run over given samples will do.

    A round is what ends in a line of metrics: at the end of a pass, and wherever an evaluation or a checkpoint is due.

    Args:
        samples: how many there are, of all processes.
        steps_per_pass: optimizer steps of a pass over them.
        total_steps: optimizer steps in all.
        interval: steps after which each evaluation and each checkpoint is due.
        ended_by: the setting that ends the run.
    """

    samples: int
    steps_per_pass: int
    total_steps: int
    interval: tuple[int, int]
    ended_by: str

    @property
    def rounds(self) -> int:
        a, b, c = self.steps_per_pass, *self.interval
        ends = sum(self.total_steps // n for n in (a, b, c))
        ends -= sum(self.total_steps // math.lcm(*pair) for pair in ((a, b), (a, c), (b, c)))
        ends += self.total_steps // math.lcm(a, b, c)
        return ends + (not self.ends_at_interval(self.total_steps))

    def ends_at_interval(self, step: int) -> bool:
        return any(step % n == 0 for n in (self.steps_per_pass, *self.interval))

    def ends_round(self, step: int) -> bool:
        """Whether a round ends after so many steps."""
        return step == self.total_steps or self.ends_at_interval(step)

    @property
    def repeats(self) -> bool:
        """Whether some sample is learned from more than once."""
        return self.total_steps > self.steps_per_pass

    @property
    def line(self) -> str:
        """The plan as the one line that is said before the first round."""
        passes = self.total_steps / self.steps_per_pass
        return (
            f"{self.samples:,} samples, {_counted(self.steps_per_pass, 'optimizer step')} a pass: "
            f"{_counted(self.total_steps, 'optimizer step')} in all, {passes:.3g} "
            f"pass{'' if passes == 1 else 'es'}, ended by {self.ended_by}"
        )


def plan_passes(train: TrainConfig, n_samples: int, n_processes: int = 1) -> PassPlan:
    """The plan of `train.epochs` passes over so many samples, at most `train.total_steps` steps."""
    steps_per_pass = math.ceil(math.ceil(n_samples / n_processes) / train.batch_size)
    total, ended_by = _ended(train, steps_per_pass)
    return PassPlan(n_samples, steps_per_pass, total, (train.eval_interval, train.checkpoint_interval), ended_by)


def _ended(train: TrainConfig, steps_per_epoch: int) -> tuple[int, str]:
    """Optimizer steps in all, and the setting that ends them."""
    if train.total_steps <= train.epochs * steps_per_epoch:
        return train.total_steps, f"train.total_steps = {train.total_steps:,}"
    return train.epochs * steps_per_epoch, f"train.epochs = {train.epochs:,}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


Plan = StepPlan | GrowthPlan | PassPlan
