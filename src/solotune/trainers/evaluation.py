"""Sampling the evaluation prompts and scoring what comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from solotune.algorithms.kl import response_kl
from solotune.errors import RewardError
from solotune.rollout.records import FinishReason, Rollouts
from solotune.rollout.settings import SamplingSettings
from solotune.runs.evaluation import Evaluation
from solotune.trainers.sampling import PromptSampler, Texts


def evaluate(
    accelerator: Accelerator,
    policy: Callable[..., Any],
    sampler: PromptSampler,
    n_prompts: int,
    settings: SamplingSettings,
    score: Callable[[Texts], list[Any]],
    metrics_of: Callable[[Texts], list[dict[str, float]]],
    in_memory: Callable[[Callable[[int], list[float]]], list[float]],
    measures_kl: bool = True,
    told: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Sample every evaluation prompt once, each with random numbers of its own that are the same at every evaluation.

    Processes share the prompts out; every process returns the whole evaluation. `score` and `metrics_of` are called by
    every process, with no texts where it has no prompts; a score of None is no score. `in_memory` calls what it is
    given with the rows of a pass. `told` hears what is being done.
    """
    mine = list(range(accelerator.process_index, n_prompts, accelerator.num_processes))
    texts, kls, finishes = Texts([], [], [], {}), [], []
    if mine:
        told("sampling")
        rollouts = sampler(mine, mine, settings, told=told)
        texts = sampler.texts(rollouts, settings.stop_strings)
        kls: list[Any] = [None] * len(mine)
        if measures_kl:
            told("measuring")
            kls = in_memory(lambda micro_batch: _kls(policy, rollouts, settings.temperature, micro_batch))
        finishes = [FinishReason(finish).name.lower() for finish in rollouts.finish_N.tolist()]
    told("scoring")
    rows = [
        {
            "index": index,
            "prompt": prompt,
            "output": output,
            "reward": None if value is None else float(sum(value) if isinstance(value, list) else value),
            "kl": kl,
            "finish": finish,
            "metrics": metrics,
        }
        for index, prompt, output, value, kl, finish, metrics in zip(
            mine, texts.prompts, texts.outputs, score(texts), kls, finishes, metrics_of(texts), strict=True
        )
    ]
    gathered = sorted(gather_object(rows), key=lambda row: row["index"])
    metrics = [row.pop("metrics") for row in gathered]
    samples = [{key: value for key, value in row.items() if key != "index"} for row in gathered]
    means = {name: _mean(metrics, name) or 0.0 for name in (metrics[0] if metrics else {})}
    return Evaluation(_mean(samples, "reward"), _mean(samples, "kl"), samples, means)


def sample_metrics(metric_fn: Callable[..., dict[str, Any]] | None, texts: Texts) -> list[dict[str, float]]:
    """What `metric_fn` says of each sample; a single number stands for all of them.

    Raises:
        RewardError: it raised, or returned another number of values.
    """
    n = len(texts.samples)
    if metric_fn is None:
        return [{} for _ in range(n)]
    try:
        named = metric_fn(samples=texts.samples, prompts=texts.prompts, outputs=texts.outputs, **texts.metadata)
    except Exception as error:
        raise RewardError(f"metric_fn raised {type(error).__name__}: {error}") from error
    if not isinstance(named, Mapping):
        raise RewardError(f"metric_fn returned a {type(named).__name__}: it has to be a mapping of names to numbers")
    columns = {}
    for name, values in named.items():
        try:
            column = torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(f"metric_fn returned no numbers for {name!r}: {str(values)[:80]!r}") from error
        if len(column) not in (1, n):
            raise RewardError(
                f"metric_fn returned {len(column)} values for {name!r}; allowed are {n}, one a sample, or 1"
            )
        columns[name] = column * n if len(column) == 1 else column
    return [{name: column[row] for name, column in columns.items()} for row in range(n)]


@torch.no_grad()
def _kls(policy: Callable[..., Any], rollouts: Rollouts, temperature: float, micro_batch: int) -> list[float]:
    kls: list[float] = []
    for rows in torch.arange(rollouts.n_rollouts).split(micro_batch):
        part = rollouts.select(rows.to(rollouts.finish_N.device))
        measured = policy("measure", part, temperature)
        kls += response_kl(measured.logprobs_bT, measured.ref_logprobs_bT, part.response_mask_NT).tolist()
    return kls


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None
