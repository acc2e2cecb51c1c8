"""What the algorithms share: checks of shapes and masks, and statistics over the tokens a mask selects.

Shapes: B rows of a batch, T response tokens. A mask is bool and True on response tokens. What stands outside a mask
is never read: it may be anything, NaN included.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Returns the sum of a tensor over all processes, e.g. ``lambda t: accelerator.reduce(t, "sum")``."""


class ShapeError(ValueError):
    """Tensors that must have the same shape differ, or a mask is not what the function works on."""


class Moments(NamedTuple):
    """Mean, biased variance and number n of the selected values: three scalar tensors, float64 (float32 on MPS)."""

    mean: Tensor
    var: Tensor
    n: Tensor


def check_same_shape(**tensors: Tensor) -> None:
    """Raises ShapeError, naming every tensor with its shape, unless all shapes are equal."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ShapeError(f"shapes differ: {listed}; pass tensors of one shape")


def check_mask(mask: Tensor) -> None:
    """Raises ShapeError unless the mask is a bool tensor (an integer mask would index instead of select)."""
    if mask.dtype != torch.bool:
        raise ShapeError(f"the mask has dtype {mask.dtype}; pass a torch.bool mask, e.g. mask.bool()")


def check_response_mask(mask_BT: Tensor) -> None:
    """Raises ShapeError unless the mask is (B, T), bool, and each row a run of True followed by False."""
    check_mask(mask_BT)
    if mask_BT.ndim != 2:
        raise ShapeError(f"the mask has shape {tuple(mask_BT.shape)}; it must be (B, T)")
    broken_B = (mask_BT[:, 1:] & ~mask_BT[:, :-1]).any(dim=1)
    if broken_B.any():
        row = int(broken_B.nonzero()[0])
        raise ShapeError(
            f"row {row} of the mask has a True after a False; response tokens must be a run of True followed by False "
            "(pad responses on the right, and leave the prompt out)"
        )


def masked_moments(x: Tensor, mask: Tensor, all_reduce: AllReduce | None = None) -> Moments:
    """Mean and biased variance of the values under a mask, in two passes, in float64.

    Args:
        x: values of any shape, float.
        mask: True on the values that count, bool, of x's shape.
        all_reduce: sums a tensor over processes; the moments are then those of all processes' values together.
    Returns:
        Moments(mean, var, n); mean and var are 0 where the mask selects nothing.
    Raises:
        ShapeError: the shapes differ, or the mask is not bool.
    """
    check_same_shape(x=x, mask=mask)
    check_mask(mask)
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    reduce = all_reduce or (lambda tensor: tensor)
    selected = torch.where(mask, x, 0).to(wide)
    total, n = reduce(torch.stack([selected.sum(), mask.sum().to(wide)])).unbind()
    mean = total / n.clamp(min=1)
    squares = reduce(torch.where(mask, selected - mean, 0).square().sum())
    return Moments(mean, squares / n.clamp(min=1), n)


def masked_mean(x: Tensor, mask: Tensor, all_reduce: AllReduce | None = None) -> Tensor:
    """Mean of the values under a mask, a scalar tensor; 0 where it selects nothing. Arguments as masked_moments."""
    return masked_moments(x, mask, all_reduce).mean
