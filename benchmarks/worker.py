"""One side of a benchmark: a process that plays a round when it is told to.

`ppo_round.py` holds one process a side and lets them play in turn, one at a time, so that all sides meet the same
noise of the machine and each side's peak memory is its own. A line on stdin is a command; the answer is one line of
JSON on stdout. Everything else that a side prints goes to stderr.

Needs torch for a CUDA device alone, and nothing else, so that every side's environment can read it.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shapes import SHAPES, Shape

PHASES = ("sample", "score", "measure", "credit", "update")


def arguments(description: str) -> tuple[Shape, str, str]:
    """(shape, device, dtype) as `ppo_round.py` passes them to a side."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--rollouts", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    given = parser.parse_args()
    return SHAPES[given.shape].with_rollouts(given.rollouts), given.device, given.dtype


class Worker:
    """The side's end of the conversation. Construct it before anything can print."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def wait(self) -> str:
        """The next command; leaves the process when there is none."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        return line.strip()

    def answer(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), file=self._answers, flush=True)

    def serve(self, commands: dict[str, Callable[[], dict[str, Any]]]) -> None:
        """Answers every command by calling its function, until stdin ends."""
        while True:
            self.answer(commands[self.wait()]())


class RoundClock:
    """The times of one round; waits for the device before it reads the time."""

    def __init__(self, shape: Shape, device: str) -> None:
        self._shape = shape
        self._device = device
        self.start()

    def start(self) -> None:
        self.phases: defaultdict[str, float] = defaultdict(float)
        self._start, self._cpu_start = self.now(), time.process_time()

    def now(self) -> float:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.phases[name] += self.now() - start

    def record(self) -> dict[str, Any]:
        """What a side answers to `round`."""
        return {
            "seconds": self.now() - self._start,
            "cpu_seconds": time.process_time() - self._cpu_start,
            "seconds_by_phase": dict(self.phases),
            "seconds_per_update": self.phases["update"] / self._shape.updates_per_round,
            "peak_memory_bytes": peak_memory_bytes(self._device),
        }


def peak_memory_bytes(device: str) -> int:
    """The most memory this process has held: allocated by torch on the GPU, or resident in RAM.

    `VmHWM` is read where the system has it, because `ru_maxrss` starts from the size of the process that started us.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
