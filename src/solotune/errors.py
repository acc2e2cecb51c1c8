"""Errors a user can act on.

Each says the value, what is allowed and what to change; each also inherits the standard exception that a caller
would have caught before.
"""


class SolotuneError(Exception):
    """Base class: the message is meant for the person at the terminal, without a traceback."""


class ConfigError(SolotuneError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class DataError(SolotuneError, ValueError):
    """Prompts, ratings or preference pairs cannot be used as they are."""


class ModelError(SolotuneError, ValueError):
    """A model is not found, cannot be loaded safely, or cannot be split as asked."""


class RewardError(SolotuneError, RuntimeError):
    """A reward function raised, or returned something that is not one finite number per sample (or per token)."""


class CheckpointError(SolotuneError, OSError):
    """A checkpoint cannot be written, or is not what was written; the message names the file and what is left."""


class RunFileError(SolotuneError, OSError):
    """A file of a run cannot be written or read; the message names it and what the disk said."""


class TrainingError(SolotuneError, RuntimeError):
    """Training cannot go on, such as when gradients stay infinite; the message says where the state is."""


class NotYetError(SolotuneError, NotImplementedError):
    """Part of the interface that exists by name and is not implemented yet."""


class MissingExtraError(SolotuneError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""
