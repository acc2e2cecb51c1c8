"""Trainers and pipelines by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from solotune.compat.trlx.pipeline.offline_pipeline import PromptPipeline
from solotune.trainers import registry
from solotune.trainers.registry import get_trainer

__all__ = ["get_pipeline", "get_trainer"]


def get_pipeline(name: str) -> Callable[..., Any]:
    """The pipeline class called `name` in any case.

    Raises:
        ConfigError: nobody registered it; names those that are known.
    """
    return registry.get_pipeline(name) or PromptPipeline
