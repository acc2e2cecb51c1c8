"""Reward functions are other people's code: what happens when one fails, hangs, or draws random numbers."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from solotune.errors import ConfigError, RewardError
from solotune.rewards.functions import RewardFunction, name_of, score, write_failure

log = logging.getLogger("solotune")


class OnError(NamedTuple):
    """What to do when a reward function raises, returns something else than finite numbers, or takes too long.

    Args:
        action: "stop" the run, its state saved; "retry", and stop after that; "skip": leave out the samples that it
            fails on, which are found by asking for halves.
        retries: how often it is asked again with "retry".
        backoff: seconds before it is asked again, doubled each time.
        timeout: seconds a call may take; None: any. Code that waits outside Python is not interrupted.
    """

    action: Literal["stop", "retry", "skip"] = "stop"
    retries: int = 3
    backoff: float = 1.0
    timeout: float | None = None


def guarded_score(
    reward_fn: RewardFunction,
    samples: Sequence[str],
    prompts: Sequence[str],
    outputs: Sequence[str],
    tokenizer: Any,
    metadata: Mapping[str, Sequence[Any]],
    failure_dir: Path | str,
    on_error: OnError,
) -> list[Any]:
    """`score`, with errors treated as `on_error` says.

    Returns:
        B numbers or B lists of numbers; None for a sample that was skipped, which is then a line of
        `reward_failure.jsonl` in `failure_dir`.
    Raises:
        RewardError: it failed for good, or on every sample.
    """

    def ask(rows: Sequence[int]) -> list[Any]:
        def of_rows(values: Sequence[Any]) -> list[Any]:
            return [values[row] for row in rows]

        columns = {name: of_rows(values) for name, values in metadata.items()}
        with time_limit(on_error.timeout, name_of(reward_fn)):
            given = (of_rows(samples), of_rows(prompts), of_rows(outputs), tokenizer, columns)
            return list(score(reward_fn, *given, failure_dir=failure_dir))

    everything = range(len(samples))
    if on_error.action == "skip":
        scores, problems = _by_halves(ask, everything)
        if len({isinstance(value, list) for value in scores if value is not None}) == 2:
            raise RewardError(f"reward: {name_of(reward_fn)} returned numbers for some samples and lists for others")
        if problems:
            rows = [
                {"index": row, "prompt": prompts[row], "output": outputs[row], "error": problem}
                for row, problem in problems.items()
            ]
            path = write_failure(failure_dir, rows)
            said = f"{len(problems)} of {len(samples)} samples got no reward; they and the reasons are in {path}"
            if len(problems) == len(samples):
                raise RewardError(f"reward: {name_of(reward_fn)} failed on every sample: {said}")
            log.warning("%s", said)
        return scores
    for attempt in range(on_error.retries if on_error.action == "retry" else 0):
        try:
            return ask(everything)
        except RewardError as error:
            seconds = on_error.backoff * 2**attempt
            log.warning("%s; asked again in %g s (%d of %d)", error, seconds, attempt + 1, on_error.retries)
            time.sleep(seconds)
    return ask(everything)


def _by_halves(ask: Any, rows: Sequence[int]) -> tuple[list[Any], dict[int, str]]:
    """Scores of the rows, None where one fails even alone, and the reasons by row: log2(B) calls a failing row."""
    try:
        return ask(rows), {}
    except RewardError as error:
        if len(rows) == 1:
            return [None], {rows[0]: str(error)}
    middle = len(rows) // 2
    (first, problems), (second, others) = _by_halves(ask, rows[:middle]), _by_halves(ask, rows[middle:])
    return first + second, {**problems, **others}


class _TimeUp(BaseException):
    """Not an Exception, so that `except Exception` in a reward function does not swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float | None, who: str) -> Iterator[None]:
    """Interrupts the block after so many seconds, by the operating system's timer.

    Raises:
        RewardError: the time was up.
        ConfigError: there is no such timer here (it needs Unix and the main thread).
    """
    if seconds is None:
        yield
        return
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        raise ConfigError("reward.timeout works on Unix and in the main thread only: remove it")

    def expire(*_: object) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, expire)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeUp:
        raise RewardError(f"reward: {who} took longer than reward.timeout = {seconds:g} s") from None
    finally:
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def random_numbers_of_its_own(*key: int) -> Iterator[None]:
    """Global random generators start from `key` in the block and go on after it as if it had not been there.

    Python's, numpy's, torch's on the CPU and on GPUs. The same key gives the same numbers, so a resumed run's reward
    function draws what it would have drawn.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
