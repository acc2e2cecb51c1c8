"""Processes that are forked from one that has imported everything: hundreds of them cost no more than their work."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

import solotune.cli
import solotune.runs.start  # noqa: F401  imported once, for all that are forked

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


class Ended(NamedTuple):
    """A process that has ended: a return code below zero is the signal that killed it."""

    returncode: int
    stdout: str
    stderr: str


class Fork(NamedTuple):
    """A process that runs."""

    process: BaseProcess
    outputs: list[Path]

    def ended(self, timeout: float = 300) -> Ended:
        """Waits for it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"not ended after {timeout} s: {self.outputs[1].read_text()[-3000:]}")
        return Ended(self.process.exitcode, *(path.read_text() for path in self.outputs))


def fork(function: Callable[..., None], *arguments: object, logs: Path, **environment: str) -> Fork:
    """Calls a function of a module in a process of one thread, whose standard output and error are files `logs`.*."""
    outputs = [logs.with_suffix(suffix) for suffix in (".out", ".err")]
    process = _context.Process(target=_enter, args=(function, arguments, outputs, environment))
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "COLUMNS": "400"}):  # the first one starts the server
        process.start()
    return Fork(process, outputs)


def _enter(function: Callable[..., None], arguments: tuple, outputs: list[Path], environment: dict[str, str]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)
