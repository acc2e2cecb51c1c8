"""A round of PPO whose rollouts are being learned from, and its part of a checkpoint when a signal comes then."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from solotune.models.policy import Measured
from solotune.rollout.records import Rollouts
from solotune.trainers.sampling import has_room


class Credit(NamedTuple):
    """What a round's tokens are worth.

    Args:
        advantages_NT: whitened over the response tokens of all processes.
        returns_NT: targets of the critic.
        rewards_NT: score less KL penalty, of each token.
        kl_NT: log p - log p_ref of each token, nats.
        kl_coef: the weight the penalty had.
    """

    advantages_NT: Tensor
    returns_NT: Tensor
    rewards_NT: Tensor
    kl_NT: Tensor
    kl_coef: float


class Round(NamedTuple):
    """A round whose rollouts are being learned from.

    Args:
        first_step: optimizer steps before the round.
        metrics: what is known of the round before its update.
        steps: losses and statistics of the steps taken so far, each (7,).
    """

    rollouts: Rollouts
    measured: Measured
    credit: Credit
    first_step: int
    metrics: dict[str, Any]
    steps: list[Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by name, on the CPU."""
        named = {
            f"round.{part}.{field}": value.cpu()
            for part in _PARTS
            for field, value in getattr(self, part)._asdict().items()
            if isinstance(value, Tensor)
        }
        return {**named, "round.steps": torch.stack(self.steps).cpu()} if self.steps else named

    def numbers(self) -> dict[str, Any]:
        """The rest, JSON."""
        return {"first_step": self.first_step, "metrics": self.metrics, "kl_coef": self.credit.kl_coef}

    @classmethod
    def restored(cls, numbers: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> Round:
        """The inverse of `tensors` and `numbers`."""

        def part(name: str) -> dict[str, Any]:
            fields = {field: tensors.get(f"round.{name}.{field}") for field in _PARTS[name]._fields}
            trunk = fields.get("trunk_NSH")
            stays = trunk is not None and not has_room(trunk.nbytes, device)
            return {
                field: value if value is None or (stays and field == "trunk_NSH") else value.to(device)
                for field, value in fields.items()
            }

        steps = tensors.get("round.steps")
        return cls(
            Rollouts(**part("rollouts")),
            Measured(**part("measured")),
            Credit(**{**part("credit"), "kl_coef": numbers["kl_coef"]}),
            numbers["first_step"],
            numbers["metrics"],
            [] if steps is None else list(steps.to(device)),
        )


_PARTS: dict[str, Any] = {"rollouts": Rollouts, "measured": Measured, "credit": Credit}
