"""Products of fp32 matrices on a CPU by oneDNN, where that is as exact as torch's own and faster.

torch multiplies fp32 matrices by MKL, which leaves much of a processor idle that is not Intel's: about 180 GFLOP/s on
two cores of an EPYC with AVX-512, where oneDNN, which torch has too, reaches 390. torch hands a product to oneDNN if it
may round the factors to bf16; on a processor without matrix units for bf16 oneDNN does not round. Whether it does, and
how fast it is, is tried before it is relied on. Attention is left alone: its many small products are slower there.
"""

from __future__ import annotations

import logging
import time
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.backends import mkldnn

log = logging.getLogger("solotune")

LEAST_GAIN = 1.3
"""Below it nothing changes, so that the choice does not depend on what else the machine is doing."""
LEAST_MULTIPLICATIONS = 2**21
"""Smaller products are faster by MKL."""

_kernels: list[torch.library.Library] = []  # a kernel lives as long as its library object


def use_fastest_products(device: str | torch.device) -> bool:
    """Let this process multiply large fp32 matrices by oneDNN, if `device` is the CPU and that is as exact and faster.

    It is tried once, in 50 ms. Not done where `torch.backends.mkldnn` is off, or its `matmul.fp32_precision` was set.

    Returns:
        Whether it does now.
    """
    return torch.device(device).type == "cpu" and _replace_kernels()


@cache
def _replace_kernels() -> bool:
    if not (mkldnn.is_available() and mkldnn.enabled and _precision() == "none"):
        return False
    if not _is_exact() or (gain := _gain()) < LEAST_GAIN:
        return False
    kernels = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced
        kernels.impl("mm", _mm, "CPU")
        kernels.impl("addmm", _addmm, "CPU")
        kernels.impl("addmm_", _addmm_, "CPU")
    _kernels.append(kernels)
    log.info("fp32 products of matrices by oneDNN: %.1f times as fast here as by MKL", gain)
    return True


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _product(torch.ops.aten.mm.out, a, b, out=a.new_empty(0))


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _product(torch.ops.aten.addmm.out, c, a, b, beta=beta, alpha=alpha, out=a.new_empty(0))


def _addmm_(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _product(torch.ops.aten.addmm.out, c, a, b, beta=beta, alpha=alpha, out=c)


def _product(kernel: Any, *operands: Tensor, **options: Any) -> Tensor:
    """By oneDNN what is large; odd shapes and types are left to torch's checks."""
    *_, a, b = operands
    is_large = a.dtype == torch.float32 and a.ndim == b.ndim == 2 and a.numel() * b.shape[1] >= LEAST_MULTIPLICATIONS
    if not is_large or _precision() != "none":
        return kernel(*operands, **options)
    _allow("bf16")
    try:
        return kernel(*operands, **options)
    finally:
        _allow("none")


def _precision() -> str | None:
    """What torch lets oneDNN do to factors of fp32; "none" is its default: they go to MKL. None before torch 2.9."""
    return getattr(getattr(mkldnn, "matmul", None), "fp32_precision", None)


def _allow(precision: str) -> None:
    mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]


def _is_exact() -> bool:
    """Whether oneDNN keeps the 24 bits of fp32: products with ones and zeros are the other factor, bit by bit."""
    factors = torch.linspace(1, 2, 2**16).view(256, 256)
    _allow("bf16")
    try:
        return torch.equal(factors @ torch.eye(256), factors)
    finally:
        _allow("none")


def _gain() -> float:
    """How many times as fast oneDNN is as MKL, at a product that both take a millisecond for."""
    a, b = torch.ones(256, 768), torch.ones(768, 512)
    seconds = {"none": [], "bf16": []}  # taken in turn, the shortest counts: what others do only makes it longer
    for _ in range(10):
        for precision, taken in seconds.items():
            _allow(precision)
            start = time.perf_counter()
            torch.mm(a, b)
            taken.append(time.perf_counter() - start)
    _allow("none")
    return min(seconds["none"]) / min(seconds["bf16"])
