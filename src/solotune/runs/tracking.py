"""Experiment trackers, through `accelerate`: the same numbers under this project's names and under trlX's."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from solotune.errors import ConfigError, MissingExtraError
from solotune.runs.evaluation import Evaluation
from solotune.runs.lines import append_lines

if TYPE_CHECKING:
    from solotune.config import TRLConfig

log = logging.getLogger("solotune")

TRLX_NAMES = {
    "objective/loss": "loss",
    "objective/score": "rollout_scores/mean",
    "objective/score_std": "rollout_scores/std",
    "objective/kl_coef": "kl_ctl_value",
    "policy/loss": "losses/policy_loss",
    "policy/lr": "learning_rate_group_0",
    "policy/ratio": "ratio",
    "policy/awac_loss": "losses/loss_awac",
    "policy/cql_loss": "losses/loss_cql",
    "rollout/selected": "len_samples_selected",
    "value/loss": "losses/value_loss",
    "value/q_loss": "losses/loss_q",
    "value/v_loss": "losses/loss_v",
    "value/mean": "values/mean",
    "value/clipfrac": "values/clipfrac",
    "time/sample": "time/rollout_generate",
    "time/score": "time/rollout_score",
    "time/update": "time/backward",
    "time/evaluate": "time/generate",
}
"""Metrics that trlX logged under another name; `policy/approx_kl` and `policy/clipfrac` it called the same."""


def available_tracker(name: str | None) -> str | None:
    """`name`, where accelerate can log to it.

    Raises:
        MissingExtraError: it is not installed.
    """
    if name is not None and name not in {str(tracker) for tracker in get_available_trackers()}:
        raise MissingExtraError(
            f"train.tracker is {name!r}, which is not installed: pip install {name}, or 'solotune[trackers]' for wandb "
            "and tensorboard; null for none"
        )
    return name


VALUES_FILE = "SOLOTUNE_VALUES_FILE"
"""In the environment: a file that gets every number that trackers get, one JSON line each time. Sweeps read it."""


def start(accelerator: Accelerator, config: TRLConfig, run_name: str) -> None:
    """Open the tracker of `train.tracker`, with the run's name, entity, group and tags where it is W&B; and the file
    that `SOLOTUNE_VALUES_FILE` names.

    Raises:
        ConfigError: the tracker refused to start, such as W&B without a login.
    """
    if config.train.tracker is not None:
        _start_chosen(accelerator, config, run_name)
    if (path := os.environ.get(VALUES_FILE)) and accelerator.is_main_process:
        accelerator.trackers.append(_ValuesFile(Path(path)))


class _ValuesFile(GeneralTracker):
    """A tracker that appends to a file of JSON lines: `step` and the numbers logged at it."""

    name = "values_file"
    requires_logging_directory = False

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        return self.path

    def log(self, values: dict[str, Any], step: int | None = None, **_options: Any) -> None:
        append_lines(self.path, [{"step": step, **values}])


def _start_chosen(accelerator: Accelerator, config: TRLConfig, run_name: str) -> None:
    train = config.train
    wandb = {"name": run_name, "entity": train.entity_name, "group": train.group_name, "tags": train.tags or None}
    if os.environ.get("debug"):  # noqa: SIM112  trlX's switch
        wandb["mode"] = "disabled"
    options = {"wandb": {key: value for key, value in wandb.items() if value is not None}}
    try:
        accelerator.init_trackers(train.project_name, config=_flat(config.to_dict()), init_kwargs=options)
    except Exception as error:  # every tracker has its own
        raise ConfigError(
            f"train.tracker {train.tracker!r} did not start: {type(error).__name__}: {error}. Set it up, or choose "
            "train.tracker: null; the same numbers are in metrics.jsonl"
        ) from error
    for tracker in accelerator.trackers:
        if tracker.name == "mlflow":
            tracker.log = partial(_log_to_mlflow, tracker.log)


def mlflow_name(name: str) -> str:
    """A metric's name in the characters that MLflow takes: `reward/mean@beta=1` is `reward/mean_at_beta_1` there."""
    return re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_"))


def _log_to_mlflow(log_values: Callable[..., None], values: dict[str, Any], *args: Any, **options: Any) -> None:
    log_values({mlflow_name(name): value for name, value in values.items()}, *args, **options)


def round_names(metrics: dict[str, Any], vf_coef: float) -> dict[str, Any]:
    """A round's metrics, and beside them those that trlX had, under its names."""
    named = {TRLX_NAMES[name]: value for name, value in metrics.items() if name in TRLX_NAMES}
    if {"objective/kl", "rollout/response_tokens"} <= metrics.keys():
        kl, tokens = max(metrics["objective/kl"], 0.0), max(metrics["rollout/response_tokens"], 1.0)
        named |= {"policy/sqrt_kl": math.sqrt(kl), "policy/kl_per_token": math.sqrt(kl / tokens)}
    if {"policy/loss", "value/loss"} <= metrics.keys():
        named["losses/total_loss"] = metrics["policy/loss"] + vf_coef * metrics["value/loss"]
    if "value/q_loss" in metrics:  # ILQL
        named["losses/loss"] = named.pop("loss")
    if {"time/sample", "time/score"} <= metrics.keys():
        named["time/rollout_time"] = metrics["time/sample"] + metrics["time/score"]
    return {**metrics, **named}


def evaluation_names(evaluation: Evaluation, label: str = "") -> dict[str, float]:
    """An evaluation's means under both names; `label` is that of a sweep, such as `@temperature=0.7`."""
    given = {"eval/reward": evaluation.reward, "eval/kl": evaluation.kl, "reward/mean": evaluation.reward}
    named = {name: value for name, value in given.items() if value is not None}
    named |= {f"metrics/{name}": value for name, value in evaluation.metrics.items()}
    return {f"{name}{label}": value for name, value in named.items()}


def log_samples(accelerator: Accelerator, evaluation: Evaluation, step: int, label: str = "") -> None:
    """The evaluation's samples as a table, where the tracker has tables (W&B)."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_table"):
            columns = ["prompt", "output", "reward"]
            rows = [[sample[column] for column in columns] for sample in evaluation.samples]
            tracker.log_table(f"samples{label}", columns=columns, data=rows, step=step)  # type: ignore[attr-defined]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, with values every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, (int, float, str, bool))
            flat[f"{prefix}{key}"] = value if plain else json.dumps(value, default=str)
    return flat
