"""Supervised fine-tuning on texts and dialogues; the loop is that of `trainers/offline.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from solotune.algorithms.sft import sft_loss
from solotune.config import SFTConfig, TRLConfig
from solotune.data.batches import Batch
from solotune.errors import ConfigError
from solotune.trainers.offline import OfflineTrainer
from solotune.trainers.registry import register_trainer


@register_trainer("AccelerateSFTTrainer")
@register_trainer
class SFTTrainer(OfflineTrainer):
    """Tunes a language model to continue prompts as the samples do; see `OfflineTrainer` for the arguments."""

    LOSSES = ("objective/loss",)

    def __init__(self, config: TRLConfig, *given: Any, **shared: Any):
        if not isinstance(config.method, SFTConfig):
            raise ConfigError(f"method.name {config.method.name!r} is not SFT; this trainer needs an SFTConfig")
        super().__init__(config, *given, **shared)

    def losses(self, batch: Batch, trunk_MH: Tensor | None, chosen: Tensor, tokens: Tensor) -> Tensor:
        """The mean negative log-probability of the outputs' tokens, nats."""
        return torch.stack([sft_loss(self.policy("learn", batch, trunk_MH), batch.counts_N, tokens)])
