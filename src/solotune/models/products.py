"""Which library multiplies: on a CPU fp32 matrices by oneDNN, where that is as exact as torch's own and faster; on a
GPU attention not by cuDNN, and fp32 matrices in TF32 beside a language model of 16 bits.

On a CPU torch multiplies fp32 matrices by MKL, which uses AVX-512 on Intel's alone: about 180 GFLOP/s on two cores of
an EPYC of the fifth generation (Zen 5), where oneDNN, which torch has too, reaches 390; 140 and 190 on the fourth's.
torch hands a product to oneDNN if it may round the factors to bf16; on a processor without matrix units for bf16 oneDNN
does not round. Whether it does, and whether a row's bits depend on the rows beside it, is tried before it is relied on.
Attention is left alone: its many small products are slower there.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.backends import mkldnn

log = logging.getLogger("solotune")

LEAST_WEIGHT = 2**16
"""Numbers of the second factor. How many rows meet it has no say, so that a row's result is that of a smaller batch to
the last bit."""
LEAST_COLUMNS = 8
"""Few columns are read faster than they are multiplied; MKL is better at them."""
SHAPES_KEPT = 128
"""oneDNN compiles a kernel for every shape, in 0.3 ms, and would keep 1,024 of them, a MB each."""

_setting: Any = mkldnn.matmul  # type: ignore[attr-defined]  # its fp32_precision: "none" is MKL
_is_tf32_ours = False
_kernels: list[torch.library.Library] = []  # a kernel lives as long as its library object


def use_fastest_products(device: str | torch.device) -> bool:
    """Let this process multiply by the kernels that are fast and exact on `device`.

    On a CPU large fp32 matrices go to oneDNN, if that is faster (on AMD's with AVX-512, Zen 4 and later: were it timed,
    the last bits of a run would depend on what else the machine does) and as exact. Not done where
    `torch.backends.mkldnn` is off, or its `matmul.fp32_precision` was set. While a product runs that setting is
    another, for all threads.

    On a GPU cuDNN's attention is switched off, which torch prefers on Hopper: with a mask it makes a plan for every
    width, and its gradient can be NaN (pytorch issue 196678, since torch 2.11).

    Returns:
        Whether anything is another than torch's choice now.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return kind == "cuda" or (kind == "cpu" and _replace_kernels())


def allow_tf32_beside(weights: Iterable[Tensor]) -> bool:
    """Let a GPU round products of fp32 matrices to TF32, if any of these frozen weights is there and not fp32; else not
    (any more).

    Adapters, critics and Q heads are fp32, and are given what 16-bit weights computed; TF32 has the bits for it. Not
    done where `torch.backends.cuda.matmul.fp32_precision` was set.

    Returns:
        Whether it does now.
    """
    global _is_tf32_ours
    setting: Any = torch.backends.cuda.matmul
    is_wanted = any(w.is_cuda and w.element_size() < 4 for w in weights)
    if is_wanted and setting.fp32_precision == "none":
        setting.allow_tf32 = _is_tf32_ours = True  # its older name: after the newer one, reading the older is an error
        log.info("fp32 products on the GPU are rounded to TF32; model.model_extra_configs.dtype: float32 avoids that")
    elif not is_wanted and _is_tf32_ours:  # of a model before this one
        setting.allow_tf32 = _is_tf32_ours = False
        setting.fp32_precision = "none"
    return bool(setting.fp32_precision == "tf32")


@cache
def _replace_kernels() -> bool:
    is_ours = mkldnn.is_available() and mkldnn.enabled and _setting.fp32_precision == "none"
    if not is_ours or not _is_slow_by_mkl(_cpuinfo()):
        return False
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
        os.environ.setdefault(name, str(SHAPES_KEPT))
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        if not _is_exact():
            return False
    kernels = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced
        kernels.impl("mm", _mm, "CPU")
        kernels.impl("addmm", _addmm, "CPU")
        kernels.impl("addmm_", _addmm_, "CPU")
    _kernels.append(kernels)
    log.info("fp32 products of matrices by oneDNN, which is faster on this processor than MKL")
    return True


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _product(torch.ops.aten.mm.out, a, b, out=a.new_empty(0))


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _product(torch.ops.aten.addmm.out, c, a, b, beta=beta, alpha=alpha, out=a.new_empty(0))


def _addmm_(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if a.ndim != 2 or b.ndim != 2 or c.shape != (a.shape[0], b.shape[1]):
        return c.copy_(_addmm(c, a, b, beta=beta, alpha=alpha))  # one of the two refuses
    return _product(torch.ops.aten.addmm.out, c, a, b, beta=beta, alpha=alpha, out=c)


def _product(kernel: Any, *operands: Tensor, **options: Any) -> Tensor:
    """By oneDNN what is large; odd shapes and types are left to torch's checks."""
    *_, a, b = operands
    is_large = (
        a.dtype == torch.float32
        and a.ndim == b.ndim == 2
        and b.numel() >= LEAST_WEIGHT
        and len(a) > 0
        and b.shape[1] >= LEAST_COLUMNS
    )
    if not is_large or _setting.fp32_precision != "none":
        return kernel(*operands, **options)
    with _by_onednn():
        if a.shape[0] == 1 and a.shape[1] == b.shape[0]:
            return _single_row(kernel, *operands, **options)
        return kernel(*operands, **options)


def _single_row(kernel: Any, *operands: Tensor, out: Tensor, **options: Any) -> Tensor:
    """The product of one row, by way of two: oneDNN's kernel for one is slower, and adds in another order."""
    *c, a, b = operands
    row = kernel(*c, a.repeat(2, 1), b, out=a.new_empty(0), **options)[:1]
    return out.copy_(row) if out.numel() else row


@contextmanager
def _by_onednn() -> Iterator[None]:
    _setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        _setting.fp32_precision = "none"


def _is_exact() -> bool:
    """Whether oneDNN keeps the 24 bits of fp32 (products with ones and zeros are the other factor), and a row comes out
    the same whatever rows are beside it (not in oneDNN 3.10, which came with torch 2.11)."""
    numbers = torch.arange(2**16, dtype=torch.float32).view(256, 256)
    factors, waves, ones = 1 + numbers * 2.0**-23, numbers.sin(), torch.eye(256, dtype=torch.float32)
    with _by_onednn():
        keeps_bits = torch.equal(factors @ ones, factors) and torch.equal(ones @ factors, factors)
        return keeps_bits and torch.equal((waves @ waves.T)[:2], waves[:2] @ waves.T)


def _is_slow_by_mkl(cpuinfo: str) -> bool:
    """Whether this is a processor whose AVX-512 MKL does not use."""
    first, *_ = cpuinfo.partition("\n\n")
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    return fields.get("vendor_id") == "AuthenticAMD" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _cpuinfo() -> str:
    """What Linux says of the processor; nothing elsewhere."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text()
    return ""
