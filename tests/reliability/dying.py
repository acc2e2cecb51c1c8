"""The command line in a process that dies at a chosen instant: the reward counts its calls, and so do steps and files
that reach the disk; at the chosen one a signal comes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from solotune.cli import main
from solotune.rewards import guard
from solotune.trainers import checkpoint
from solotune.trainers.ppo import PPOTrainer
from tests.forks import Ended, fork

PLACES = {
    "reward": (guard, "score"),
    "step": (PPOTrainer, "optimizer_step"),
    "sample": (PPOTrainer, "sample_rollouts"),
    "disk": (checkpoint, "_to_disk"),
}
LAST = {"reward": 13, "step": 24, "sample": 6, "disk": 80}
"""How often each happens in a whole run, at least."""


def solotune_command(*arguments: object, logs: Path, where: str = "", at: int = 0, number: int = 9) -> Ended:
    """`solotune ARGUMENTS`, sent the signal `number` when `where` happens for the `at`-th time."""
    return fork(_run, [str(argument) for argument in arguments], where, at, number, logs=logs).ended()


def _run(arguments: list[str], where: str, at: int, number: int) -> None:
    if where:
        owner, name = PLACES[where]
        setattr(owner, name, _dying(getattr(owner, name), at, number))
    sys.argv = ["solotune", *arguments]
    main()


def _dying(function: Callable, at: int, number: int) -> Callable:
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return counted
