"""Asking reward and metric functions, on one process or on all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from solotune.errors import RewardError
from solotune.rewards.guard import OnError, guarded_score, random_numbers_of_its_own
from solotune.trainers.evaluation import sample_metrics
from solotune.trainers.order import Stream
from solotune.trainers.sampling import Texts, on_main


class Scorer:
    """Calls a run's reward function and metric function.

    Args:
        reward_fn, metric_fn: see `Trainer`.
        on_main: call them on the first process alone, with the samples of all; otherwise every process calls them.
        on_error: what to do when the reward function fails.
        seed: of the random numbers that these functions draw.
    """

    def __init__(
        self,
        reward_fn: Callable[..., Any] | None,
        metric_fn: Callable[..., dict[str, Any]] | None,
        tokenizer: Any,
        accelerator: Accelerator,
        on_main: bool,
        on_error: OnError,
        seed: int,
    ):
        self._reward_fn, self._metric_fn, self._tokenizer = reward_fn, metric_fn, tokenizer
        self._accelerator, self._on_main = accelerator, on_main and accelerator.num_processes > 1
        self._on_error, self._seed = on_error, seed

    def rewards(self, texts: Texts, stream: Stream, step: int, folder: Path) -> list[Any]:
        """A number or a list of numbers a sample; None for one that was skipped, and where there is no function.

        Args:
            stream, step: what the samples are for, and when: the random numbers that the function draws depend on it.
            folder: where samples that it fails on are written.
        Raises:
            RewardError: on every process, where it failed on one.
        """
        reward_fn = self._reward_fn
        if reward_fn is None:
            return [None] * len(texts.samples)
        process = self._accelerator.process_index
        folder = folder if process == 0 else folder / f"process_{process}"

        def ask(given: Texts) -> list[Any]:
            with random_numbers_of_its_own(self._seed, int(Stream.REWARDS), int(stream), step, process):
                return guarded_score(
                    reward_fn,
                    given.samples,
                    given.prompts,
                    given.outputs,
                    self._tokenizer,
                    given.metadata,
                    failure_dir=folder,
                    on_error=self._on_error,
                )

        return self._everywhere(ask, texts)

    def metrics(self, texts: Texts, step: int) -> list[dict[str, float]]:
        """What the metric function says of each sample."""
        with random_numbers_of_its_own(self._seed, int(Stream.METRICS), step, self._accelerator.process_index):
            return self._everywhere(partial(sample_metrics, self._metric_fn), texts)

    def _everywhere(self, function: Callable[[Texts], list[Any]], texts: Texts) -> list[Any]:
        if self._on_main:
            return on_main(self._accelerator, function, texts)
        answer: list[Any] = []
        failure: Exception | None = None
        try:
            answer = function(texts) if texts.samples else []
        except Exception as error:  # the other processes have to know, or they would wait for this one
            failure = error
        if self._accelerator.num_processes > 1:
            failures = [text for text in gather_object([None if failure is None else str(failure)]) if text is not None]
            if failures and failure is None:
                raise RewardError(f"on another process: {failures[0]}")
        if failure is not None and self._accelerator.num_processes > 1:
            raise RewardError(str(failure)) from failure  # the same kind everywhere: what follows is done together
        if failure is not None:
            raise failure
        return answer
