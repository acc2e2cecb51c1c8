"""trlX's small tools that scripts import."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum, StrEnum
from typing import Any

import torch
from accelerate.utils import send_to_device as to_device
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from solotune.config.values import nearest
from solotune.errors import ConfigError, MissingExtraError

__all__ = [
    "Clock",
    "OptimizerName",
    "SchedulerName",
    "get_optimizer_class",
    "get_scheduler_class",
    "infinite_dataloader",
    "print_rank_0",
    "set_seed",
    "significant",
    "to_device",
    "tree_map",
]


class OptimizerName(StrEnum):
    """Optimizers by trlX's names."""

    ADAM = "adam"
    ADAMW = "adamw"
    ADAM_8BIT_BNB = "adam_8bit_bnb"
    ADAMW_8BIT_BNB = "adamw_8bit_bnb"
    SGD = "sgd"


class SchedulerName(StrEnum):
    """Schedules by trlX's names."""

    COSINE_ANNEALING = "cosine_annealing"
    LINEAR = "linear"


def get_optimizer_class(name: OptimizerName | str) -> type[torch.optim.Optimizer]:
    """The optimizer class by trlX's name.

    Raises:
        ConfigError: there is none of that name. MissingExtraError: it is bitsandbytes'.
    """
    name = _known(name, OptimizerName)
    if "8bit" not in name:
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    try:
        from bitsandbytes import optim  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtraError(f"{name} needs bitsandbytes: pip install 'solotune[quant]'") from error
    return getattr(optim, "AdamW8bit" if name == "adamw_8bit_bnb" else "Adam8bit")


def get_scheduler_class(name: SchedulerName | str) -> type[LRScheduler]:
    """The schedule's class by trlX's name.

    Raises:
        ConfigError: there is none of that name.
    """
    return {"cosine_annealing": CosineAnnealingLR, "linear": LinearLR}[_known(name, SchedulerName)]


def _known(name: Any, names: type[Enum]) -> str:
    text = str(getattr(name, "value", name)).lower()
    known = [member.value for member in names]
    if text not in known:
        raise ConfigError(f"{text!r} is no {names.__name__.removesuffix('Name').lower()}; {nearest(text, known)}")
    return text


class Clock:
    """Seconds between ticks, and per 1,000 samples."""

    def __init__(self) -> None:
        self.start = time.time()
        self.total_time, self.total_samples = 0.0, 0

    def tick(self, samples: int = 0) -> float:
        """Seconds since the last tick; `samples` were done in them."""
        now = time.time()
        seconds, self.start = now - self.start, now
        if samples:
            self.total_time += seconds
            self.total_samples += samples
        return seconds

    def get_stat(self, n_samp: int = 1000, reset: bool = False) -> float:
        """Seconds for `n_samp` samples, on average since the start or the last reset."""
        stat = self.total_time / max(self.total_samples, 1) * n_samp
        if reset:
            self.total_time, self.total_samples = 0.0, 0
        return stat


def tree_map(f: Callable[[Any], Any], tree: Any) -> Any:
    """`f` of every leaf of nested dicts, lists and tuples."""
    if isinstance(tree, Mapping):
        return type(tree)((key, tree_map(f, value)) for key, value in tree.items())  # type: ignore[call-arg]
    if isinstance(tree, list | tuple):
        return type(tree)(tree_map(f, value) for value in tree)
    return f(tree)


def significant(x: Any, ndigits: int = 2) -> Any:
    """A number with one significant digit more than `ndigits` (trlX's rounding); anything else unchanged."""
    if isinstance(x, torch.Tensor):
        x = x.item()
    if not isinstance(x, (int, float)) or not math.isfinite(x) or x == 0:
        return x
    return round(x, ndigits - math.floor(math.log10(abs(x))))


def infinite_dataloader(dataloader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader, over and over."""
    while True:
        yield from dataloader


def print_rank_0(*message: Any) -> None:
    """Print from the first process only."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(*message)
