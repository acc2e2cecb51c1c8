"""Reading a tensor's numbers: on a GPU the host waits there, and a step that is being captured breaks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_OPERATORS = {
    torch.ops.aten._local_scalar_dense.default,  # item, bool, int, float
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.unique}  # which dispatch nothing on a CPU


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func in _INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1])
        if func in _OPERATORS or by_mask:
            self._found.append(str(func))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS:
            self._found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def reads_of(work: Callable[[], Any]) -> list[str]:
    """The operators and methods by which `work` reads numbers of tensors."""
    found: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(_Methods(found))
        stack.enter_context(_Operators(found))
        work()
    return found
