"""Trainers by name."""

from solotune.trainers.base import Trainer as BaseRLTrainer
from solotune.trainers.registry import register_trainer

__all__ = ["BaseRLTrainer", "register_trainer"]
