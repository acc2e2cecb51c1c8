"""Reward functions: Python callables, text classifiers, and reward models trained from human feedback."""

from solotune.rewards.build import build_reward
from solotune.rewards.functions import arguments_for, load_function, score

__all__ = ["arguments_for", "build_reward", "load_function", "score"]
