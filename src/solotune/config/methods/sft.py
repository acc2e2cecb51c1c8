"""The settings of supervised fine-tuning."""

from dataclasses import field
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from solotune.config.methods.base import MethodConfig, register_method
from solotune.config.methods.generation import SweepKwargs
from solotune.config.plans import PassPlan, plan_passes
from solotune.config.sections import TrainConfig
from solotune.config.values import STRICT


@register_method
@dataclass(config=STRICT)
class SFTConfig(MethodConfig):
    """Supervised fine-tuning; `gen_kwargs` are used at evaluation."""

    LEARNS_FROM: ClassVar[Literal["prompts", "samples", "rated samples"]] = "samples"
    HAS_REFERENCE: ClassVar[bool] = False

    name: str = "SFTConfig"
    gen_kwargs: SweepKwargs = field(
        default_factory=lambda: {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True}
    )

    def plan(self, train: TrainConfig, n_samples: int = 0, n_processes: int = 1) -> PassPlan:
        """By passes over the samples."""
        return plan_passes(train, n_samples, n_processes)
