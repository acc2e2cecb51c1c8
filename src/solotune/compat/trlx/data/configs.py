"""The configuration classes, with trlX's own defaults and its tolerance for batches that do not come out even."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from solotune import config as ours
from solotune.compat.shims import modernised, tell_once
from solotune.config import ModelConfig, OptimizerConfig, SchedulerConfig, TokenizerConfig
from solotune.config.sections import Tracker
from solotune.config.values import STRICT, PathText

__all__ = [
    "ModelConfig",
    "OptimizerConfig",
    "SchedulerConfig",
    "TRLConfig",
    "TokenizerConfig",
    "TrainConfig",
]


@dataclass(config=STRICT)
class TrainConfig(ours.TrainConfig):
    """trlX's defaults: files go to ckpts/, numbers to W&B where one can."""

    project_name: str = "trlx"
    checkpoint_dir: PathText = "ckpts"
    tracker: Annotated[Tracker | None, BeforeValidator(lambda v: v.lower() if isinstance(v, str) else v)] = "wandb"


@dataclass(config=STRICT)
class TRLConfig(ours.TRLConfig):
    """All settings of a training run, of any generation of trlX."""

    train: TrainConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # narrower, with other defaults

    SECTIONS: ClassVar[dict[str, type]] = {**ours.TRLConfig.SECTIONS, "train": TrainConfig}
    AS_TRLX: ClassVar[bool] = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TRLConfig:
        """As trlX's, for the configurations of every generation."""
        return super().from_dict(modernised(config))  # type: ignore[return-value]

    def check(self) -> None:
        super().check()
        rollouts, batch = getattr(self.method, "num_rollouts", 0), self.train.batch_size
        if rollouts % batch:
            tell_once(
                f"method.num_rollouts = {rollouts} is no multiple of train.batch_size = {batch}: the last step of each "
                f"pass learns from {rollouts % batch}"
            )
