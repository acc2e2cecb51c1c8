"""Time by phase and peak memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch


class Clock:
    """Seconds spent in each phase of a run.

    Args:
        device: where the work is done.
        started: `time.perf_counter()` when the command began, default now.
    """

    def __init__(self, device: torch.device, started: float | None = None):
        self._device = device
        self._started = time.perf_counter() if started is None else started
        self.total: dict[str, float] = defaultdict(float)
        self.round: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block; on a GPU its queued work is waited for, once a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds = time.perf_counter() - start
            self.total[name] += seconds
            self.round[name] += seconds

    def wall_seconds(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._started

    def continue_from(self, seconds_by_phase: dict[str, float]) -> None:
        """Add what a run had spent before it was interrupted."""
        for name, seconds in seconds_by_phase.items():
            self.total[name] += seconds
            self._started -= seconds

    def end_round(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        seconds = dict(self.round)
        self.round.clear()
        return seconds


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):  # Linux: getrusage can start from the size of the process that launched this one
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
