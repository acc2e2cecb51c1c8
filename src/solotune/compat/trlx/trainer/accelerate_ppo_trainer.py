"""The PPO trainer, to be subclassed as in trlX."""

from solotune.compat.trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer
from solotune.trainers.ppo import PPOTrainer

__all__ = ["AcceleratePPOTrainer"]


class AcceleratePPOTrainer(PPOTrainer, AccelerateRLTrainer):
    """This project's PPO trainer."""
