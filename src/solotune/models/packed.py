"""Frozen fp32 weights laid out anew for a CPU with AVX2 alone, where a product spends half of its time on doing so.

Every product with a weight first copies it, piece by piece, into the order its kernel reads. With few rows that takes
as long as the arithmetic: the head of a small model (49,152 tokens) multiplies 64 rows at 40 GFLOP/s on two cores of an
EPYC of the third generation, and at 105 where the weight lies in oneDNN's own order already; a block's matrices gain
1.1 to 1.5 times (`python benchmarks/packing.py`). A frozen weight never changes, so it is laid out once.

The copies are used within the passes of a `PolicyModel` alone: whoever calls the model, merges into it or saves it from
outside meets the plain weights.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.backends import mkldnn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from solotune.models.products import LEAST_COLUMNS, LEAST_WEIGHT

log = logging.getLogger("solotune")

MOST_BYTES = 2**30
"""Of all copies of a model. A constant, not a share of what is
free: a run's last bits are those of the library that multiplies."""

ROWS = 64
"""The copies are made for so many rows, and serve any number. Made for one they would be another kernel's, which adds
in another order."""


class _Packed(NamedTuple):
    weight: Tensor
    version: int  # of the weight when it was copied
    copy: Tensor


class PackedWeights(TorchFunctionMode):
    """While active, `linear` with one of these weights multiplies by its copy.

    Args:
        weights: in the order in which copies are made, as long as `MOST_BYTES` last.
    """

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self._packed: dict[int, _Packed] = {}
        left = MOST_BYTES
        for weight in weights:
            if id(weight) not in self._packed and weight.nbytes <= left:
                left -= weight.nbytes
                self._packed[id(weight)] = _pack(weight)

    def __len__(self) -> int:
        return len(self._packed)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is linear and not kwargs and len(args) >= 2:
            packed = self._packed.get(id(args[1]))
            if packed is not None and _suits(args[0], *args[2:]):
                if packed.version != packed.weight._version:
                    packed = self._packed[id(args[1])] = _pack(packed.weight)
                bias = args[2] if len(args) > 2 else None
                if torch.is_grad_enabled() and args[0].requires_grad:
                    return _PackedLinear.apply(args[0], packed.weight, bias, packed.copy)
                return _multiply(args[0], packed.copy, bias)
        return func(*args, **(kwargs or {}))


def packed_weights(model: nn.Module, head: nn.Module | None) -> contextlib.AbstractContextManager[PackedWeights | None]:
    """The context that a model's passes run in: its `PackedWeights` where this processor gains by them, else nothing.

    Args:
        model: whose frozen weights are copied, those of the last blocks first.
        head: the language model's head, copied before them.
    """
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if not on_cpu or not gains_by_packing():
        return contextlib.nullcontext()
    packed = PackedWeights(_frozen_weights([*([] if head is None else [head]), *reversed(list(model.modules()))]))
    return packed if len(packed) else contextlib.nullcontext()


@cache
def gains_by_packing() -> bool:
    """Whether this is a processor with AVX2 and no more, with a oneDNN that is exact and gives a row the same bits
    whatever rows are beside it; not where `torch.backends.mkldnn` is off or its fp32 products may be rounded."""
    setting: Any = mkldnn.matmul  # type: ignore[attr-defined]
    is_ours = mkldnn.is_available() and mkldnn.enabled and setting.fp32_precision == "none"
    if not is_ours or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return False
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.no_grad():
        return _is_exact()


def _is_exact() -> bool:
    numbers = torch.arange(2**16, dtype=torch.float32).view(256, 256)
    factors, waves, ones = 1 + numbers * 2.0**-23, numbers.sin(), torch.eye(256)
    try:
        keeps_bits = torch.equal(_multiply(factors, _pack(ones).copy, None), factors)
        copy = _pack(waves).copy
    except (RuntimeError, AttributeError):  # operators that torch has for its compiler: they may go
        return False
    every = _multiply(waves, copy, None)
    return keeps_bits and all(torch.equal(_multiply(waves[:rows], copy, None), every[:rows]) for rows in (1, 2, 7, 65))


def _frozen_weights(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    for module in modules:
        if isinstance(module, nn.Linear):
            weight, bias = module.weight, module.bias
            is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
            is_large = weight.numel() >= LEAST_WEIGHT and len(weight) >= LEAST_COLUMNS
            if is_frozen and is_large and weight.dtype == torch.float32 and weight.is_contiguous():
                yield weight


def _pack(weight: Tensor) -> _Packed:
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return _Packed(weight, weight._version, copy)


def _suits(x: Tensor, bias: Tensor | None = None) -> bool:
    is_plain = x.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
    return is_plain and x.numel() > 0 and not torch.is_autocast_enabled("cpu")


def _multiply(x: Tensor, copy: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")


class _PackedLinear(torch.autograd.Function):
    """`linear` with a frozen weight; the gradient of its input is a product with the plain weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, copy: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _multiply(x, copy, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight, None, None, None
