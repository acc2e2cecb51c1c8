"""A round whose rollouts are being learned from, and its part of a checkpoint when a signal comes then."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from solotune.models.policy import Measured
from solotune.rollout.records import Rollouts
from solotune.trainers.sampling import has_room


class Round(NamedTuple):
    """A round whose rollouts are being learned from.

    Args:
        credit: what its tokens are worth: the method's own record of tensors and plain numbers.
        first_step: optimizer steps before the round.
        metrics: what is known of the round before its update.
        steps: losses and statistics of the steps taken so far, each (L + 1,).
    """

    rollouts: Rollouts
    measured: Measured
    credit: Any
    first_step: int
    metrics: dict[str, Any]
    steps: list[Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by name, on the CPU."""
        named = {
            f"round.{part}.{field}": value.cpu()
            for part in ("rollouts", "measured", "credit")
            for field, value in getattr(self, part)._asdict().items()
            if isinstance(value, Tensor)
        }
        return {**named, "round.steps": torch.stack(self.steps).cpu()} if self.steps else named

    def numbers(self) -> dict[str, Any]:
        """The rest, JSON."""
        credit = {name: value for name, value in self.credit._asdict().items() if not isinstance(value, Tensor)}
        return {"first_step": self.first_step, "metrics": self.metrics, "credit": credit}

    @classmethod
    def restored(
        cls, numbers: dict[str, Any], tensors: dict[str, Tensor], device: torch.device, credit: type[Any]
    ) -> Round:
        """The inverse of `tensors` and `numbers`; `credit` is the method's record."""

        def part(name: str, kind: Any) -> dict[str, Any]:
            fields = {field: tensors.get(f"round.{name}.{field}") for field in kind._fields}
            trunk = fields.get("trunk_NSH")
            stays = trunk is not None and not has_room(trunk.nbytes, device)
            return {
                field: value if value is None or (stays and field == "trunk_NSH") else value.to(device)
                for field, value in fields.items()
            }

        steps = tensors.get("round.steps")
        return cls(
            Rollouts(**part("rollouts", Rollouts)),
            Measured(**part("measured", Measured)),
            credit(**{**part("credit", credit), **numbers["credit"]}),
            numbers["first_step"],
            numbers["metrics"],
            [] if steps is None else list(steps.to(device)),
        )


def rows_of(record: Any, rows: Tensor) -> Any:
    """The given rows of a record of tensors; its plain numbers as they are."""
    return record._make(value[rows] if isinstance(value, Tensor) else value for value in record)
