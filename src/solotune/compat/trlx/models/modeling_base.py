"""The base of trlX's model wrappers."""

from solotune.compat.trlx.models.modeling_ppo import AutoModelForCausalLMWithValueHead as PreTrainedModelWrapper

__all__ = ["PreTrainedModelWrapper"]
