"""How single settings are checked: human numbers, unknown names with the nearest known one, values of any depth."""

import difflib
import numbers
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool

from solotune.errors import ConfigError

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

# What YAML 1.1 takes for a string and people mean as a number: 1e-4, 2.5E3, -1e6.
EXPONENT_NUMBER = re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$")


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean X?' where one of `known` is close to `name`, else the list of what is known."""
    known = sorted(known)
    lowered = {other.lower(): other for other in reversed(known)}
    same_end_or_start = sorted((k for k in known if k.endswith(f".{name}") or k.startswith(name)), key=len)
    match = same_end_or_start or [lowered[m] for m in difflib.get_close_matches(name.lower(), lowered, n=1)]
    return f"did you mean {match[0]}?" if match else f"known: {', '.join(known)}"


def shown(value: object) -> str:
    """A value as it is quoted in an error: at most about 80 characters."""
    short = _Short()
    short.maxstring = short.maxother = 80
    return short.repr(value)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return f"a number of {x.bit_length()} bits" if x.bit_length() > _MOST_BITS else super().repr_int(x, level)


def is_unicode(text: str) -> bool:
    """Whether it can be written: JSON's `\\ud800` makes half a surrogate pair, which no tokenizer and no file takes."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def number(value: Any) -> Any:
    """`value` as a float where it is an exponent number that YAML 1.1 left a string, else unchanged."""
    return float(value) if isinstance(value, str) and EXPONENT_NUMBER.match(value) else value


def whole_number(value: Any) -> int:
    """`value` as an int; 2.0 and '1e4' are whole numbers, True and 2.5 are not."""
    value = number(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not _as_float(value).is_integer():
        raise ValueError("must be a whole number")
    return value if isinstance(value, int) else int(float(value))


def real_number(value: Any) -> float:
    """`value` as a float; ints and '1e-4' are numbers, True and '0.1' are not."""
    value = number(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError("must be a number")
    return _as_float(value)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError("must be a number that a float can hold") from None


def own_copy(value: Any) -> Any:
    """A copy of nested dicts and lists (tuples become lists, as YAML has none); other objects are shared.

    Raises:
        ConfigError: see `check_values`.
    """
    check_values(value)
    return _copied(value)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value


_MOST_LEVELS, _MOST_VALUES, _MOST_BITS = 60, 20_000_000, 1024


def check_values(value: Any) -> None:
    """That nested dicts and lists can be walked and written: YAML's aliases make lists that hold themselves, and a few
    lines of them stand for more values than any memory holds.

    Raises:
        ConfigError: too deep or too many, a text that is no Unicode, or a number that not even a float holds.
    """
    _measure(value, 0, {})


def _measure(value: Any, level: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values there are with every alias written out, and how many levels below this one."""
    if isinstance(value, str):
        if not is_unicode(value):
            raise ConfigError(f"{shown(value)} is no text: it holds half of a surrogate pair")
        return 1, 0
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ConfigError(f"{shown(value)} is more than any setting takes")
    if not isinstance(value, Mapping | list | tuple):
        return 1, 0
    count, depth = known.get(id(value), (0, 0))
    if count == 0 and level <= _MOST_LEVELS:
        items = [*value, *value.values()] if isinstance(value, Mapping) else value
        measured = [_measure(item, level + 1, known) for item in items]
        count = 1 + sum(count for count, _ in measured)
        depth = 1 + max((depth for _, depth in measured), default=0)
        known[id(value)] = count, depth
    if level + depth > _MOST_LEVELS:
        raise ConfigError(f"lists and mappings may be nested {_MOST_LEVELS} levels deep, and not hold themselves")
    if count > _MOST_VALUES:
        raise ConfigError(f"aliases (&name, *name) stand for {count:.1e} values; allowed are {_MOST_VALUES:,}")
    return count, depth


class FreeKeyError(ValueError):
    """What is wrong with one key of a free dict, for validators: `path.key = value: message`."""

    def __init__(self, key: str, value: Any, message: str) -> None:
        super().__init__(message)
        self.key, self.value = key, value


def _free_dict(value: Any) -> dict[str, Any]:
    if value is None:  # `kwargs:` with nothing after it
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError("must be a mapping of names to values")
    return own_copy(value)


def _number_dict(value: Any) -> dict[str, Any]:
    return {key: number(item) for key, item in _free_dict(value).items()}


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Flag = StrictBool
Whole = Annotated[int, BeforeValidator(whole_number)]
PositiveInt = Annotated[int, BeforeValidator(whole_number), Field(ge=1)]
CountInt = Annotated[int, BeforeValidator(whole_number), Field(ge=0)]
Real = Annotated[float, BeforeValidator(real_number)]
PositiveReal = Annotated[float, BeforeValidator(real_number), Field(gt=0)]
NonNegativeReal = Annotated[float, BeforeValidator(real_number), Field(ge=0)]
UnitReal = Annotated[float, BeforeValidator(real_number), Field(ge=0, le=1)]
PathText = Annotated[str, BeforeValidator(_path_text), Field(min_length=1)]
FreeDict = Annotated[dict[str, Any], BeforeValidator(_free_dict)]
NumberDict = Annotated[dict[str, Any], BeforeValidator(_number_dict)]  # arguments among which no text looks like 1e-4
