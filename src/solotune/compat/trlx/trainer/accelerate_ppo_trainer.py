"""The PPO trainer, to be subclassed as in trlX."""

from __future__ import annotations

from typing import Any

from solotune.errors import NotYetError
from solotune.trainers.ppo import PPOTrainer

INSTEAD = {
    "make_experience": "sample_rollouts, credit",
    "loss": "optimizer_step, or PPOConfig.loss in a method of your own",
    "decode": "score, which gets the decoded texts",
    "prepare_learning": "learn",
    "create_train_dataloader": "update",
    "get_arch": "__init__, after super().__init__(), where self.model is loaded",
}
"""What trlX's trainer called, and what this one calls in its place."""


class AcceleratePPOTrainer(PPOTrainer):
    """This project's PPO trainer. Overriding a method of trlX's that is never called here is an error, not silence."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in INSTEAD.keys() & vars(cls).keys():
            raise NotYetError(f"{cls.__name__}.{name} would never be called here; override {INSTEAD[name]}")


__all__ = ["AcceleratePPOTrainer"]
