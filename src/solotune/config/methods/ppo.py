"""The settings of PPO."""

from collections.abc import Iterable
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from solotune.config.methods.base import MethodConfig, register_method
from solotune.config.methods.generation import GenKwargs, SweepKwargs
from solotune.config.plans import StepPlan, plan_rounds
from solotune.config.sections import TrainConfig
from solotune.config.values import (
    STRICT,
    CountInt,
    NonNegativeReal,
    PositiveInt,
    PositiveReal,
    Real,
    UnitReal,
)

if TYPE_CHECKING:
    from torch import Tensor

LOSS_NAMES = {  # of algorithms.ppo.PPOLoss, as trlX logged them
    "loss": "losses/total_loss",
    "policy_loss": "losses/policy_loss",
    "value_loss": "losses/value_loss",
    "approx_kl": "policy/approx_kl",
    "clipfrac": "policy/clipfrac",
    "value_clipfrac": "values/clipfrac",
    "ratio": "ratio",
}


def _no_clipping(value: Any) -> Any:
    return value or None  # trlX: 0 and false mean that rewards are not clipped


def _scaling(value: Any) -> str:
    if value is None or value is False or value in ("ignored", "ignore"):
        return "ignored"
    if value in ("running", "ref"):
        return value
    raise ValueError("must be 'running', 'ref' or 'ignored' (also null or false)")


@register_method
@dataclass(config=STRICT)
class PPOConfig(MethodConfig):
    """Proximal policy optimisation; names and defaults are those of trlX's `default_ppo_config`.

    ppo_epochs: passes over the rollouts of a round. num_rollouts: responses a round (per process).
    chunk_size: responses sampled at a time. init_kl_coef: weight of the per-token KL penalty.
    target: nats per response that the adaptive controller aims at; None keeps the weight fixed.
    horizon: responses over which it adapts.
    scale_reward: scores are divided by their 'running' standard deviation, by ref_std or that of the first chunk
    ('ref'), or not ('ignored'). cliprange_reward: they are clipped to +- this; None: not.
    gen_kwargs: sampling arguments; gen_experience_kwargs, if given, replaces them for rollouts only.
    target_kl: nats per token by which a pass over the rollouts may move the policy; when one moved it further, the
    round's other passes are left out. None: all of them (trlX).
    max_kl: nats per response to the reference; a round above it stops the run, and the state of before it is kept
    (there is a checkpoint a round then). None: no limit.
    """

    HEADS: ClassVar[Literal["value", "q", "none"]] = "value"

    name: str = "PPOConfig"
    ppo_epochs: PositiveInt = 4
    num_rollouts: PositiveInt = 128
    chunk_size: PositiveInt = 128
    init_kl_coef: NonNegativeReal = 0.001
    target: PositiveReal | None = None
    horizon: PositiveReal = 10000.0
    gamma: UnitReal = 1.0
    lam: UnitReal = 0.95
    cliprange: PositiveReal = 0.2
    cliprange_value: PositiveReal = 0.2
    vf_coef: NonNegativeReal = 1.0
    scale_reward: Annotated[Literal["running", "ref", "ignored"], BeforeValidator(_scaling)] = "ignored"
    ref_mean: Real | None = None
    ref_std: PositiveReal | None = None
    cliprange_reward: Annotated[PositiveReal | None, BeforeValidator(_no_clipping)] = 10.0
    gen_kwargs: SweepKwargs = field(
        default_factory=lambda: {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True}
    )
    gen_experience_kwargs: GenKwargs | None = None
    num_value_layers_unfrozen: CountInt = 0
    target_kl: PositiveReal | None = None
    max_kl: PositiveReal | None = None

    def plan(self, train: TrainConfig, n_samples: int = 0, n_processes: int = 1) -> StepPlan:
        """By rounds of `ppo_epochs` passes over `num_rollouts`."""
        return plan_rounds(train, self.num_rollouts, self.ppo_epochs)

    def problems(self, train: TrainConfig, as_trlx: bool) -> Iterable[str]:
        if self.target is not None and self.init_kl_coef == 0:
            yield "method.init_kl_coef = 0: must be greater than 0 with method.target, which multiplies it"
        if self.target is not None and self.num_rollouts >= 5 * self.horizon:
            yield (
                f"method.horizon = {self.horizon:g}: must be greater than a fifth of method.num_rollouts, which is "
                f"{self.num_rollouts}"
            )
        if self.max_kl is not None and train.keep_checkpoints < 2:
            yield "train.keep_checkpoints = 1: must be at least 2 with method.max_kl, which goes back to the one before"
        count = self.num_rollouts
        for path, size in (("train.batch_size", train.batch_size), ("method.chunk_size", self.chunk_size)):
            if as_trlx or count % size == 0 or (path == "method.chunk_size" and size >= count):
                continue
            fits = [n for n in (count // size * size, -(-count // size) * size) if n]
            yield (
                f"method.num_rollouts = {count}: must be a multiple of {path}, which is {size}, "
                f"e.g. {' or '.join(map(str, fits))}"
            )

    def get_advantages_and_returns(
        self, values: "Tensor", rewards: "Tensor", response_length: int, use_whitening: bool = True
    ) -> "tuple[Tensor, Tensor]":
        """GAE over the first `response_length` tokens, both (B, T). For subclasses: the trainer calls an override of it
        once a round, with zeros where there is no response token."""
        import torch

        from solotune.algorithms.advantages import gae, whiten

        values, rewards = values[:, :response_length], rewards[:, :response_length]
        everywhere = torch.ones_like(values, dtype=torch.bool)
        advantages, returns = gae(rewards, values, everywhere, self.gamma, self.lam)
        return (whiten(advantages, everywhere) if use_whitening else advantages), returns

    def loss(
        self,
        logprobs: "Tensor",
        values: "Tensor",
        old_logprobs: "Tensor",
        old_values: "Tensor",
        advantages: "Tensor",
        returns: "Tensor",
        mask: "Tensor",
    ) -> "tuple[Tensor, dict[str, float]]":
        """PPO's loss over the masked tokens of (B, T), and statistics under trlX's names. For subclasses: the trainer
        calls an override of it for every micro-batch, and weighs the losses by their tokens."""
        from solotune.algorithms.ppo import ppo_loss

        result = ppo_loss(
            logprobs,
            values,
            old_logprobs,
            old_values,
            advantages,
            returns,
            mask.bool(),
            cliprange=self.cliprange,
            cliprange_value=self.cliprange_value,
            vf_coef=self.vf_coef,
            denominator=mask.sum(),
        )
        stats = {LOSS_NAMES[name]: float(value.detach()) for name, value in result._asdict().items()}
        return result.loss, stats
