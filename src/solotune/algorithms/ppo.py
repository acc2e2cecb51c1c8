"""The losses of proximal policy optimisation.

Shapes: B rows of a batch, T response tokens, right-padded. What is said of (B, T) holds for any one shape, such as (N,)
packed tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from solotune.algorithms.masks import AllReduce, check_mask, check_same_shape, masked_moments


class PPOLoss(NamedTuple):
    """Scalars; each is a sum over tokens divided by `denominator`, so those of a batch's micro-batches add up.

    loss: policy_loss + vf_coef * value_loss; the only one that carries a gradient.
    policy_loss, value_loss: the clipped surrogate (to be minimised), and half the clipped squared error.
    approx_kl: k3 estimate of the KL from the sampling policy to this one, (ratio - 1) - log ratio, nats per token.
    clipfrac: share of tokens whose ratio lies outside 1 +- cliprange.
    value_clipfrac: share of tokens for which the clipped value error was the larger one.
    ratio: mean of p / p_old.
    """

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    approx_kl: Tensor
    clipfrac: Tensor
    value_clipfrac: Tensor
    ratio: Tensor


def ppo_loss(
    logprobs_BT: Tensor,
    values_BT: Tensor,
    old_logprobs_BT: Tensor,
    old_values_BT: Tensor,
    advantages_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    cliprange: float,
    cliprange_value: float | None,
    vf_coef: float,
    denominator: float | Tensor,
) -> PPOLoss:
    """Clipped surrogate and clipped value loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7 and 9).

    The value clipping is that of OpenAI's baselines, which trlX and TRL follow. Sums are divided by a denominator that
    the caller counts over the whole batch: the gradient does not depend on how the batch is cut into micro-batches.

    Args:
        logprobs_BT, values_BT: of the model that is trained, (B, T), float; the gradient flows through these two.
        old_logprobs_BT, old_values_BT: as measured before the first update on these tokens.
        advantages_BT, returns_BT: of `gae`, the advantages whitened.
        mask_BT: True on the tokens to learn from, bool.
        cliprange: epsilon of the ratio's clip.
        cliprange_value: a value counts only as far as this from its old one; None does not clip.
        vf_coef: weight of the value loss.
        denominator: response tokens of the whole batch: all micro-batches and all processes. Where gradients are
            averaged over P processes (DDP), that number divided by P.
    Returns:
        PPOLoss, scalars in the dtype of the arguments.
    Raises:
        ShapeError: the shapes differ (all are printed), or the mask is not bool.
        ValueError: the denominator is not above 0.
    """
    tensors = {
        "logprobs_BT": logprobs_BT,
        "values_BT": values_BT,
        "old_logprobs_BT": old_logprobs_BT,
        "old_values_BT": old_values_BT,
        "advantages_BT": advantages_BT,
        "returns_BT": returns_BT,
    }
    check_same_shape(**tensors, mask_BT=mask_BT)
    check_mask(mask_BT)
    # A tensor on a GPU is not looked at: the host would wait for it.
    if not (isinstance(denominator, Tensor) and denominator.is_cuda) and not denominator > 0:
        raise ValueError(f"denominator={float(denominator)}: it must be the number of response tokens, above 0")
    # Taken under the mask before any arithmetic: NaN in padding would survive a product with 0, also in the gradient.
    logprobs, values, old_logprobs, old_values, advantages, returns = (
        torch.where(mask_BT, tensor, 0) for tensor in tensors.values()
    )

    def total(x_BT: Tensor) -> Tensor:
        return torch.where(mask_BT, x_BT, 0).sum() / denominator

    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - cliprange, 1 + cliprange)
    policy_loss = total(torch.maximum(-advantages * ratio, -advantages * clipped_ratio))

    error = (values - returns).square()
    clipped_error = error
    if cliprange_value is not None:
        clipped_values = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
        clipped_error = (clipped_values - returns).square()
    value_loss = 0.5 * total(torch.maximum(error, clipped_error))

    with torch.no_grad():
        approx_kl = total(torch.expm1(log_ratio) - log_ratio)
        clipfrac = total((ratio != clipped_ratio).to(ratio.dtype))
        value_clipfrac = total((clipped_error > error).to(error.dtype))
        mean_ratio = total(ratio)
    return PPOLoss(
        loss=policy_loss + vf_coef * value_loss,
        policy_loss=policy_loss.detach(),
        value_loss=value_loss.detach(),
        approx_kl=approx_kl,
        clipfrac=clipfrac,
        value_clipfrac=value_clipfrac,
        ratio=mean_ratio,
    )


@torch.no_grad()
def explained_variance(
    values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, all_reduce: AllReduce | None = None
) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the tokens under the mask (as in OpenAI's baselines).

    1 is a perfect critic, 0 one that is as good as a constant.

    Args:
        values_BT, returns_BT: (B, T), float.
        mask_BT: True on response tokens, (B, T), bool.
        all_reduce: sums a tensor over processes; the variances are then those of all processes together.
    Returns:
        A scalar; 0 where the returns do not vary, and nothing is to be explained.
    Raises:
        ShapeError: the shapes differ (all are printed), or the mask is not bool.
    """
    check_same_shape(values_BT=values_BT, returns_BT=returns_BT, mask_BT=mask_BT)
    spread = masked_moments(returns_BT, mask_BT, all_reduce).var
    unexplained = masked_moments(returns_BT - values_BT, mask_BT, all_reduce).var
    return torch.where(spread > 0, 1 - unexplained / spread, 0)
