"""The base of every trainer, to be subclassed as in trlX."""

from __future__ import annotations

from typing import Any

from solotune.errors import NotYetError
from solotune.trainers.base import Trainer
from solotune.trainers.offline import OfflineTrainer

__all__ = ["AccelerateRLTrainer"]

INSTEAD = {
    "add_eval_pipeline": "__init__, which gets eval_prompts",
    "add_prompt_pipeline": "__init__, which gets prompts",
    "create_train_dataloader": "update",
    "decode": "score, which gets the decoded texts",
    "get_arch": "__init__, after super().__init__(), where self.model is loaded",
    "get_model_inputs": "optimizer_step",
    "loss": "optimizer_step, or PPOConfig.loss in a method of your own",
    "make_experience": "sample_rollouts, credit",
    "prepare_learning": "learn",
    "push_to_store": "credit",
    "setup_model": "__init__, after super().__init__(), where self.model is loaded",
    "setup_optimizer": "__init__, after super().__init__(), where self.optimizer is made",
    "setup_scheduler": "__init__, after super().__init__(), where self.scheduler is made",
}
"""What trlX's trainers called, and what is called here in its place."""

OF_SAMPLES = {
    "create_train_dataloader": "rows_at",
    "loss": "losses",
    "make_experience": "__init__, which gets samples (and rewards)",
    "push_to_store": "__init__, which gets samples (and rewards)",
}
"""The same where given samples are learned from."""


class AccelerateRLTrainer(Trainer):
    """This project's base. Overriding a method of trlX's that is never called here is an error, not silence."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        instead = INSTEAD | OF_SAMPLES if issubclass(cls, OfflineTrainer) else INSTEAD
        for name in instead.keys() & vars(cls).keys():
            raise NotYetError(f"{cls.__name__}.{name} would never be called here; override {instead[name]}")
