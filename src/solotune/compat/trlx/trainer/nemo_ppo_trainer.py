"""trlX's trainer on NeMo, which is not supported."""

from solotune.compat.shims import absent

__all__ = ["NeMoPPOTrainer"]

NeMoPPOTrainer = absent("NeMoPPOTrainer", "NeMo is not supported; accelerate runs one model on several GPUs")
