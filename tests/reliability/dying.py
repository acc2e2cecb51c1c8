"""The command line in a process that dies at a chosen instant: the reward counts its calls, and so do steps and files
that reach the disk; at the chosen one a signal comes."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from solotune.cli import main
from solotune.rewards import guard
from solotune.runs import checkpoint
from solotune.trainers.ppo import PPOTrainer
from tests.forks import Ended, fork

PLACES = {
    "reward": (guard, "score"),
    "step": (PPOTrainer, "optimizer_step"),
    "sample": (PPOTrainer, "sample_rollouts"),
    "disk": (checkpoint, "_to_disk"),
}
LAST = {"reward": 13, "step": 24, "sample": 6, "disk": 66}
"""How often each happens in a whole run."""


def solotune_command(*arguments: object, logs: Path, where: str = "", at: int = 0, number: int = 9) -> Ended:
    """`solotune ARGUMENTS`, sent the signal `number` when `where` happens for the `at`-th time.

    The last line of its standard error says how often each happened, as JSON, if it lived to say it.
    """
    return fork(_run, [str(argument) for argument in arguments], where, at, number, logs=logs).ended()


def _run(arguments: list[str], where: str, at: int, number: int) -> None:
    calls = dict.fromkeys(PLACES, 0)
    for name, (owner, attribute) in PLACES.items():
        dies_at = at if name == where else None
        setattr(owner, attribute, _dying(getattr(owner, attribute), name, calls, dies_at, number))
    sys.argv = ["solotune", *arguments]
    try:
        main()
    finally:
        print(json.dumps(calls), file=sys.stderr)


def _dying(function: Callable, name: str, calls: dict[str, int], dies_at: int | None, number: int) -> Callable:
    def counted(*args, **kwargs):
        calls[name] += 1
        if calls[name] == dies_at:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return counted
