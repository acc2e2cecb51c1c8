"""Pure functions on tensors and masks: advantages, KL, rewards, log-probabilities, losses.

Nothing here knows of models, tokenizers or trainers; everything is importable from this package.
"""

from solotune.algorithms.advantages import Advantages, gae, whiten
from solotune.algorithms.kl import AdaptiveKLController, FixedKLController, KLController, k1, response_kl
from solotune.algorithms.logprobs import LogprobStats, chunked_logprobs
from solotune.algorithms.masks import AllReduce, Moments, ShapeError, masked_mean, masked_moments
from solotune.algorithms.ppo import PPOLoss, explained_variance, ppo_loss
from solotune.algorithms.rewards import RunningMoments, ScaledScores, scale_and_clip, token_rewards

__all__ = [
    "AdaptiveKLController",
    "Advantages",
    "AllReduce",
    "FixedKLController",
    "KLController",
    "LogprobStats",
    "Moments",
    "PPOLoss",
    "RunningMoments",
    "ScaledScores",
    "ShapeError",
    "chunked_logprobs",
    "explained_variance",
    "gae",
    "k1",
    "masked_mean",
    "masked_moments",
    "ppo_loss",
    "response_kl",
    "scale_and_clip",
    "token_rewards",
    "whiten",
]
