"""Cross-entropy of a linear layer over a vocabulary, without the logits of all tokens at once.

Shapes: N tokens, I inputs of the layer, V vocabulary, c tokens of a chunk.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solotune.algorithms.logprobs import rows_of_chunk
from solotune.algorithms.masks import ShapeError


def linear_cross_entropy(
    inputs_NI: Tensor,
    weight_VI: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
    copies_of_last: int = 1,
) -> Tensor:
    """sum over n of weights_n * -log softmax(W x_n + b)[target_n].

    The weights are known before the backward pass, so the gradients by inputs, weight and bias are taken chunk by chunk
    in the forward pass (as Liger does for a mean, arXiv:2410.10989, section 3.2) and the backward pass scales them:
    three matrix products with the vocabulary, where recomputing the logits takes four.

    Args:
        inputs_NI: (N, I), float.
        weight_VI, bias_V: of the layer; gradients reach these two and the inputs.
        targets_N: token ids, int64.
        weights_N: of each token's term, float, without gradient; 0 leaves it out.
        chunk: rows of logits at a time; None takes what suits the device.
        dtype: of the three products with the vocabulary; the rest stays as it is. None: that of the inputs.
        copies_of_last: the last row stands for this many equal ones, and its gradient is that of one of them. With
            more than one no target may be that row.
    Returns:
        A scalar. Differentiable once.
    Raises:
        ShapeError: inputs are not (N, I), or targets or weights not (N,).
    """
    if inputs_NI.ndim != 2 or not targets_N.shape == weights_N.shape == inputs_NI.shape[:1]:
        raise ShapeError(
            f"inputs_NI {tuple(inputs_NI.shape)}, targets_N {tuple(targets_N.shape)}, weights_N "
            f"{tuple(weights_N.shape)}; pass (N, I), (N,) and (N,)"
        )
    if chunk is None:
        chunk = rows_of_chunk(len(weight_VI), inputs_NI.device)
    return _LinearCrossEntropy.apply(
        inputs_NI, weight_VI, bias_V, targets_N, weights_N, chunk, dtype or inputs_NI.dtype, copies_of_last
    )  # type: ignore[return-value]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs_NI: Tensor,
        weight_VI: Tensor,
        bias_V: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        chunk: int,
        dtype: torch.dtype,
        copies_of_last: int,
    ) -> Tensor:
        wants = ctx.needs_input_grad
        d_inputs = torch.zeros_like(inputs_NI) if wants[0] else None
        d_weight = torch.zeros_like(weight_VI) if wants[1] else None
        d_bias = torch.zeros_like(bias_V) if wants[2] else None
        total, narrow_VI = inputs_NI.new_zeros(()), weight_VI.to(dtype)
        for first in range(0, len(inputs_NI), chunk):
            rows = slice(first, first + chunk)
            inputs_cI, targets_c1, weights_c1 = inputs_NI[rows].to(dtype), targets_N[rows, None], weights_N[rows, None]
            logits_cV = (inputs_cI @ narrow_VI.T).to(bias_V.dtype).add_(bias_V)
            chosen_c1 = logits_cV.gather(1, targets_c1)
            if copies_of_last > 1:
                logits_cV[:, -1] += math.log(copies_of_last)
            largest_c1 = logits_cV.amax(1, keepdim=True)
            slopes_cV = logits_cV.sub_(largest_c1).exp_()
            sums_c1 = slopes_cV.sum(1, keepdim=True)
            total += (weights_c1 * (sums_c1.log() + largest_c1 - chosen_c1)).sum()
            slopes_cV.mul_(weights_c1 / sums_c1).scatter_add_(1, targets_c1, -weights_c1)
            if d_bias is not None:
                d_bias += slopes_cV.sum(0)
            slopes_cV = slopes_cV.to(dtype)
            if d_inputs is not None:
                d_inputs[rows] = (slopes_cV @ narrow_VI).to(d_inputs.dtype)
            if d_weight is not None:
                if dtype == d_weight.dtype:
                    d_weight.addmm_(slopes_cV.T, inputs_cI)
                else:
                    d_weight += slopes_cV.T @ inputs_cI
        if copies_of_last > 1:
            for slopes in (d_weight, d_bias):
                if slopes is not None:
                    slopes[-1] /= copies_of_last
        ctx.save_for_backward(d_inputs, d_weight, d_bias)
        return total

    @staticmethod
    @once_differentiable  # which hides the signature from pyright
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        scaled = (None if slope is None else slope * grads[0] for slope in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)
