"""From the `reward:` section of a recipe to a reward function."""

from typing import TYPE_CHECKING

import torch

from solotune.rewards.functions import RewardFunction, load_function

if TYPE_CHECKING:
    from solotune.config import RewardConfig


def build_reward(cfg: "RewardConfig", device: str | torch.device = "cpu") -> RewardFunction:
    """The reward function of a recipe; with `training`, its model is trained first unless an equal one is cached.

    Raises:
        ConfigError, DataError, ModelError, RewardError: the source that the section names cannot be used.
    """
    if cfg.function is not None:
        return load_function(cfg.function)
    # Loading a model imports transformers' model classes: only where a model is asked for.
    from solotune.rewards.classifier import load_classifier, load_reward_model

    if cfg.classifier is not None:
        assert cfg.label is not None
        return load_classifier(cfg.classifier, cfg.label, cfg.transform, cfg.batch_size, device)
    if cfg.model is not None:
        return load_reward_model(cfg.model, cfg.transform, cfg.batch_size, device)
    from solotune.rewards.training import train_reward_model

    assert cfg.training is not None
    return load_reward_model(train_reward_model(cfg.training), cfg.transform, cfg.batch_size, device)
