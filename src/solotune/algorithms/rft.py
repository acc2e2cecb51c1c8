"""Which of a prompt's samples rejection-sampling fine-tuning learns from.

Shapes: P prompts, G samples of each.
"""

from collections.abc import Hashable, Iterable
from typing import NamedTuple

from torch import Tensor

from solotune.algorithms.masks import ShapeError


class Selection(NamedTuple):
    """Samples that are good enough.

    is_selected_PG: bool.
    thresholds_P: the score that a sample of each prompt had to reach, float64.
    """

    is_selected_PG: Tensor
    thresholds_P: Tensor


def percentile_schedule(start: float, end: float, n_steps: int) -> list[float]:
    """The percentiles of a growth step's improvement steps: from `start` to `end` in equal steps, both included.

    A single step takes `start`. (trlX divides by the number of steps, and so never arrives at `end`.)

    Raises:
        ValueError: no steps, or 0 <= start <= end <= 1 does not hold.
    """
    if n_steps < 1 or not 0 <= start <= end <= 1:
        raise ValueError(
            f"start={start}, end={end}, n_steps={n_steps}: must be 0 <= start <= end <= 1 and n_steps >= 1"
        )
    return [start + (end - start) * step / max(n_steps - 1, 1) for step in range(n_steps)]


def select(scores_PG: Tensor, percentile: float, mean: float) -> Selection:
    """Samples whose score reaches their own prompt's percentile and is above the prompt's lowest score.

    A prompt's best sample is selected at every percentile. Where all scores of a prompt are equal, none of its samples
    is better than another: all of them are selected where they are above `mean`, so that what has been solved is not
    forgotten while the rest is learned, and none where they are not. (Dong et al. 2023, RAFT, arXiv:2304.06767, keep
    the best of each prompt, equal or not; Gulcehre et al. 2023, ReST, arXiv:2308.08998, section 3, raise the threshold
    from step to step. trlX keeps the prompts apart as well, and then moves the lowest threshold of all of them up by
    0.001 and the highest down, which keeps the solved and leaves the hopeless out too, but depends on the scores'
    scale.)

    Args:
        scores_PG: (P, G), float, all finite.
        percentile: 0 to 1; between two scores it is interpolated linearly.
        mean: of the scores of all prompts, those of other processes too.
    Raises:
        ShapeError: scores are not (P, G), or G is 0.
        ValueError: a score is not finite, or the percentile is not within 0 to 1.
    """
    if scores_PG.ndim != 2 or scores_PG.shape[1] == 0:
        raise ShapeError(f"scores have shape {tuple(scores_PG.shape)}; pass (P, G) with at least one sample a prompt")
    if not 0 <= percentile <= 1:
        raise ValueError(f"percentile={percentile}: it must be within 0 to 1")
    if not bool(scores_PG.isfinite().all()):
        raise ValueError("a score is not finite; every sample needs a finite score")
    wide_PG = scores_PG.double()
    thresholds_P = wide_PG.quantile(percentile, dim=1) if len(wide_PG) else wide_PG.new_zeros(0)
    lowest_P1, highest_P1 = wide_PG.amin(dim=1, keepdim=True), wide_PG.amax(dim=1, keepdim=True)
    rounding = 1e-9 * abs(mean)
    is_solved_P1 = (lowest_P1 == highest_P1) & (lowest_P1 > mean + rounding)
    is_better_PG = (wide_PG >= thresholds_P[:, None]) & (wide_PG > lowest_P1)
    return Selection(is_better_PG | is_solved_P1, thresholds_P)


def first_of_each(keys: Iterable[Hashable]) -> list[int]:
    """Positions of the first of each group of equal keys, in their order: what is left when duplicates are removed."""
    first: dict[Hashable, int] = {}
    for position, key in enumerate(keys):
        first.setdefault(key, position)
    return list(first.values())
