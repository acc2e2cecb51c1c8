"""Values, YAML texts and files that nobody means: what the tests of hostile input draw from."""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from solotune.errors import SolotuneError

SOAK = bool(os.environ.get("SOLOTUNE_SOAK"))
LONGEST = 20  # seconds: what takes longer hangs


def examples(count: int) -> settings:
    """`count` examples in `make soak`, a fifteenth of them otherwise; the same ones every time."""
    return settings(
        max_examples=count if SOAK else count // 15,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class _LateError(BaseException):
    """No Exception: code under test must not take it for an error of a file."""


@contextlib.contextmanager
def in_time(seconds: int = LONGEST) -> Iterator[None]:
    """Fails where the block takes longer."""

    def late(*_: object) -> None:
        raise _LateError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    except _LateError as error:
        raise AssertionError(f"this took more than {seconds} s") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused_or(make: Callable[[], Any]) -> Any:
    """What `make` gives, None where it is refused with an error of the project's own that can be read."""
    with in_time():
        try:
            return make()
        except SolotuneError as error:
            said = str(error)
    assert said.strip()
    assert len(said) < 20_000
    return None


TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "",
            " ",
            "\x00",
            "a\x00b",
            "\ud800",
            "\ufeffa",
            "~nobody/x.txt",
            "a" * 5000,
            "\x1b[31m",
            "../../x",
            "x.json",
            "1e400",
            "-1e-400",
            "0x10",
            "nan",
            "null",
            "é" * 300 + ".csv",
            "{prompt.__class__}",
            "{0}",
            "a.b.c",
            "\u202e",
        ]
    ),
)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**400), 10**4000, 10**15, 1e308, -0.0, True, False]),
)
PLAIN = st.one_of(st.none(), NUMBERS, TEXTS)
ODD = st.sampled_from(
    [datetime.date(2020, 1, 1), datetime.datetime(1, 1, 1), b"\xff", {1, 2}, (1,), object(), int, ...]
)


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.one_of(TEXTS, st.sampled_from(["token", "name", "lr", "max_new_tokens", "top_k", "peft_type"]))
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=6
    )


YAML_VALUES = nested(PLAIN)
VALUES = st.one_of(YAML_VALUES, nested(PLAIN | ODD), st.dictionaries(st.integers() | st.none(), PLAIN, max_size=2))


def _deep(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _loop() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["itself"] = value
    return value


def _laughs() -> list[Any]:
    value: list[Any] = ["ha"]
    for _ in range(40):
        value = [value, value]
    return value


MONSTERS = {"50,000 levels": _deep(50_000), "a mapping that holds itself": _loop(), "2^40 values": _laughs()}


def paths(values: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested mappings."""
    found = [prefix] if prefix else []
    if isinstance(values, dict):
        for key, item in values.items():
            found += paths(item, (*prefix, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, bases: list[dict[str, Any]], values: st.SearchStrategy[Any]) -> dict[str, Any]:
    """One of `bases` with one to three of its settings replaced, taken away, added or moved."""
    result = copy.deepcopy(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(result) or [("x",)]))
        owner = result
        for key in path[:-1]:
            owner = owner[key]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "rename"])):
            case "replace":
                owner[path[-1]] = draw(values)
            case "remove":
                owner.pop(path[-1], None)
            case "add":
                owner[draw(TEXTS | st.integers())] = draw(values)
            case _:
                owner[draw(TEXTS)] = owner.pop(path[-1], None)
    return result


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
YAML_ODDITIES = [
    "!!python/object/apply:os.system ['touch /tmp/solotune-was-here']",
    "!!python/name:os.system",
    "!!python/object:x.y {}",
    "&a [*a]",
    "&b {x: *b}",
    "{<<: {a: 1}, a: 2}",
    "{<<: [1]}",
    "{<<: x}",
    "*nowhere",
    "!!int x",
    "!!int ''",
    "!!float ''",
    "!!float x",
    "!!bool maybe",
    "!!timestamp x",
    "!!binary '***'",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!omap x",
    "!!pairs [1]",
    "!!map x",
    "!!seq x",
    "!!str {a: 1}",
    "!!null x",
    "2020-01-01",
    "2020-99-99",
    "2001-12-14t21:59:43.10-99:00",
    "0o17",
    "017",
    "0b2",
    "0x",
    "0x" + "f" * 6000,
    "1_000",
    "1:30",
    "9" * 5000,
    "190:20:30",
    ".nan",
    "-.inf",
    "1e400",
    "1e-4",
    "yes",
    "~",
    "{? [a] : b}",
    "{? {a: b} : c}",
    "{[1]: 2}",
    "{a: 1, a: 2}",
    "[" * 3000,
    "{" * 3000,
    "'",
    '"',
    '"\\uD800"',
    '"\\xff"',
    "|",
    ">-\n  x",
    "\x00",
    "\ufeff",
    "\t",
    "%YAML 9.9\n---\n",
    "---\n---\n",
    "...\n",
    "- ",
    "? ",
    ": ",
    "!<tag> x",
    "!local x",
    "@x",
    "`x`",
    "&",
    "*",
    "!",
    "#",
    LAUGHS,
]


@st.composite
def yaml_texts(draw: st.DrawFn, bases: list[str]) -> bytes:
    """A recipe's text with odd values, lines cut, doubled or swapped, and bytes that are no UTF-8."""
    lines = draw(st.sampled_from(bases)).split("\n")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        odd = draw(st.sampled_from(YAML_ODDITIES) | TEXTS)
        match draw(st.sampled_from(["value", "value", "value", "line", "cut", "double", "indent", "swap"])):
            case "value" if ":" in lines[at]:
                lines[at] = lines[at].split(":", 1)[0] + ": " + odd
            case "line":
                lines.insert(at, odd)
            case "cut":
                del lines[at]
            case "double":
                lines.insert(at, lines[at])
            case "indent":
                lines[at] = "  " + lines[at]
            case "swap":
                lines[at], lines[0] = lines[0], lines[at]
        lines = lines or [""]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return damaged(draw, content) if draw(st.integers(0, 4)) == 0 else content


def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some of them flipped, cut off, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "cut", "insert", "double", "empty"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(
                    st.sampled_from([b"\x00", b"\xff\xfe", b"\xc3", b"\r", b'"', b"\xed\xa0\x80", b"\n"])
                )
            case "double":
                data += data[at : at + 1000]
            case "empty" if draw(st.booleans()):
                data.clear()
    return bytes(data)
