"""How a run of rejection-sampling fine-tuning counts; PPO's counting is `solotune.config.StepPlan`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from solotune.config import TRLConfig
    from solotune.methods import RFTConfig


class GrowthPlan(NamedTuple):
    """What a run of RFT will do. How many optimizer steps a pass has is known once its samples are selected.

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


def plan_growth(config: TRLConfig) -> GrowthPlan:
    """`train.epochs` improvement steps, `method.n_improve_steps` a round, and at most `train.total_steps` steps."""
    method = cast("RFTConfig", config.method)
    return GrowthPlan(
        rounds=math.ceil(config.train.epochs / method.n_improve_steps),
        passes_per_round=method.n_improve_steps,
        passes=config.train.epochs,
        generations_per_prompt=method.n_generations_per_prompt,
        total_steps=config.train.total_steps,
    )
