"""Supervised fine-tuning on texts and dialogues; the loop is that of `trainers/offline.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from solotune.algorithms.sft import sft_loss
from solotune.config import SFTConfig
from solotune.data.batches import Batch
from solotune.trainers.offline import OfflineTrainer
from solotune.trainers.registry import register_trainer


@register_trainer("AccelerateSFTTrainer")
@register_trainer
class SFTTrainer(OfflineTrainer):
    """Tunes a language model to continue prompts as the samples do; see `OfflineTrainer` for the arguments."""

    METHOD = SFTConfig
    LOSSES = ("objective/loss",)

    def losses(self, batch: Batch, trunk_MH: Tensor | None, chosen: Tensor, tokens: Tensor) -> Tensor:
        """The mean negative log-probability of the outputs' tokens, nats."""
        return torch.stack([sft_loss(self.policy("learn", batch, trunk_MH), batch.counts_N, tokens)])
