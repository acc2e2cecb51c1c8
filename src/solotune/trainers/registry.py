"""Trainers and prompt pipelines by name (`train.trainer`, `train.pipeline`): the project's, and a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from solotune.config import MethodConfig, TRLConfig
from solotune.config.sections import DEFAULT_TRAINER
from solotune.config.values import nearest, shown
from solotune.errors import ConfigError, NotYetError

_TRAINERS: dict[str, tuple[str, type]] = {}  # by name in lower case: the name as it was given, the class
_PIPELINES: dict[str, tuple[str, type]] = {}
NEMO = ("NeMoPPOTrainer", "NeMoILQLTrainer", "NeMoSFTTrainer")


def _register(registry: dict[str, tuple[str, type]], name: Any) -> Any:
    if isinstance(name, str):

        def register(cls: type) -> type:
            registry[name.lower()] = (name, cls)
            return cls

        return register
    registry[name.__name__.lower()] = (name.__name__, name)
    return name


def register_trainer(name: Any) -> Any:
    """Class decorator, bare or with a name: makes a `Trainer` known to `train.trainer` (any case).

    A trainer that says `METHOD` itself is that method's: it is taken where `train.trainer` is left at its default.
    """
    return _register(_TRAINERS, name)


def register_pipeline(name: Any) -> Any:
    """Class decorator, bare or with a name: makes a pipeline known to `train.pipeline` (any case).

    It is called with (prompts, max_prompt_length, tokenizer) and is a sequence of mappings with `input_ids`; further
    keys are metadata.
    """
    return _register(_PIPELINES, name)


def _known(registry: dict[str, tuple[str, type]]) -> list[str]:
    return [name for name, _ in registry.values()]


def get_trainer(name: str) -> Callable[..., Any]:
    """The trainer class called `name` in any case.

    Raises:
        NotYetError: it is one of NeMo's.
        ConfigError: nobody registered it; names those that are known.
    """
    if name.lower() in _TRAINERS:
        return _TRAINERS[name.lower()][1]
    if name.lower() in {other.lower() for other in NEMO}:
        raise NotYetError(
            f"train.trainer {name!r}: NeMo is not supported; accelerate runs one model on several GPUs. There are "
            f"{', '.join(_known(_TRAINERS))}"
        )
    raise ConfigError(f"train.trainer = {shown(name)}: no such trainer; {nearest(name, _known(_TRAINERS))}")


def get_pipeline(name: str) -> Callable[..., Any] | None:
    """The pipeline class called `name` in any case; None for trlX's own `PromptPipeline`, which is what recipes use.

    Raises:
        ConfigError: nobody registered it; names those that are known.
    """
    if name.lower() in _PIPELINES:
        return _PIPELINES[name.lower()][1]
    if name.lower() == "promptpipeline":
        return None
    raise ConfigError(
        f"train.pipeline = {shown(name)}: no such pipeline; {nearest(name, ['PromptPipeline', *_known(_PIPELINES)])}"
    )


def own_trainer(method: MethodConfig) -> tuple[str, Callable[..., Any]] | None:
    """The name and the class of the trainer that says that this method, or the nearest one it inherits from, is its
    own; None where none says so."""
    for kind in type(method).__mro__:
        own = [(name, cls) for name, cls in _TRAINERS.values() if vars(cls).get("METHOD") is kind]
        if own:
            return next((name, cls) for name, cls in reversed(own) if cls is own[0][1])  # the name it was given last
    return None


def trainer_of(config: TRLConfig) -> Callable[..., Any]:
    """The class that `train.trainer` names, or that of the method where the setting was left at its default.

    Raises:
        NotYetError, ConfigError: as `get_trainer`, or it is another method's; NotYetError: the method has none.
    """
    name, method = config.train.trainer, config.method
    own = own_trainer(method)
    if own is None and name.lower() == DEFAULT_TRAINER.lower():
        raise NotYetError(
            f"method.name {method.name!r} has no trainer: register one that says METHOD = {type(method).__name__}. "
            f"There are {', '.join(_known(_TRAINERS))}"
        )
    found: Any = own[1] if own is not None and name.lower() == DEFAULT_TRAINER.lower() else get_trainer(name)
    if not isinstance(method, getattr(found, "METHOD", MethodConfig)):
        hint = f", or use {own[0]!r}" if own is not None else ""
        raise ConfigError(f"train.trainer = {name!r} does not fit method.name = {method.name!r}; remove it{hint}")
    return found
