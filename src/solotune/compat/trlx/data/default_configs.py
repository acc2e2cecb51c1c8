"""trlX's default configurations."""

from __future__ import annotations

from typing import Any

from solotune import config as ours
from solotune.compat.trlx.data.configs import (
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    TRLConfig,
)
from solotune.config import ILQLConfig, PPOConfig, RFTConfig, SFTConfig
from solotune.errors import NotYetError

__all__ = [
    "ILQLConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "RFTConfig",
    "SFTConfig",
    "SchedulerConfig",
    "TRLConfig",
    "TokenizerConfig",
    "TrainConfig",
    "default_ilql_config",
    "default_nemo_1_3b_config",
    "default_nemo_2b_config",
    "default_nemo_20b_config",
    "default_ppo_config",
    "default_sft_config",
]


def _as_trlx(config: ours.TRLConfig) -> TRLConfig:
    """With trlX's own tracker, folder and project name in place of this project's."""
    sections = config.to_dict()
    for name in ("tracker", "checkpoint_dir", "project_name"):
        del sections["train"][name]
    return TRLConfig.from_dict(sections)


def default_ppo_config() -> TRLConfig:
    """GPT-2 that knows film reviews, its last two blocks trained."""
    return _as_trlx(ours.default_ppo_config())


def default_ilql_config() -> TRLConfig:
    """GPT-2, everything trained, by implicit language Q-learning."""
    return _as_trlx(ours.default_ilql_config())


def default_sft_config() -> TRLConfig:
    """GPT-2, everything trained, on given samples."""
    return _as_trlx(ours.default_sft_config())


def _nemo(*args: Any, **kwargs: Any) -> Any:
    """trlX's Megatron configurations."""
    raise NotYetError("NeMo is not supported; default_ppo_config() runs on one GPU, or on several with accelerate")


default_nemo_20b_config = default_nemo_2b_config = default_nemo_1_3b_config = _nemo
