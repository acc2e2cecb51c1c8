"""What a sweep is to try, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solotune.sweep.space import Plan


@dataclass(frozen=True)
class Sweep:
    """What to try and where.

    Args:
        plan: the sweep file.
        target: a script with `main(hparams)` (.py), or a recipe.
        folder: of the whole sweep.
        seed: of what is drawn.
        jobs: trials at a time.
        accelerate_config: each trial is started by `accelerate launch` with this configuration.
        fixed: dotted settings that are the same in every trial.
    """

    plan: Plan
    target: Path
    folder: Path
    seed: int = 0
    jobs: int = 1
    accelerate_config: Path | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What has to stay the same when a sweep is taken up again."""
        tune = self.plan.tune
        return {
            "parameters": self.plan.as_dict(),
            "metric": tune.metric,
            "mode": tune.mode,
            "target": self.target.name,
            "fixed": dict(self.fixed),
        }
