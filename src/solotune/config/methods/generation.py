"""Generation arguments (`gen_kwargs`): what the own sampler knows of them is checked when it is read."""

import math
from typing import Annotated, Any

from pydantic import BeforeValidator

from solotune.config.values import FreeDict, FreeKeyError, nearest, real_number, whole_number
from solotune.rollout.settings import KNOWN

_GENERATION = {  # what the own sampler knows: converter, test, what is allowed
    "max_new_tokens": (whole_number, lambda v: v >= 1, "a whole number of at least 1"),
    "min_new_tokens": (whole_number, lambda v: v >= 0, "a whole number of at least 0"),
    "top_k": (whole_number, lambda v: v >= 0, "a whole number of at least 0 (0: off)"),
    "top_p": (real_number, lambda v: 0 < v <= 1, "a number above 0 and at most 1 (1: off)"),
    "temperature": (real_number, lambda v: 0 < v < float("inf"), "a number above 0 (for greedy: do_sample false)"),
    "do_sample": (lambda v: v, lambda v: isinstance(v, bool), "true or false"),
}
_Q_GENERATION = _GENERATION | {  # of ILQL's decoding
    "beta": (real_number, math.isfinite, "a number (0: the policy alone)"),
    "temperature": (real_number, lambda v: 0 <= v < float("inf"), "a number of at least 0 (0: greedy)"),
}
_Q_DEFAULTS = {"max_new_tokens": 32, "top_k": 20, "beta": 1.0, "temperature": 1.0}  # of trlX's generate


def _generation_value(name: str, value: Any, known: dict[str, Any]) -> Any:
    convert, allowed, wording = known[name]
    try:
        converted = convert(value)
        fits = allowed(converted)
    except ValueError:
        converted, fits = value, False
    if not fits:
        raise FreeKeyError(name, value, f"must be {wording}")
    return converted


def _generation(kwargs: Any, lists: bool, known: dict[str, Any] = _GENERATION) -> Any:
    """`kwargs` with what the own sampler knows checked and converted; the rest is generate's and stays as it is."""
    if not isinstance(kwargs, dict):
        return kwargs  # FreeDict says what is wrong
    checked = dict(kwargs)
    for name in known.keys() & kwargs.keys():
        value = kwargs[name]
        if value is None:  # generate's word for: not set
            continue
        if lists and isinstance(value, list | tuple):
            checked[name] = [_generation_value(name, item, known) for item in value]
        else:
            checked[name] = _generation_value(name, value, known)
    low, high = checked.get("min_new_tokens"), checked.get("max_new_tokens")
    if isinstance(low, int) and isinstance(high, int) and low > high:
        raise FreeKeyError("min_new_tokens", low, f"must be at most max_new_tokens, which is {high}")
    return checked


def _q_generation(kwargs: Any) -> Any:
    """ILQL's `gen_kwargs`; what is not given is what trlX's `generate` takes then."""
    checked = _generation(kwargs, lists=True, known=_Q_GENERATION)
    if not isinstance(checked, dict):
        return checked
    for name in checked:
        if name not in _Q_GENERATION and name not in KNOWN:
            raise FreeKeyError(name, checked[name], f"is not known to ILQL's decoding; {nearest(name, _Q_GENERATION)}")
    return {**_Q_DEFAULTS, **{name: value for name, value in checked.items() if value is not None}}


GenKwargs = Annotated[FreeDict, BeforeValidator(lambda kwargs: _generation(kwargs, lists=False))]
# A list stands for a sweep at evaluation, e.g. beta: [0, 1, 100].
QKwargs = Annotated[FreeDict, BeforeValidator(lambda kwargs: _q_generation(kwargs))]
SweepKwargs = Annotated[FreeDict, BeforeValidator(lambda kwargs: _generation(kwargs, lists=True))]
