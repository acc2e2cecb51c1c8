"""`trlx.train`: this project's, with the tracker that a trlX script expects where it names none."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlparse

from solotune.compat.shims import tell_once
from solotune.compat.trlx.data.default_configs import default_ilql_config, default_ppo_config, default_sft_config
from solotune.config import TRLConfig


def train(
    model_path: Any = None,
    reward_fn: Callable[..., Any] | None = None,
    dataset: Any = None,
    samples: Sequence[Any] | None = None,
    rewards: Sequence[float] | None = None,
    prompts: Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
    config: TRLConfig | None = None,
    stop_sequences: Sequence[str] = (),
    logit_mask: Any = None,
) -> Any:
    """See `solotune.train`. W&B is used where it is installed and logged in, or offline; else a log line says so."""
    if logit_mask is not None:
        tell_once("logit_mask is without effect, as in trlX since 0.6")
    if config is None:
        given, rated = (samples, rewards) if dataset is None else dataset
        default = default_ppo_config if given is None else default_sft_config if rated is None else default_ilql_config
        tell_once(f"no config was given: using {default.__name__}()")
        config = default()
    start_from = config.train.resume_from_checkpoint
    if start_from is not None and not os.path.exists(start_from):
        tell_once(f"train.resume_from_checkpoint {start_from!r} is not there yet: starting from the beginning")
        config = config.evolve(train={"resume_from_checkpoint": None})
    if config.train.tracker == "wandb" and (reason := _no_wandb()):
        tell_once(f"no W&B log ({reason}); the same numbers are in metrics.jsonl")
        config = config.evolve(train={"tracker": None})
    from solotune.runs.start import train as ours  # with torch and all

    return ours(
        model_path, reward_fn, dataset, samples, rewards, prompts, eval_prompts, metric_fn, config, stop_sequences
    )


def _no_wandb() -> str | None:
    """Why W&B cannot be used without asking the person anything; None where it can."""
    if importlib.util.find_spec("wandb") is None:
        return "it is not installed"
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("debug"):  # noqa: SIM112
        return None
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    if os.environ.get("WANDB_API_KEY") or _in_netrc(host):
        return None
    return "nobody is logged in; WANDB_MODE=offline writes one without"


def _in_netrc(host: str | None) -> bool:
    try:
        return host is not None and netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
