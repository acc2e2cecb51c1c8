"""The RFT trainer; the method is not there yet."""

from solotune.compat.shims import absent
from solotune.config import RFTConfig

__all__ = ["AccelerateRFTTrainer", "RFTConfig"]

AccelerateRFTTrainer = absent("AccelerateRFTTrainer", "RFT is not there yet")
