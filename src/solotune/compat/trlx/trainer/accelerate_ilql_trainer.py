"""The ILQL trainer, to be subclassed as in trlX."""

from solotune.compat.trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer
from solotune.trainers.ilql import ILQLTrainer

__all__ = ["AccelerateILQLTrainer"]


class AccelerateILQLTrainer(ILQLTrainer, AccelerateRLTrainer):
    """This project's ILQL trainer."""
