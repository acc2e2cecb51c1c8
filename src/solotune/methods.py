"""The settings of each algorithm: trlX's `method` section. `register_method` adds one of your own."""

import math
from collections.abc import Callable
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, overload

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from solotune.errors import ConfigError
from solotune.rollout.settings import KNOWN
from solotune.validation import (
    STRICT,
    CountInt,
    Flag,
    FreeDict,
    FreeKeyError,
    NonNegativeReal,
    PositiveInt,
    PositiveReal,
    Real,
    Section,
    UnitReal,
    nearest,
    real_number,
    shown,
    whole_number,
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
_METHODS: dict[str, type] = {}
C = TypeVar("C", bound=type)


@overload
def register_method(name: C) -> C: ...
@overload
def register_method(name: str) -> Callable[[C], C]: ...
def register_method(name: Any) -> Any:
    """Class decorator: makes a method config known by its class name, or by `@register_method("name")`; any case."""
    if isinstance(name, str):

        def register(cls: C) -> C:
            _METHODS[name.lower()] = cls
            return cls

        return register
    _METHODS[name.__name__.lower()] = name
    return name


def get_method(name: str) -> type:
    """The method config class registered under `name` (any case).

    Raises:
        ConfigError: nothing is registered under it.
    """
    if not isinstance(name, str) or name.lower() not in _METHODS:
        known = {key: cls.__name__ for key, cls in _METHODS.items()}
        hint = nearest(str(name), [cls if cls.lower() == key else key for key, cls in known.items()])
        raise ConfigError(f"method.name = {shown(name)}: no such method; {hint}")
    return _METHODS[name.lower()]


# ---- generation arguments -----------------------------------------------------------------------------------------

_GENERATION = {  # what the own sampler knows: converter, test, what is allowed
    "max_new_tokens": (whole_number, lambda v: v >= 1, "a whole number of at least 1"),
    "min_new_tokens": (whole_number, lambda v: v >= 0, "a whole number of at least 0"),
    "top_k": (whole_number, lambda v: v >= 0, "a whole number of at least 0 (0: off)"),
    "top_p": (real_number, lambda v: 0 < v <= 1, "a number above 0 and at most 1 (1: off)"),
    "temperature": (real_number, lambda v: 0 < v < float("inf"), "a number above 0 (for greedy: do_sample false)"),
    "do_sample": (lambda v: v, lambda v: isinstance(v, bool), "true or false"),
}
_Q_GENERATION = _GENERATION | {  # of ILQL's decoding
    "beta": (real_number, math.isfinite, "a number (0: the policy alone)"),
    "temperature": (real_number, lambda v: 0 <= v < float("inf"), "a number of at least 0 (0: greedy)"),
}
_Q_DEFAULTS = {"max_new_tokens": 32, "top_k": 20, "beta": 1.0, "temperature": 1.0}  # of trlX's generate


def _generation_value(name: str, value: Any, known: dict[str, Any]) -> Any:
    convert, allowed, wording = known[name]
    try:
        converted = convert(value)
        fits = allowed(converted)
    except ValueError:
        converted, fits = value, False
    if not fits:
        raise FreeKeyError(name, value, f"must be {wording}")
    return converted


def _generation(kwargs: Any, lists: bool, known: dict[str, Any] = _GENERATION) -> Any:
    """`kwargs` with what the own sampler knows checked and converted; the rest is generate's and stays as it is."""
    if not isinstance(kwargs, dict):
        return kwargs  # FreeDict says what is wrong
    checked = dict(kwargs)
    for name in known.keys() & kwargs.keys():
        value = kwargs[name]
        if value is None:  # generate's word for: not set
            continue
        if lists and isinstance(value, list | tuple):
            checked[name] = [_generation_value(name, item, known) for item in value]
        else:
            checked[name] = _generation_value(name, value, known)
    low, high = checked.get("min_new_tokens"), checked.get("max_new_tokens")
    if isinstance(low, int) and isinstance(high, int) and low > high:
        raise FreeKeyError("min_new_tokens", low, f"must be at most max_new_tokens, which is {high}")
    return checked


def _q_generation(kwargs: Any) -> Any:
    """ILQL's `gen_kwargs`; what is not given is what trlX's `generate` takes then."""
    checked = _generation(kwargs, lists=True, known=_Q_GENERATION)
    if not isinstance(checked, dict):
        return checked
    for name in checked:
        if name not in _Q_GENERATION and name not in KNOWN:
            raise FreeKeyError(name, checked[name], f"is not known to ILQL's decoding; {nearest(name, _Q_GENERATION)}")
    return {**_Q_DEFAULTS, **{name: value for name, value in checked.items() if value is not None}}


GenKwargs = Annotated[FreeDict, BeforeValidator(lambda kwargs: _generation(kwargs, lists=False))]
# A list stands for a sweep at evaluation, e.g. beta: [0, 1, 100].
QKwargs = Annotated[FreeDict, BeforeValidator(lambda kwargs: _q_generation(kwargs))]
SweepKwargs = Annotated[FreeDict, BeforeValidator(lambda kwargs: _generation(kwargs, lists=True))]


# ---- methods ------------------------------------------------------------------------------------------------------


@dataclass(config=STRICT)
class MethodConfig(Section):
    """Base of the method configs. `name` is what `get_method` finds the class by."""

    SECTION: ClassVar[str] = "method"
    HEADS: ClassVar[str] = "value"
    """What is learned beside the language model: a "value" head (and a frozen reference), "q" heads, or "none"."""

    name: str

    def check(self) -> None:
        registered = _METHODS.get(self.name.lower())
        if registered is not None and registered not in type(self).__mro__:
            raise ConfigError(
                f"method.name = {shown(self.name)}: names {registered.__name__}, this is {type(self).__name__}"
            )


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


@register_method
@dataclass(config=STRICT)
class ILQLConfig(MethodConfig):
    """Implicit language Q-learning; names and defaults are those of trlX's `default_ilql_config`.

    tau: expectile of the values. gamma: discount a token. cql_scale, awac_scale: weights of the terms that keep Q and
    the policy near the data. beta: how much the policy's term favours tokens with an advantage (0: not).
    steps_for_target_q_sync: optimizer steps after which the target heads move by alpha towards the Q heads.
    gen_kwargs: `beta` is the weight of the advantage in decoding; temperature 0 takes the most likely token.
    """

    HEADS: ClassVar[str] = "q"

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

    def check(self) -> None:
        super().check()
        for name in ("loss", "heads"):
            if hasattr(self, name):
                raise ConfigError(
                    f"{type(self).__name__}.{name} would never be called here: for a loss of your own override "
                    "losses in a subclass of AccelerateILQLTrainer"
                )


@register_method
@dataclass(config=STRICT)
class SFTConfig(MethodConfig):
    """Supervised fine-tuning; `gen_kwargs` are used at evaluation."""

    HEADS: ClassVar[str] = "none"

    name: str = "SFTConfig"
    gen_kwargs: SweepKwargs = field(
        default_factory=lambda: {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True}
    )


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

    def check(self) -> None:
        super().check()
        if self.start_percentile > self.end_percentile:
            raise ConfigError(
                f"method.start_percentile = {self.start_percentile}: must be at most method.end_percentile, "
                f"which is {self.end_percentile}"
            )
        if self.n_generations_per_prompt < 2:
            raise ConfigError("method.n_generations_per_prompt = 1: must be at least 2: the better ones are kept")
