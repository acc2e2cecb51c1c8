"""The base of every trainer."""

from solotune.trainers.base import Trainer as AccelerateRLTrainer

__all__ = ["AccelerateRLTrainer"]
