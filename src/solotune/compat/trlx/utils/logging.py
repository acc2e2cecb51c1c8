"""trlX's logging: loggers that only the first process writes to, unless `ranks` says otherwise."""

from __future__ import annotations

import logging
import os
from typing import Any

import transformers
from accelerate.logging import MultiProcessAdapter as _AccelerateAdapter

CRITICAL, ERROR, WARNING, INFO, DEBUG, NOTSET = (
    logging.CRITICAL,
    logging.ERROR,
    logging.WARNING,
    logging.INFO,
    logging.DEBUG,
    logging.NOTSET,
)
WARN, FATAL = WARNING, CRITICAL
_ROOT = "trlx"


class MultiProcessAdapter(_AccelerateAdapter):
    """A logger whose calls may name the processes that write: `ranks=[0]`, `ranks=[-1]` for all. Default: the first."""

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        ranks = kwargs.pop("ranks", [0])
        rank = int(os.environ.get("RANK", "0"))
        if self.isEnabledFor(level) and (rank in ranks or -1 in ranks):
            self.logger.log(level, msg, *args, **kwargs)


def get_logger(name: str | None = None) -> MultiProcessAdapter:
    """The logger of a module, under `trlx`."""
    inner = name if name and name.partition(".")[0] == _ROOT else f"{_ROOT}.{name}" if name else _ROOT
    _default_handler()
    return MultiProcessAdapter(logging.getLogger(inner), {})


def get_verbosity() -> int:
    """Level of trlX's loggers."""
    _default_handler()
    return logging.getLogger(_ROOT).getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Set the level of trlX's loggers, and of this project's."""
    _default_handler()
    for name in (_ROOT, "solotune"):
        logging.getLogger(name).setLevel(verbosity)


def enable_default_handler() -> None:
    """Write to the terminal."""
    _default_handler()
    logging.getLogger(_ROOT).disabled = False


def disable_default_handler() -> None:
    """Write nothing to the terminal."""
    logging.getLogger(_ROOT).disabled = True


def add_handler(handler: logging.Handler) -> None:
    """Add a handler to trlX's root logger."""
    logging.getLogger(_ROOT).addHandler(handler)


def remove_handler(handler: logging.Handler) -> None:
    """Remove a handler from trlX's root logger."""
    logging.getLogger(_ROOT).removeHandler(handler)


def enable_explicit_format() -> None:
    """Show time, level and place with every line."""
    _default_handler()
    for handler in logging.getLogger(_ROOT).handlers:
        handler.setFormatter(logging.Formatter("[%(levelname)s|%(filename)s:%(lineno)s] %(asctime)s >> %(message)s"))


def reset_format() -> None:
    """The plain format again."""
    for handler in logging.getLogger(_ROOT).handlers:
        handler.setFormatter(None)


def disable_progress_bar() -> None:
    """Hide the progress bars of transformers."""
    transformers.utils.logging.disable_progress_bar()


def enable_progress_bar() -> None:
    """Show the progress bars of transformers."""
    transformers.utils.logging.enable_progress_bar()


def _default_handler() -> None:
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
        root.propagate = False
        root.setLevel(getattr(logging, os.environ.get("TRLX_VERBOSITY", "info").upper(), logging.INFO))
