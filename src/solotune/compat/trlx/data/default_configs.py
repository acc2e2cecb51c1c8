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


def _offline(method: Any, seq_length: int, batch_size: int, lr: float, trainer: str, checkpoints: int) -> TRLConfig:
    return TRLConfig(
        method=method,
        model=ModelConfig(model_path="gpt2", num_layers_unfrozen=-1),
        optimizer=OptimizerConfig(
            name="adamw", kwargs={"lr": lr, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-6}
        ),
        scheduler=SchedulerConfig(name="cosine_annealing", kwargs={"T_max": 1e12, "eta_min": lr}),
        tokenizer=TokenizerConfig(tokenizer_path="gpt2"),
        train=TrainConfig(
            total_steps=1000,
            seq_length=seq_length,
            epochs=100,
            batch_size=batch_size,
            checkpoint_interval=checkpoints,
            eval_interval=100,
            trainer=trainer,
        ),
    )


def default_ilql_config() -> TRLConfig:
    """GPT-2, everything trained, by implicit language Q-learning."""
    return _offline(ILQLConfig(), 64, 128, 5e-5, "AccelerateILQLTrainer", 1000)


def default_sft_config() -> TRLConfig:
    """GPT-2, everything trained, on given samples."""
    return _offline(SFTConfig(), 1024, 8, 1e-4, "AccelerateSFTTrainer", 10000)


def _nemo(*args: Any, **kwargs: Any) -> Any:
    """trlX's Megatron configurations."""
    raise NotYetError("NeMo is not supported; default_ppo_config() runs on one GPU, or on several with accelerate")


default_nemo_20b_config = default_nemo_2b_config = default_nemo_1_3b_config = _nemo
