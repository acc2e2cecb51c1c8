"""What a person sees while something takes long: a bar on a terminal; in a file, a pipe or a notebook plain lines.

    with phase_progress("reward model", total=len(batches)) as phase:
        for batch in batches:
            ...
            phase.advance()

A phase without a total says when it begins and, if it was long, how long it took. Phases may lie within each other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console, ConsoleDimensions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.text import Text

from solotune.cleaning import one_line, visible

T = TypeVar("T")
LONG = 10.0
"""Seconds after which a phase says how far it is, and how long it took when it ends."""
SHORT = 5.0
"""A phase that is expected to take less begins without a line."""
FILE_WIDTH = 100
"""Columns of a table in a file: whoever reads it has another terminal, or none."""


class _Console(Console):
    """A console whose tables are as wide in every file."""

    @Console.size.getter
    def size(self) -> ConsoleDimensions:  # pyright: ignore[reportIncompatibleMethodOverride]
        """That of the terminal, `FILE_WIDTH` columns where there is none."""
        found = super().size
        return found if self.is_terminal or self.is_jupyter else ConsoleDimensions(FILE_WIDTH, found.height)


console: Console = _Console()


def say(line: str, soft_wrap: bool = False) -> None:
    """One line on the terminal. Names of files and texts of others may stand in it: nothing in it is obeyed.

    Args:
        soft_wrap: do not break it, so that a command in it can be copied; in a file no line is broken.
    """
    # a str would be read as markup and emoji codes
    console.print(Text(visible(line)), soft_wrap=soft_wrap or not console.is_terminal)


def show(table: RenderableType) -> None:
    """A table; in a file its lines end with their last sign."""
    if console.is_terminal or console.is_jupyter:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    lines = "\n".join(line.rstrip() for line in captured.get().splitlines())
    console.print(Text(lines), soft_wrap=True)


def duration(seconds: float, digits: int = 0) -> str:
    """`31 s`, `4 min 12 s`, `1 h 5 min`, `2 d 3 h`; with so many digits below ten seconds."""
    if seconds < 9.95 and digits:
        return f"{seconds:.{digits}f} s"
    whole = max(round(seconds), 0)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s"


class Phase:
    """Something that takes long: how far it is.

    Args:
        name: what it is, such as `reward model`.
        total: units in all; None where that is not known.
        unit: what is counted.
        expected: seconds that it will take, where it has no total but was done before.
    """

    def __init__(self, name: str, total: int | None = None, unit: str = "steps", expected: float | None = None):
        self.name = one_line(name)  # which may be somebody else's
        self.total, self.unit, self.expected = total, unit, expected
        self.done, self.what = 0, ""
        self._began = self._told = time.monotonic()
        self._bar: TaskID | None = None
        self._is_shown = False

    def advance(self, units: int = 1) -> None:
        """So many units more are done."""
        self.done += units
        self._tell_if_due()

    def doing(self, what: str) -> None:
        """What is being done now, within the phase."""
        self.what = what
        self._tell_if_due()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float | None:
        """Seconds until its end: at the pace so far, or as it is expected; None where nothing is known."""
        if self.total is not None:
            return self.seconds / self.done * (self.total - self.done) if self.done else None
        return None if self.expected is None else max(self.expected - self.seconds, 0.0)

    @property
    def count(self) -> str:
        """`120/301`, where there is something to count."""
        return "" if self.total is None else f"{self.done:,}/{self.total:,}"

    @property
    def note(self) -> str:
        """What a bar says beside its count."""
        return self.what

    def first_line(self) -> str:
        """What is said when it begins."""
        parts = [] if self.total is None else [f"{self.total:,} {self.unit}"]
        if self.total is None and self.expected:
            parts.append(f"about {duration(self.expected)}")
        return ": ".join([self.name, *parts])

    def line(self) -> str:
        """How far it is."""
        parts = [] if self.total is None else [f"{self.done:,} of {self.total:,} {self.unit}"]
        parts += [self.what] if self.what else []
        parts += [f"{duration(self.left)} left"] if self.left is not None else [f"{duration(self.seconds)} so far"]
        return f"{self.name}: {', '.join(parts)}"

    def last_line(self) -> str | None:
        """What is said when it has ended; None for nothing."""
        if self.seconds < LONG:
            return None
        counted = "" if self.total is None else f"{self.done:,} {self.unit} in "
        return f"{self.name}: {counted}{duration(self.seconds)}"

    def is_due(self, since_told: float) -> bool:
        """Whether a line is due so many seconds after the last one."""
        return since_told >= LONG

    def _tell_if_due(self) -> None:
        if self._bar is not None and _bars is not None:
            _bars.update(self._bar, completed=self.done)
        elif self._is_shown and self.is_due(time.monotonic() - self._told):
            self._tell(self.line())

    def _tell(self, line: str) -> None:
        self._told = time.monotonic()
        say(line)

    def _begin(self) -> None:
        self._is_shown = True
        if console.is_terminal and not console.is_dumb_terminal:
            self._bar = _add_bar(self)
        elif self.expected is None or self.expected >= SHORT:
            self._tell(self.first_line())

    def _end(self, well: bool) -> None:
        if self._bar is not None:
            _remove_bar(self._bar)
            self._bar = None
        if well and self._is_shown and (line := self.last_line()) is not None:
            say(line)


@contextlib.contextmanager
def showing(phase: Phase, shown: bool = True) -> Iterator[None]:
    """Show a phase while the block runs; nothing where it is not `shown`."""
    if shown:
        phase._begin()
    try:
        yield
    except BaseException:
        phase._end(well=False)
        raise
    phase._end(well=True)


@contextlib.contextmanager
def phase_progress(
    name: str, total: int | None = None, unit: str = "steps", expected: float | None = None, shown: bool = True
) -> Iterator[Phase]:
    """A phase, shown while the block runs; see `Phase` for the arguments."""
    phase = Phase(name, total, unit, expected)
    with showing(phase, shown):
        yield phase


def tracked(items: Sequence[T], name: str, unit: str = "steps") -> Iterator[T]:
    """The items, one after another, as a phase that is shown."""
    with phase_progress(name, len(items), unit) as phase:
        for item in items:
            yield item
            phase.advance()


# ---- the bars that are on the terminal now: one display, whatever lies within what -----------------------------------

_bars: Progress | None = None


class _Said(ProgressColumn):
    """A column with what the bar's phase says."""

    def __init__(self, said: Callable[[Phase], str], style: str = ""):
        super().__init__()
        self._said, self._style = said, style

    def render(self, task: Task) -> Text:
        return Text(self._said(task.fields["phase"]), style=self._style)


def _time(phase: Phase) -> str:
    left = "" if phase.left is None else f", {duration(phase.left)} left"
    return duration(phase.seconds) + left


def _add_bar(phase: Phase) -> TaskID:
    global _bars
    if _bars is None:
        _bars = Progress(
            _Said(lambda phase: phase.name),
            BarColumn(bar_width=20),
            _Said(lambda phase: phase.count),
            _Said(lambda phase: phase.note, "green"),
            _Said(_time, "cyan"),
            console=console,
            transient=True,
        )
        _bars.start()
    return _bars.add_task("", total=phase.total, phase=phase)


def _remove_bar(bar: TaskID) -> None:
    global _bars
    if _bars is None:
        return
    _bars.remove_task(bar)
    if not _bars.tasks:
        _bars.stop()
        _bars = None
