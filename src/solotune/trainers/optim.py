"""Optimizers and learning-rate schedules by trlX's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler

from solotune.errors import ConfigError, MissingExtraError
from solotune.trainers.saved_state import is_like

if TYPE_CHECKING:
    from solotune.config import OptimizerConfig, SchedulerConfig


def build_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> Optimizer:
    """The optimizer over the trained tensors.

    Raises:
        ConfigError: it does not take these arguments.
        MissingExtraError: an 8-bit optimizer without bitsandbytes.
    """
    name, kwargs = config.name.lower(), dict(config.kwargs)
    if "betas" in kwargs:
        kwargs["betas"] = tuple(kwargs["betas"])
    fused = {"fused": True} if parameters and parameters[0].is_cuda else {}
    try:
        if name in ("adam", "adamw"):
            return (torch.optim.AdamW if name == "adamw" else torch.optim.Adam)(parameters, **{**fused, **kwargs})
        if name == "sgd":
            return torch.optim.SGD(parameters, **kwargs)
        try:
            from bitsandbytes import optim  # type: ignore[import-not-found]
        except ImportError as error:
            raise MissingExtraError(
                f"optimizer.name {config.name!r} needs bitsandbytes: pip install 'solotune[quant]'"
            ) from error
        return getattr(optim, "AdamW8bit" if name == "adamw_8bit_bnb" else "Adam8bit")(parameters, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optimizer.kwargs {config.kwargs!r} do not fit optimizer.name {config.name!r}: {error}"
        ) from error


def build_scheduler(config: SchedulerConfig, optimizer: Optimizer) -> LRScheduler:
    """The schedule, stepped once an optimizer step.

    Raises:
        ConfigError: it does not take these arguments.
    """
    try:
        match config.name.lower():
            case "cosine_annealing":
                return CosineAnnealingLR(optimizer, **config.kwargs)
            case "linear":
                return LinearLR(optimizer, **config.kwargs)
            case _:
                return LambdaLR(optimizer, lambda step: 1.0)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"scheduler.kwargs {config.kwargs!r} do not fit scheduler.name {config.name!r}: {error}"
        ) from error


def load_scheduler(scheduler: LRScheduler, saved: dict[str, Any]) -> None:
    """Put a schedule where a checkpoint left it; torch itself would take any attribute from it.

    Raises:
        ValueError: it is that of another schedule.
    """
    own = scheduler.state_dict()
    for name, value in saved.items():
        if name not in own or not is_like(value, own[name]):
            raise ValueError(f"its schedule has {name} = {value!r}"[:200])
    scheduler.load_state_dict(saved)
