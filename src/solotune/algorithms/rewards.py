"""From a reward function's scores to one reward a token.

Shapes: B rows of a batch, T response tokens, right-padded. Scores are one number a response, (B,), or "dense": one
number a token, (B, T).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solotune.algorithms.masks import AllReduce, ShapeError, check_response_mask, check_same_shape, masked_moments

SMALLEST_STD = 1e-8
"""Scores whose standard deviation is not above this are left unscaled: dividing equal scores by it would explode."""


class RunningMoments:
    """Mean and standard deviation of all values seen so far, merged batch by batch.

    The parallel update of Chan et al. 1979 ("Updating formulae and a pairwise algorithm for computing sample
    variances"), as in trlX; sums in float64.

    Args:
        all_reduce: sums a tensor over processes; every process then holds the moments of all processes' values.
    Attributes:
        mean: 0.0 before the first value.
        std: unbiased; 1.0 until two values were seen.
        count: number of values.
    """

    def __init__(self, all_reduce: AllReduce | None = None) -> None:
        self._all_reduce = all_reduce
        self.mean = 0.0
        self.count = 0
        self._squares = 0.0  # sum of squared deviations from the mean

    @property
    def std(self) -> float:
        return _unbiased_std(self._squares, self.count) if self.count > 1 else 1.0

    def update(self, x_B: Tensor) -> tuple[float, float]:
        """Takes a batch in.

        Args:
            x_B: values, (B,), float; may be empty.
        Returns:
            mean and unbiased standard deviation of this batch alone (of all processes); 0.0 where undefined.
        Raises:
            ValueError: a value is NaN or infinite (nothing is taken in).
        """
        batch = masked_moments(x_B, torch.ones_like(x_B, dtype=torch.bool), self._all_reduce)
        mean, count = float(batch.mean), round(float(batch.n))
        squares = float(batch.var) * count
        if not (math.isfinite(mean) and math.isfinite(squares)):
            raise ValueError(f"a batch of {count} scores has mean {mean}; every score must be a finite number")
        total = self.count + count
        if count:
            delta = mean - self.mean
            self._squares += squares + delta**2 * self.count * count / total
            self.mean += delta * count / total
            self.count = total
        return mean, _unbiased_std(squares, count)

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "squares": self._squares, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mean, squares, count = float(state["mean"]), float(state["squares"]), int(state["count"])
        if not (math.isfinite(mean) and 0 <= squares < math.inf and count >= 0):
            raise ValueError(f"moments with mean {mean}, squares {squares}, count {count}: these cannot be of scores")
        self.mean, self._squares, self.count = mean, squares, count


class ScaledScores(NamedTuple):
    """Scores to train on, and what they were scaled by.

    scores: as given, (B,) or (B, T), float, clipped and scaled; dense ones are zero outside the mask.
    mean, std: of the clipped, unscaled score of a response, over this batch (of all processes).
    ref_std: the one given, else this batch's std; None while no batch had scores that differ. Hand it in next time.
    """

    scores: Tensor
    mean: float
    std: float
    ref_std: float | None


def scale_and_clip(
    scores: Tensor,
    *,
    scale_reward: str | None,
    moments: RunningMoments,
    ref_std: float | None = None,
    cliprange: float | None = None,
    mask_BT: Tensor | None = None,
) -> ScaledScores:
    """Clips scores, takes them into the running moments, scales them: in trlX's order, and without shifting them.

    Args:
        scores: (B,), or dense (B, T), float.
        scale_reward: "running" divides by the standard deviation of all responses so far, this batch included; "ref"
            by ref_std; None (trlX: "ignored") by nothing. Scores that do not differ are never scaled.
        moments: taken further by this batch, whatever the mode; a dense row counts as its sum.
        ref_std: standard deviation of the reference's scores; None takes that of this (the first) batch.
        cliprange: scores are clipped to [-cliprange, cliprange] first; None or 0 does not clip.
        mask_BT: True on response tokens, (B, T), bool; required for dense scores, not used for scalar ones.
    Returns:
        ScaledScores(scores, mean, std, ref_std).
    Raises:
        ShapeError: scores are neither (B,) nor (B, T), or dense ones come without a mask of their shape.
        ValueError: an unknown scale_reward, a negative cliprange, a ref_std not above 0, or a score that is not finite.
    """
    if scale_reward not in ("running", "ref", "ignored", None):
        raise ValueError(f"scale_reward={scale_reward!r}: it must be 'running', 'ref', or None")
    if cliprange and not cliprange > 0:
        raise ValueError(f"cliprange={cliprange}: it must be above 0, or None for no clipping")
    if ref_std is not None and not (math.isfinite(ref_std) and ref_std > 0):
        raise ValueError(f"ref_std={ref_std}: it must be a finite number above 0, or None to take the first batch's")
    scores = _masked_scores(scores, mask_BT)
    if cliprange:
        scores = scores.clamp(-cliprange, cliprange)
    mean, std = moments.update(scores if scores.ndim == 1 else scores.sum(dim=1))
    if ref_std is None and std > SMALLEST_STD:
        ref_std = std
    divisor = {"running": moments.std, "ref": ref_std}.get(scale_reward or "ignored")
    if divisor is not None and divisor > SMALLEST_STD:
        scores = scores / divisor
    return ScaledScores(scores, mean, std, ref_std)


def token_rewards(scores: Tensor, kl_BT: Tensor, kl_coef: float, mask_BT: Tensor) -> Tensor:
    """The reward of each token: minus the KL penalty, plus the score (Ziegler et al. 2019, arXiv:1909.08593, eq. 2).

    A response's single score is the reward of its last token. (trlX puts it one or two positions behind, where the
    loss does not look, and lets GAE bring it back.)

    Args:
        scores: (B,), or dense (B, T): entry t is the score of response token t. What lies outside the mask is not
            read, so a list longer than its response has to be refused before it is made into a tensor.
        kl_BT: k1 of each token, (B, T), float, nats.
        kl_coef: reward lost per nat.
        mask_BT: True on response tokens, (B, T), bool; a row is a run of True followed by False. A row that is all
            False has no token to put a score on and gets zeros.
    Returns:
        (B, T), float, zero where the mask is False.
    Raises:
        ShapeError: shapes that do not fit each other, or a mask row with a True after a False.
    """
    check_same_shape(kl_BT=kl_BT, mask_BT=mask_BT)
    check_response_mask(mask_BT)
    if scores.ndim == 1:
        if len(scores) != len(mask_BT):
            raise ShapeError(f"{len(scores)} scores for a mask of shape {tuple(mask_BT.shape)}; pass one score per row")
        where_BT = mask_BT.clone()
        where_BT[:, :-1] &= ~mask_BT[:, 1:]
        scores_BT = torch.where(where_BT, scores[:, None], 0)
    else:
        scores_BT = _masked_scores(scores, mask_BT)
    return torch.where(mask_BT, -kl_coef * kl_BT, 0) + scores_BT


def _masked_scores(scores: Tensor, mask_BT: Tensor | None) -> Tensor:
    if scores.ndim == 1:
        return scores
    if scores.ndim != 2 or mask_BT is None:
        given = "no mask" if mask_BT is None else f"a mask of shape {tuple(mask_BT.shape)}"
        raise ShapeError(
            f"scores have shape {tuple(scores.shape)}, with {given}; pass (B,), or (B, T) with a mask of that shape"
        )
    check_same_shape(scores=scores, mask_BT=mask_BT)
    return torch.where(mask_BT, scores, 0)


def _unbiased_std(squares: float, count: int) -> float:
    return math.sqrt(squares / (count - 1)) if count > 1 else 0.0
