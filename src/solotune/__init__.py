"""Reinforcement learning from human feedback for language models on one GPU.

import solotune

solotune.train("gpt2", reward_fn=lambda samples, **_: [s.count("cats") for s in samples], prompts=["I like"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from solotune.version import __version__ as __version__

if TYPE_CHECKING:
    from solotune.config import (
        DataConfig,
        ILQLConfig,
        MethodConfig,
        ModelConfig,
        OptimizerConfig,
        PPOConfig,
        Recipe,
        RewardConfig,
        RFTConfig,
        SchedulerConfig,
        SFTConfig,
        TokenizerConfig,
        TrainConfig,
        TRLConfig,
        default_ilql_config,
        default_ppo_config,
        default_sft_config,
        quickstart_config,
    )
    from solotune.runs.start import train

__all__ = [
    "DataConfig",
    "ILQLConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "RFTConfig",
    "Recipe",
    "RewardConfig",
    "SFTConfig",
    "SchedulerConfig",
    "TRLConfig",
    "TokenizerConfig",
    "TrainConfig",
    "default_ilql_config",
    "default_ppo_config",
    "default_sft_config",
    "quickstart_config",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import on first use: the configuration alone does not need torch."""
    if name == "logging":  # of `import solotune as trlx`
        return import_module("solotune.compat.trlx.utils.logging")
    if name not in __all__:
        raise AttributeError(f"module 'solotune' has no attribute {name!r}")
    return getattr(import_module("solotune.runs.start" if name == "train" else "solotune.config"), name)
