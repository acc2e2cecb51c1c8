"""The ILQL trainer; the method is not there yet."""

from solotune.compat.shims import absent

__all__ = ["AccelerateILQLTrainer"]

AccelerateILQLTrainer = absent("AccelerateILQLTrainer", "ILQL is not there yet")
