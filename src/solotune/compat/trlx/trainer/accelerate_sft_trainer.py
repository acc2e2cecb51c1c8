"""The SFT trainer, to be subclassed as in trlX."""

from solotune.compat.trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer
from solotune.trainers.sft import SFTTrainer

__all__ = ["AccelerateSFTTrainer"]


class AccelerateSFTTrainer(SFTTrainer, AccelerateRLTrainer):
    """This project's SFT trainer."""
