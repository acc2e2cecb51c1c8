"""Method configurations by name."""

from solotune.config import MethodConfig, get_method, register_method

__all__ = ["MethodConfig", "get_method", "register_method"]
