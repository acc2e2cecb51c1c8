"""The settings of RFT."""

from dataclasses import field

from pydantic.dataclasses import dataclass

from solotune.config.methods.base import MethodConfig, register_method
from solotune.config.methods.generation import SweepKwargs
from solotune.config.plans import GrowthPlan, plan_growth
from solotune.config.sections import TrainConfig
from solotune.config.values import STRICT, PositiveInt, UnitReal
from solotune.errors import ConfigError


@register_method
@dataclass(config=STRICT)
class RFTConfig(MethodConfig):
    """Rejection-sampling fine-tuning (ReST); names and defaults are trlX's.

    n_generations_per_prompt: samples of each prompt a round. n_improve_steps: passes over the best of them a round, for
    which a sample has to reach its prompt's percentile (a fraction): the first takes start_percentile, the last
    end_percentile; train.epochs counts them. gen_kwargs: sampling arguments.
    """

    name: str = "RFTConfig"
    gen_kwargs: SweepKwargs = field(
        default_factory=lambda: {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True}
    )
    start_percentile: UnitReal = 0.7
    end_percentile: UnitReal = 0.95
    n_improve_steps: PositiveInt = 4
    n_generations_per_prompt: PositiveInt = 32

    def plan(self, train: TrainConfig, n_samples: int = 0, n_processes: int = 1) -> GrowthPlan:
        """By growth: `n_improve_steps` passes over the best samples of a round."""
        return plan_growth(train, self.n_improve_steps, self.n_generations_per_prompt)

    def check(self) -> None:
        super().check()
        if self.start_percentile > self.end_percentile:
            raise ConfigError(
                f"method.start_percentile = {self.start_percentile}: must be at most method.end_percentile, "
                f"which is {self.end_percentile}"
            )
        if self.n_generations_per_prompt < 2:
            raise ConfigError("method.n_generations_per_prompt = 1: must be at least 2: the better ones are kept")
