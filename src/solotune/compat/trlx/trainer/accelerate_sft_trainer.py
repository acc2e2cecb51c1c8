"""The SFT trainer; the method is not there yet."""

from solotune.compat.shims import absent

__all__ = ["AccelerateSFTTrainer"]

AccelerateSFTTrainer = absent("AccelerateSFTTrainer", "SFT is not there yet")
