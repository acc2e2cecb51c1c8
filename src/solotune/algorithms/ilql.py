"""Implicit language Q-learning (Snell et al. 2022, arXiv:2206.11871): its losses and what it makes of rewards.

Shapes: N chosen tokens (actions) of all samples of a micro-batch, sample by sample, K Q heads, n samples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from solotune.algorithms.masks import ShapeError, check_mask, check_same_shape

SMALLEST_SPREAD = 1e-8
"""Rewards whose standard deviation is not above this share of the largest of them count as equal."""


class ILQLLoss(NamedTuple):
    """Scalars; each is a sum over actions divided by `denominator`, so those of a batch's micro-batches add up.

    loss: q_loss + v_loss + cql_scale * cql_loss + awac_scale * awac_loss; the only one that carries a gradient.
    q_loss: squared error of each Q head against r + gamma V(next), summed over the heads.
    v_loss: expectile loss of V against the smallest target Q.
    cql_loss: -log softmax(Q) of the chosen token, summed over the heads.
    awac_loss: -log pi of the chosen token, weighed by exp(beta * advantage).
    q, value: mean of the Q heads, mean of V. advantage: mean of the smallest target Q less V.
    """

    loss: Tensor
    q_loss: Tensor
    v_loss: Tensor
    cql_loss: Tensor
    awac_loss: Tensor
    q: Tensor
    value: Tensor
    advantage: Tensor


def ilql_loss(
    logprobs_N: Tensor,
    qs_KN: Tensor,
    target_qs_KN: Tensor,
    values_N: Tensor,
    cql: Tensor,
    rewards_N: Tensor,
    last_N: Tensor,
    mask_N: Tensor,
    *,
    tau: float,
    gamma: float,
    beta: float,
    cql_scale: float,
    awac_scale: float,
    denominator: float | Tensor,
) -> ILQLLoss:
    """The loss of ILQL as trlX has it.

    V is the tau-expectile of the target Qs (Kostrikov et al. 2021, arXiv:2110.06169, eq. 5), Q is learned from V, CQL
    keeps Q low where there is no data, AWAC keeps the policy near it.

    Args:
        logprobs_N: log pi of the actions, (N,).
        qs_KN, target_qs_KN: Q of the actions by each head and by its target, (K, N).
        values_N: V before each action.
        cql: sum over heads and the actions that count of -log softmax(Q), divided by the denominator; a scalar.
        rewards_N: of each action.
        last_N: True on a sample's last action, after which nothing comes: V(next) is 0 there. Elsewhere the next state
            is that of the next action, also across the other side's turns.
        mask_N: True on the actions that count, bool.
        tau, gamma: expectile and discount.
        beta: how much AWAC favours actions with an advantage.
        cql_scale, awac_scale: weights.
        denominator: actions that count in the whole batch, all micro-batches and processes; where gradients are
            averaged over P processes, that number divided by P.
    Raises:
        ShapeError: the shapes differ, or a mask is not bool.
    """
    check_same_shape(
        logprobs_N=logprobs_N, values_N=values_N, rewards_N=rewards_N, last_N=last_N, mask_N=mask_N, q_N=qs_KN[0]
    )
    check_same_shape(qs_KN=qs_KN, target_qs_KN=target_qs_KN)
    check_mask(mask_N)
    check_mask(last_N)

    def total(x: Tensor) -> Tensor:
        return torch.where(mask_N, x, 0).sum() / denominator

    next_values_N = torch.where(last_N, 0, values_N.roll(-1)).detach()
    q_loss = total((qs_KN - (rewards_N + gamma * next_values_N)).square())
    advantages_N = target_qs_KN.amin(0).detach() - values_N
    squares_N = advantages_N.square()
    v_loss = total(torch.where(advantages_N >= 0, tau * squares_N, (1 - tau) * squares_N))
    weights_N = (beta * advantages_N.detach()).exp()
    awac_loss = total(-logprobs_N * weights_N)
    return ILQLLoss(
        loss=q_loss + v_loss + cql_scale * cql + awac_scale * awac_loss,
        q_loss=q_loss.detach(),
        v_loss=v_loss.detach(),
        cql_loss=cql.detach(),
        awac_loss=awac_loss.detach(),
        q=total(qs_KN.detach().mean(0)),
        value=total(values_N.detach()),
        advantage=total(advantages_N.detach()),
    )


def normalised(rewards_n: Tensor) -> Tensor:
    """Rewards with mean 0 and (unbiased) standard deviation 1, as trlX normalises those of a data set; zeros where they
    are all equal, and nothing is to be told apart.

    Raises:
        ShapeError: not (n,).
    """
    if rewards_n.ndim != 1:
        raise ShapeError(f"rewards have shape {tuple(rewards_n.shape)}; pass (n,), one a sample")
    wide = rewards_n.double()
    spread = wide.std() if len(wide) > 1 else wide.new_zeros(())
    centred = wide - wide.mean()
    return (centred / spread if spread > SMALLEST_SPREAD * wide.abs().max() else torch.zeros_like(wide)).float()
