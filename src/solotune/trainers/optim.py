"""Optimizers and learning-rate schedules by trlX's names."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler

from solotune.errors import ConfigError, MissingExtraError, TrainingError
from solotune.runs.saved_state import is_like

if TYPE_CHECKING:
    from solotune.config import OptimizerConfig, SchedulerConfig

log = logging.getLogger("solotune")


def build_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> Optimizer:
    """The optimizer over the trained tensors.

    Raises:
        ConfigError: it does not take these arguments.
        MissingExtraError: an 8-bit optimizer without bitsandbytes.
    """
    name, kwargs = config.name.lower(), dict(config.kwargs)
    if "betas" in kwargs:
        kwargs["betas"] = tuple(kwargs["betas"])
    chosen = {"foreach", "differentiable"} & kwargs.keys()  # another implementation
    is_plain = all(p.is_cuda or (p.device.type == "cpu" and p.is_contiguous()) for p in parameters)
    fused = {"fused": True} if is_plain and not chosen else {}  # wrong, without an error, for strides on a CPU
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


class Stepper:
    """Takes optimizer steps: the gradient is clipped, and left out where it is not finite.

    Args:
        optimizer: as `accelerator.prepare` returned it.
        scheduler: stepped once an optimizer step.
        max_grad_norm: None does not clip.
        max_skipped: steps left out in a row after which the run is stopped.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        parameters: list[nn.Parameter],
        optimizer: AcceleratedOptimizer,
        scheduler: LRScheduler,
        max_grad_norm: float | None,
        max_skipped: int,
    ):
        self._accelerator, self._parameters = accelerator, parameters
        self._optimizer, self._scheduler = optimizer, scheduler
        self._max_grad_norm, self._max_skipped = max_grad_norm, max_skipped
        self.skipped_in_a_row = 0

    def step(self) -> Tensor:
        """One step with the gradient that is there, which is removed; returns its norm before clipping."""
        limit = self._max_grad_norm if self._max_grad_norm is not None else math.inf
        norm = torch.as_tensor(self._accelerator.clip_grad_norm_(self._parameters, limit))
        inner = self._optimizer.optimizer
        if norm.is_cuda and inner.defaults.get("fused"):
            inner.found_inf = (
                ~norm.isfinite()
            ).float()  # fused optimizers look at it themselves: the host need not wait
            self._optimizer.step()
        elif bool(norm.isfinite()):
            self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def count(self, taken: list[bool], keep_state: Callable[[], Path | None]) -> None:
        """Count the steps in a row, over rounds, whose gradient was not finite; after too many the run is stopped.

        Args:
            taken: of each step of a round, whether it was taken.
            keep_state: writes down what the failure can be understood by; returns the folder.
        Raises:
            TrainingError: `train.max_skipped_steps` of them.
        """
        most = 0
        for was_taken in taken:
            self.skipped_in_a_row = 0 if was_taken else self.skipped_in_a_row + 1
            most = max(most, self.skipped_in_a_row)
        if not all(taken):
            log.warning("%d steps were left out: their gradient was not finite", len(taken) - sum(taken))
        if most < self._max_skipped:
            return
        folder = keep_state()
        where = f"; statistics (and a round's rollouts) are in {folder}" if folder is not None else ""
        raise TrainingError(
            f"the gradient of {most} steps in a row was not finite (train.max_skipped_steps = {self._max_skipped})"
            f"{where}. Lower optimizer.kwargs.lr or look at the rewards; --resume goes on from the last checkpoint"
        )
