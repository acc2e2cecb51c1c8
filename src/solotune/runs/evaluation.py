"""What is kept of an evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple


class Evaluation(NamedTuple):
    """One evaluation of all processes' samples.

    Args:
        reward: mean score of the samples that got one (dense scores summed); None where none did.
        kl: mean KL to the reference, nats per response; None where there is no reference.
        samples: a row for `samples.jsonl` per sample, in the order of the prompts.
        metrics: means of what `metric_fn` returned.
    """

    reward: float | None
    kl: float | None
    samples: list[dict[str, Any]]
    metrics: dict[str, float]
