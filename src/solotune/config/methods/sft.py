"""The settings of supervised fine-tuning."""

from dataclasses import field
from typing import ClassVar

from pydantic.dataclasses import dataclass

from solotune.config.methods.base import MethodConfig, register_method
from solotune.config.methods.generation import SweepKwargs
from solotune.config.values import STRICT


@register_method
@dataclass(config=STRICT)
class SFTConfig(MethodConfig):
    """Supervised fine-tuning; `gen_kwargs` are used at evaluation."""

    HEADS: ClassVar[str] = "none"

    name: str = "SFTConfig"
    gen_kwargs: SweepKwargs = field(
        default_factory=lambda: {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True}
    )
