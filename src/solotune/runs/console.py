"""What a person sees while a run goes on: a progress bar with reward and KL, tables, one-line messages."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from solotune.runs.cleaning import one_line, visible

console = Console(stderr=False)


def say(line: str, soft_wrap: bool = False) -> None:
    """One line on the terminal. Names of files and texts of others may stand in it: nothing in it is obeyed.

    Args:
        soft_wrap: do not break it, so that a command in it can be copied.
    """
    console.print(Text(visible(line)), soft_wrap=soft_wrap)  # a str would be read as markup and emoji codes


class VisibleFormatter(logging.Formatter):
    """Log messages whose arguments (file names, texts of others) stay on their line and cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, with what would act in a terminal written out."""
        if isinstance(record.args, tuple):
            arguments = tuple(one_line(x) if isinstance(x, str | os.PathLike) else x for x in record.args)
            record = logging.makeLogRecord({**vars(record), "args": arguments})
        return visible(super().format(record))


def show_logs(level: int = logging.INFO) -> None:
    """Show the project's log lines on the terminal, once; a caller's own logging set-up is left alone."""
    logger = logging.getLogger("solotune")
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False, markup=False)
    handler.setFormatter(VisibleFormatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)


class RoundProgress:
    """The bar over the rounds of a run."""

    def __init__(self, progress: Progress | None, total: int, done: int):
        self._progress = progress
        self._task = None
        if progress is not None:
            self._task = progress.add_task("rounds", total=total, completed=done, score="", kl="")

    def advance(self, metrics: dict[str, Any]) -> None:
        """One more round, with its mean score and KL, or its loss."""
        if self._progress is not None and self._task is not None:
            shown = {
                "score": ("objective/score", ".3f"),
                "KL": ("objective/kl", ".2f"),
                "loss": ("objective/loss", ".3f"),
            }
            known = [f"{name} {metrics[key]:{digits}}" for name, (key, digits) in shown.items() if key in metrics]
            score, kl = (*known, "")[:2]
            self._progress.update(self._task, advance=1, score=score, kl=kl)


@contextlib.contextmanager
def round_progress(total: int, done: int, shown: bool) -> Iterator[RoundProgress]:
    """A progress bar while the block runs; nothing where it is not `shown`, or in a notebook: its bars need widgets."""
    if not shown or console.is_jupyter:
        yield RoundProgress(None, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[green]{task.fields[score]}"),
        TextColumn("[cyan]{task.fields[kl]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield RoundProgress(progress, total, done)
