"""How far the policy has moved from its reference, and what that costs.

Shapes: B rows of a batch, T response tokens, right-padded. All KL values are in nats.
"""

import math
from typing import Any

import torch
from torch import Tensor

from solotune.algorithms.masks import check_mask, check_same_shape


def k1(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log p - log p_ref of each sampled token: the unbiased estimate "k1" of the KL from policy to reference.

    (http://joschu.net/blog/kl-approx.html; Ziegler et al. 2019, arXiv:1909.08593, eq. 2.) A single value may be
    negative.

    Args:
        logprobs_BT, ref_logprobs_BT: log-probabilities of the sampled tokens, (B, T), float, nats.
        mask_BT: True on response tokens, (B, T), bool.
    Returns:
        (B, T), zero where the mask is False.
    Raises:
        ShapeError: the shapes differ (all are printed), or the mask is not bool.
    """
    check_same_shape(logprobs_BT=logprobs_BT, ref_logprobs_BT=ref_logprobs_BT, mask_BT=mask_BT)
    check_mask(mask_BT)
    return torch.where(mask_BT, logprobs_BT - ref_logprobs_BT, 0)


def response_kl(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The k1 estimate of each response, (B,): its tokens' k1 summed. Arguments and errors as in k1."""
    return k1(logprobs_BT, ref_logprobs_BT, mask_BT).sum(dim=1)


class FixedKLController:
    """A KL coefficient that stays as it was given; it has the methods of AdaptiveKLController.

    Raises:
        ValueError: the coefficient is negative or not finite.
    """

    def __init__(self, coef: float) -> None:
        self.value = _checked_coef(coef)

    def update(self, kl: float, n: int) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = _checked_coef(state["value"])


class AdaptiveKLController:
    """A KL coefficient that is steered towards a target KL (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    After n rollouts with mean response KL ``kl`` the coefficient is multiplied by ``1 + e * n / horizon``, with
    ``e = kl / target - 1`` clipped to [-0.2, 0.2].

    Args:
        coef: the coefficient at the start, > 0.
        target: the KL aimed for, nats per response, > 0.
        horizon: the number of rollouts over which the coefficient can change by about 20 %, > 0.
    Raises:
        ValueError: a value outside its range.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        for name, number in (("coef", coef), ("target", target), ("horizon", horizon)):
            if not (math.isfinite(number) and number > 0):
                raise ValueError(
                    f"{name}={number}: the adaptive KL controller needs a finite number above 0 "
                    "(for a coefficient that does not move, use FixedKLController)"
                )
        self.value = float(coef)
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, kl: float, n: int) -> None:
        """Moves the coefficient once, after a round.

        Args:
            kl: mean over the round's responses of response_kl, nats.
            n: number of rollouts of the round, over all processes.
        Raises:
            ValueError: kl is not finite, or n is so large against the horizon (5 times) that the coefficient could
                turn negative.
        """
        if not math.isfinite(kl):
            raise ValueError(
                f"kl={kl}: the KL of a round must be finite; check the policy's and the reference's log-probs"
            )
        if not 0 <= n < 5 * self.horizon:
            raise ValueError(
                f"n={n} rollouts with horizon={self.horizon:g}: a step could make the KL coefficient negative; n must "
                "be at least 0 and below 5 * horizon: raise the horizon"
            )
        error = max(-0.2, min(0.2, kl / self.target - 1.0))
        self.value *= 1.0 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """The coefficient as it stands; target and horizon are the configuration's."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = _checked_coef(state["value"])


KLController = FixedKLController | AdaptiveKLController


def _checked_coef(coef: float) -> float:
    if not (math.isfinite(coef) and coef >= 0):
        raise ValueError(f"KL coefficient {coef}: it must be a finite number, 0 or above")
    return float(coef)
