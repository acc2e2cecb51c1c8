"""trlX's Megatron model, which is not supported."""

from solotune.compat.shims import absent

__all__ = ["PPOGPT"]

PPOGPT = absent("PPOGPT", "NeMo is not supported; accelerate runs one model on several GPUs")
