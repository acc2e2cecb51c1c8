"""Tokens and passwords in a configuration, which is copied into every run's files, its page and its tracker."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_NAMES = re.compile(
    r"^(hf_?|use_?auth_?|auth_?|access_?|bearer_?)?token$|secret|passw|api_?key|credential|private_?key|^authorization$",
    re.IGNORECASE,
)
_VALUES = re.compile(
    r"://[^/\s@]*:[^/\s@]+@"  # user:password@host
    r"|[?&](token|access_token|api_key|key|sig|signature|x-amz-signature)=[^&\s]"
    r"|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[opsu]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b",
    re.IGNORECASE,
)


def secrets_in(values: Any, path: str = "") -> Iterator[str]:
    """The settings that hold one, by their names or by their form; what they hold is not repeated."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            place = f"{path}.{key}" if path else str(key)
            if isinstance(value, str) and value and _NAMES.search(str(key)):
                yield f"{place}: {_REFUSED}"
            else:
                yield from secrets_in(value, place)
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from secrets_in(value, f"{path}.{index}")
    elif isinstance(values, str) and _VALUES.search(values):
        yield f"{path}: {_REFUSED}"


_REFUSED = (
    "secrets do not belong in a configuration, which is copied into a run's files; set HF_TOKEN (or what its library "
    "reads) in the environment"
)
