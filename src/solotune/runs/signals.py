"""SIGTERM and Ctrl-C: the step is finished, the state is saved, and the run ends with a code that says so."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

log = logging.getLogger("solotune")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RoundInterrupted(Exception):  # noqa: N818  no error, as StopIteration is none
    """A signal came within a round; what is needed to go on is in the trainer's state."""


class Stop:
    """Which signal asked the run to stop; None for none."""

    signal_number: int | None = None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM: 128 and the signal's number, as shells have it."""
        return 128 + (self.signal_number or 0)


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """While the block runs, the first signal is noted and the second one ends the process at once.

    Outside the main thread, where Python takes no signals, nothing is noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if stop.signal_number is not None:
            raise SystemExit(128 + number)
        stop.signal_number = number
        name = signal.Signals(number).name
        log.warning("%s: the step is finished and the state is saved; once more ends it at once", name)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
