"""The RFT trainer, to be subclassed as in trlX, and its method's settings."""

from solotune.compat.trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer
from solotune.config import RFTConfig
from solotune.trainers.rft import RFTTrainer

__all__ = ["AccelerateRFTTrainer", "RFTConfig"]


class AccelerateRFTTrainer(RFTTrainer, AccelerateRLTrainer):
    """This project's RFT trainer."""
