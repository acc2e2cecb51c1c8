"""The configuration: trlX's classes, names and nesting, strict and in YAML; and the recipe, which adds data and reward.

    config = default_ppo_config().evolve(train=dict(batch_size=16), method=dict(num_rollouts=64))
    recipe = Recipe.load_yaml("recipes/quickstart.yaml", overrides=["method.lam=0.9"])

Every value is checked when it is read; an error names the setting, the value given and what is allowed. Nothing here
imports torch or transformers.
"""

from solotune.config.defaults import default_ilql_config, default_ppo_config, default_sft_config
from solotune.config.methods.base import MethodConfig, get_method, register_method
from solotune.config.methods.ilql import ILQLConfig
from solotune.config.methods.ppo import PPOConfig
from solotune.config.methods.rft import RFTConfig
from solotune.config.methods.sft import SFTConfig
from solotune.config.packaged import quickstart_config
from solotune.config.plans import StepPlan
from solotune.config.recipe import Recipe, parse_override
from solotune.config.sections import ModelConfig, OptimizerConfig, SchedulerConfig, TokenizerConfig, TrainConfig
from solotune.config.sources import DataConfig, RewardConfig, RewardTrainingConfig
from solotune.config.trl import TRLConfig, describe_steps

__all__ = [
    "DataConfig",
    "ILQLConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "RFTConfig",
    "Recipe",
    "RewardConfig",
    "RewardTrainingConfig",
    "SFTConfig",
    "SchedulerConfig",
    "StepPlan",
    "TRLConfig",
    "TokenizerConfig",
    "TrainConfig",
    "default_ilql_config",
    "default_ppo_config",
    "default_sft_config",
    "describe_steps",
    "get_method",
    "parse_override",
    "quickstart_config",
    "register_method",
]
