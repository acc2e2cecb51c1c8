"""What a checkpoint's `state.json` has to hold: a file from elsewhere is refused when it is read, not rounds later."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from solotune.runs.evaluation import Evaluation

Count = Annotated[int, Field(ge=0, le=2**53)]


class Untold(BaseModel):
    """A round whose evaluation failed: what `Trainer.tell` is called with again."""

    model_config = ConfigDict(extra="forbid", strict=True)

    metrics: dict[str, float | None]
    first_step: Count


class SavedState(BaseModel):
    """The part of every method; a method adds its own, which its `load_state` checks."""

    model_config = ConfigDict(extra="allow", strict=True)

    round: Count
    step: Count
    evaluated_step: Annotated[int, Field(ge=-1, le=2**53)]
    best_reward: float | None
    scheduler: dict[str, Any]
    first_evaluation: Evaluation | None
    last_evaluation: Evaluation | None
    data_order: dict[str, int]
    tokens_done: float
    seconds_by_phase: dict[str, float]
    skipped_in_a_row: Count
    untold: Untold | None


def check_state(content: Any) -> dict[str, Any]:
    """`content`, the parsed `state.json`.

    Raises:
        ValueError: a key is missing or has a value of another kind; says which.
    """
    try:
        state = SavedState.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"state.json, {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    if (state.first_evaluation is None) != (state.last_evaluation is None):
        raise ValueError("state.json has one evaluation without the other")
    return content


def is_like(saved: Any, own: Any) -> bool:
    """Whether a value is of the kind of the run's own: a finite number for a number, as many of them for a list."""
    if own is None or isinstance(own, bool):  # `fused` is None on a CPU and true on a GPU
        return saved is None or isinstance(saved, bool)
    if isinstance(own, str):
        return isinstance(saved, str)
    if isinstance(own, int | float):
        return isinstance(saved, int | float) and not isinstance(saved, bool) and abs(saved) < math.inf
    if isinstance(own, list | tuple):
        return (
            isinstance(saved, list | tuple)
            and len(saved) == len(own)
            and all(is_like(a, b) for a, b in zip(saved, own, strict=True))
        )
    return True
