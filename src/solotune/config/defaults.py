"""trlX's default configurations."""

from solotune.config.methods.base import MethodConfig
from solotune.config.methods.ilql import ILQLConfig
from solotune.config.methods.ppo import PPOConfig
from solotune.config.methods.sft import SFTConfig
from solotune.config.sections import ModelConfig, OptimizerConfig, SchedulerConfig, TokenizerConfig, TrainConfig
from solotune.config.trl import TRLConfig


def default_ppo_config() -> TRLConfig:
    """trlX's defaults: GPT-2 that knows film reviews, its last two blocks trained."""
    train = TrainConfig(
        total_steps=10000, seq_length=1024, epochs=100, batch_size=32, checkpoint_interval=10000, eval_interval=100
    )
    return _defaults(PPOConfig(), ModelConfig(model_path="lvwerra/gpt2-imdb", num_layers_unfrozen=2), 3e-5, train)


def default_ilql_config() -> TRLConfig:
    """trlX's defaults: GPT-2, everything trained, by implicit language Q-learning."""
    train = TrainConfig(
        total_steps=1000, seq_length=64, epochs=100, batch_size=128, checkpoint_interval=1000, eval_interval=100,
        trainer="AccelerateILQLTrainer",
    )  # fmt: skip
    return _defaults(ILQLConfig(), ModelConfig(model_path="gpt2"), 5e-5, train)


def default_sft_config() -> TRLConfig:
    """trlX's defaults: GPT-2, everything trained, on given samples."""
    train = TrainConfig(
        total_steps=1000, seq_length=1024, epochs=100, batch_size=8, checkpoint_interval=10000, eval_interval=100,
        trainer="AccelerateSFTTrainer",
    )  # fmt: skip
    return _defaults(SFTConfig(), ModelConfig(model_path="gpt2"), 1e-4, train)


def _defaults(method: MethodConfig, model: ModelConfig, lr: float, train: TrainConfig) -> TRLConfig:
    """With the optimizer, the (constant) schedule and the tokenizer that all of trlX's defaults have."""
    adamw = {"lr": lr, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-6}
    return TRLConfig(
        method=method,
        model=model,
        optimizer=OptimizerConfig(name="adamw", kwargs=adamw),
        scheduler=SchedulerConfig(name="cosine_annealing", kwargs={"T_max": 1e12, "eta_min": lr}),
        tokenizer=TokenizerConfig(tokenizer_path="gpt2"),
        train=train,
    )


FOR = {"prompts": default_ppo_config, "samples": default_sft_config, "rated samples": default_ilql_config}
"""What is taken for the data of a kind (`MethodConfig.LEARNS_FROM`) where no configuration is given."""
