"""What the generations of trlX called differently, and names that exist here only to say what became of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from solotune.config.values import own_copy
from solotune.errors import NotYetError

log = logging.getLogger("solotune")

_told: set[str] = set()


def tell_once(line: str) -> None:
    """One log line in a process."""
    if line not in _told:
        _told.add(line)
        log.info("trlX: %s", line)


def absent(name: str, reason: str) -> type:
    """A class that can be imported and subclassed; calling it, or asking it for anything, raises NotYetError."""

    class _Absent(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            raise NotYetError(f"trlx {name}: {reason}")

        def __getattr__(cls, attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            raise NotYetError(f"trlx {name}.{attribute}: {reason}")

    return _Absent(name, (), {"__doc__": reason})


LEARNING_RATE = {  # of v0.3, which had them in `train`
    "learning_rate_init": ("optimizer", "lr"),
    "lr_init": ("optimizer", "lr"),
    "opt_betas": ("optimizer", "betas"),
    "opt_eps": ("optimizer", "eps"),
    "weight_decay": ("optimizer", "weight_decay"),
    "learning_rate_target": ("scheduler", "eta_min"),
    "lr_target": ("scheduler", "eta_min"),
}


def modernised(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of any generation as one of the last; `config` itself is not changed."""
    sections = own_copy(config)
    model, train = sections.get("model"), sections.get("train")
    if isinstance(model, dict):
        if "tokenizer_path" in model:  # v0.3, v0.4
            tell_once("model.tokenizer_path is tokenizer.tokenizer_path")
            sections.setdefault("tokenizer", {"tokenizer_path": model["tokenizer_path"]})
            del model["tokenizer_path"]
        if "model_type" in model:
            tell_once(f"model.model_type {model.pop('model_type')!r} is not needed: train.trainer says it")
    if isinstance(train, dict):
        for name in ("orchestrator", "backend"):
            if name in train:
                tell_once(f"train.{name} {train.pop(name)!r} is not needed: there are no orchestrators")
        if isinstance(kwargs := train.get("trainer_kwargs"), dict) and kwargs.pop("logit_mask", None) is not None:
            tell_once("train.trainer_kwargs.logit_mask is without effect")
        if "trackers" in train:
            trackers = train.pop("trackers")
            first = trackers[0] if isinstance(trackers, list | tuple) and trackers else trackers or None
            tell_once(f"train.trackers {trackers!r} is train.tracker {first!r}")
            train.setdefault("tracker", first)
        for old, (section, new) in LEARNING_RATE.items():
            if old in train:
                tell_once(f"train.{old} is {section}.kwargs.{new}")
                default = {"name": "adamw" if section == "optimizer" else "cosine_annealing", "kwargs": {}}
                target = sections.setdefault(section, default)
                target.setdefault("kwargs", {})[new] = train.pop(old)
        if "lr_ramp_steps" in train or "lr_decay_steps" in train:
            steps = [train.pop(name, None) for name in ("lr_ramp_steps", "lr_decay_steps")][1]
            tell_once("train.lr_ramp_steps and lr_decay_steps are scheduler.kwargs.T_max")
            if steps and "scheduler" in sections:
                sections["scheduler"].setdefault("kwargs", {}).setdefault("T_max", steps)
    return sections
