"""What a person sees while a run goes on: its rounds with reward and KL, and log lines."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from solotune.cleaning import one_line, visible
from solotune.progress import SHORT, Phase, console, duration, say, show, showing

__all__ = ["Rounds", "console", "round_progress", "say", "show", "show_logs"]

SHOWN = {"score": ("objective/score", ".3f"), "KL": ("objective/kl", ".2f"), "loss": ("objective/loss", ".3f")}
"""Metrics of a round that are told, by their short names."""


class VisibleFormatter(logging.Formatter):
    """Log messages whose arguments (file names, texts of others) stay on their line and cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, with what would act in a terminal written out."""
        if isinstance(record.args, tuple):
            arguments = tuple(one_line(x) if isinstance(x, str | os.PathLike) else x for x in record.args)
            record = logging.makeLogRecord({**vars(record), "args": arguments})
        return visible(super().format(record))


A_MINUTE = 60.0


class SayingHandler(logging.Handler):
    """Says log messages, above the bars where there are any. (rich's own handler pads them to the terminal's width.)"""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record))
        except Exception:
            self.handleError(record)


def show_logs(level: int = logging.INFO) -> None:
    """Show the project's log lines on the terminal, once; a caller's own logging set-up is left alone."""
    logger = logging.getLogger("solotune")
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = SayingHandler()
    handler.setFormatter(VisibleFormatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)


class Rounds(Phase):
    """The rounds of a run. In a file a line tells each that took more than `SHORT` seconds, else one every ten seconds,
    and always the last.

    Args:
        total: rounds that are planned.
        done: those that were done before this process.
        after: seconds that the evaluation behind the last one will take.
    """

    def __init__(self, total: int, done: int = 0, after: float = 0.0):
        super().__init__("rounds", total, "rounds")
        self.done = self._first = self._told_round = done
        self._round_began, self._is_long = time.monotonic(), False
        self._metrics = ""
        self._aside, self._after = 0.0, after
        self._steps: tuple[int, int] | None = None
        self._from_step = (0, 0.0)  # where this process began to count steps, and when

    def step(self, done: int, total: int) -> None:
        """So many optimizer steps of the run are done: what is left goes by them, where rounds may be long."""
        if self._steps is None:
            self._from_step = done, time.monotonic()
        self._steps = done, total
        self.doing(f"step {done:,} of {total:,}")

    def end_round(self, metrics: dict[str, Any]) -> None:
        """One more round, with its mean score and KL, or its loss."""
        known = [f"{name} {metrics[key]:{digits}}" for name, (key, digits) in SHOWN.items() if key in metrics]
        self._metrics, self.what = ", ".join(known), ""
        now = time.monotonic()
        self._is_long, self._round_began = now - self._round_began >= SHORT, now
        self.advance()

    def evaluated(self, seconds: float) -> None:
        """An evaluation took so long: it is no part of a round's time."""
        self._aside, self._after = self._aside + seconds, seconds

    @property
    def left(self) -> float | None:
        """By the mean of the rounds in this process, or of its steps."""
        if self._steps is not None:
            (first, began), (done, total) = self._from_step, self._steps
            pace = (time.monotonic() - began - self._aside) / max(done - first, 1)
            return pace * max(total - done, 0) + self._after if done > first else None
        to_do = max((self.total or 0) - self.done, 0)
        return self._seconds_a_round * to_do + self._after if self.done > self._first else None

    @property
    def _seconds_a_round(self) -> float:
        return (self._round_began - self._began - self._aside) / max(self.done - self._first, 1)

    @property
    def note(self) -> str:
        return ", ".join(text for text in (self._metrics, self.what) if text)

    def first_line(self) -> str:
        return f"round {self.done + 1:,} of {self.total:,} begins"

    def line(self) -> str:
        """The last round; within a round what is being done."""
        parts = [self.what] if self.what else [self._metrics, f"{duration(self._seconds_a_round, 1)} a round"]
        is_last = not self.what and self.done >= (self.total or 0)
        if self.left is not None and not is_last and (not self.what or self._steps is not None):
            parts.append(f"{duration(self.left)} left")
        number = self.done + bool(self.what)
        self._told_round = number
        return f"round {number:,} of {self.total:,}: {', '.join(part for part in parts if part)}"

    def last_line(self) -> str | None:
        return None if self._told_round == self.done else self.line()

    def is_due(self, since_told: float) -> bool:
        if self.what and self._steps is None:  # within a round that will soon tell of itself
            return since_told >= A_MINUTE
        return super().is_due(since_told) or (not self.what and (self._is_long or self.done == self.total))


@contextlib.contextmanager
def round_progress(total: int, done: int, shown: bool, after: float = 0.0) -> Iterator[Rounds]:
    """Rounds, shown while the block runs; nothing where they are not `shown`, or none is left. See `Rounds`."""
    rounds = Rounds(total, done, after)
    with showing(rounds, shown and done < total):
        yield rounds
