"""The settings of ILQL."""

from dataclasses import field
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from solotune.config.methods.base import MethodConfig, register_method
from solotune.config.methods.generation import QKwargs
from solotune.config.plans import PassPlan, plan_passes
from solotune.config.sections import TrainConfig
from solotune.config.values import STRICT, Flag, NonNegativeReal, PositiveInt, Real, UnitReal
from solotune.errors import ConfigError


@register_method
@dataclass(config=STRICT)
class ILQLConfig(MethodConfig):
    """Implicit language Q-learning; names and defaults are those of trlX's `default_ilql_config`.

    tau: expectile of the values. gamma: discount a token. cql_scale, awac_scale: weights of the terms that keep Q and
    the policy near the data. beta: how much the policy's term favours tokens with an advantage (0: not).
    steps_for_target_q_sync: optimizer steps after which the target heads move by alpha towards the Q heads.
    gen_kwargs: `beta` is the weight of the advantage in decoding; temperature 0 takes the most likely token.
    """

    LEARNS_FROM: ClassVar[Literal["prompts", "samples", "rated samples"]] = "rated samples"
    HAS_REFERENCE: ClassVar[bool] = False
    HEADS: ClassVar[Literal["value", "q", "none"]] = "q"

    name: str = "ILQLConfig"
    tau: UnitReal = 0.7
    gamma: UnitReal = 0.99
    cql_scale: NonNegativeReal = 0.1
    awac_scale: NonNegativeReal = 1.0
    alpha: UnitReal = 0.001
    beta: Real = 0.0
    steps_for_target_q_sync: PositiveInt = 5
    two_qs: Flag = True
    gen_kwargs: QKwargs = field(
        default_factory=lambda: {"max_new_tokens": 56, "top_k": 20, "beta": 1, "temperature": 1.0}
    )

    def plan(self, train: TrainConfig, n_samples: int = 0, n_processes: int = 1) -> PassPlan:
        """By passes over the samples."""
        return plan_passes(train, n_samples, n_processes)

    def check(self) -> None:
        super().check()
        for name in ("loss", "heads"):
            if hasattr(self, name):
                raise ConfigError(
                    f"{type(self).__name__}.{name} would never be called here: for a loss of your own override "
                    "losses in a subclass of AccelerateILQLTrainer"
                )
