"""From rewards and values to advantages.

Shapes: B rows of a batch, T response tokens, right-padded.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from solotune.algorithms.masks import AllReduce, check_response_mask, check_same_shape, masked_moments


class Advantages(NamedTuple):
    """advantages_BT and returns_BT = advantages_BT + values_BT, both (B, T), zero outside the mask, no gradient."""

    advantages_BT: Tensor
    returns_BT: Tensor


@torch.no_grad()
def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16).

    The value after a row's last token is 0: every response is a whole episode. trlX runs over the padded width
    instead, so that its last real token bootstraps from the value of a padding token.

    Args:
        rewards_BT: reward of each response token, (B, T), float.
        values_BT: V before that token was emitted, (B, T), float.
        mask_BT: True on response tokens, (B, T), bool; a row is a run of True followed by False, or all False.
        gamma: discount per token.
        lam: lambda; 0 is the one-step temporal difference, 1 the whole return minus the value.
    Returns:
        Advantages(advantages_BT, returns_BT), zero where the mask is False.
    Raises:
        ShapeError: the three shapes differ (all three are printed), or a mask row has a True after a False.
    """
    check_same_shape(rewards_BT=rewards_BT, values_BT=values_BT, mask_BT=mask_BT)
    check_response_mask(mask_BT)
    rewards_BT = torch.where(mask_BT, rewards_BT, 0)
    values_BT = torch.where(mask_BT, values_BT, 0)
    advantages_BT = torch.zeros_like(rewards_BT)
    # Rewards and values are 0 outside the mask, so a row carries zeros until its last token is reached.
    next_value_B = next_advantage_B = values_BT.new_zeros(values_BT.shape[0])
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = delta_B + gamma * lam * next_advantage_B
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = next_advantage_B
    return Advantages(advantages_BT, advantages_BT + values_BT)


@torch.no_grad()
def whiten(x_BT: Tensor, mask_BT: Tensor, all_reduce: AllReduce | None = None, eps: float = 1e-8) -> Tensor:
    """Shifts and scales the values under the mask to mean 0 and standard deviation 1 (biased variance).

    trlX takes its statistics over padding too; here they are those of the response tokens alone. A single value, or
    equal values, become zeros.

    Args:
        x_BT: values, (B, T) or any shape, float.
        mask_BT: True on response tokens, bool, of the same shape.
        all_reduce: sums a tensor over processes; the statistics are then those of all processes together.
        eps: added to the variance, as in trlX.
    Returns:
        Whitened values in x's dtype, zero where the mask is False.
    Raises:
        ShapeError: the shapes differ, or the mask is not bool.
    """
    moments = masked_moments(x_BT, mask_BT, all_reduce)
    whitened_BT = (x_BT.to(moments.mean.dtype) - moments.mean) * torch.rsqrt(moments.var + eps)
    return torch.where(mask_BT, whitened_BT, 0).to(x_BT.dtype)
