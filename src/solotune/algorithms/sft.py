"""The loss of supervised fine-tuning.

Shapes: N tokens to learn, of all rows of a micro-batch.
"""

import torch
from torch import Tensor

from solotune.algorithms.masks import check_mask, check_same_shape


def sft_loss(logprobs_N: Tensor, mask_N: Tensor, denominator: float | Tensor) -> Tensor:
    """Mean negative log-probability, nats a token.

    Args:
        logprobs_N: of the tokens to learn, (N,), float; carries the gradient.
        mask_N: True on those that count, bool.
        denominator: tokens that count in the whole batch, all micro-batches and processes; where gradients are averaged
            over P processes, that number divided by P. So the gradient does not depend on how a batch is cut.
    Returns:
        A scalar; those of a batch's micro-batches add up.
    Raises:
        ShapeError: the shapes differ, or the mask is not bool.
    """
    check_same_shape(logprobs_N=logprobs_N, mask_N=mask_N)
    check_mask(mask_N)
    return -torch.where(mask_N, logprobs_N, 0).sum() / denominator
