"""Trainers by name."""

from solotune.compat.trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer as BaseRLTrainer
from solotune.trainers.registry import register_trainer

__all__ = ["BaseRLTrainer", "register_trainer"]
