"""What every method's settings share, and their registry: `register_method` adds a method of one's own."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, TypeVar, overload

from pydantic.dataclasses import dataclass

from solotune.config.plans import Plan
from solotune.config.section import Section
from solotune.config.sections import TrainConfig
from solotune.config.values import STRICT, nearest, shown
from solotune.errors import ConfigError

_METHODS: dict[str, type["MethodConfig"]] = {}
C = TypeVar("C", bound=type)


@overload
def register_method(name: C) -> C: ...
@overload
def register_method(name: str) -> Callable[[C], C]: ...
def register_method(name: Any) -> Any:
    """Class decorator: makes a method config known by its class name, or by `@register_method("name")`; any case."""
    if isinstance(name, str):

        def register(cls: C) -> C:
            _METHODS[name.lower()] = cls
            return cls

        return register
    _METHODS[name.__name__.lower()] = name
    return name


def get_method(name: str) -> type["MethodConfig"]:
    """The method config class registered under `name` (any case).

    Raises:
        ConfigError: nothing is registered under it.
    """
    if not isinstance(name, str) or name.lower() not in _METHODS:
        known = {key: cls.__name__ for key, cls in _METHODS.items()}
        hint = nearest(str(name), [cls if cls.lower() == key else key for key, cls in known.items()])
        raise ConfigError(f"method.name = {shown(name)}: no such method; {hint}")
    return _METHODS[name.lower()]


@dataclass(config=STRICT)
class MethodConfig(Section):
    """Base of the method configs. `name` is what `get_method` finds the class by."""

    SECTION: ClassVar[str] = "method"
    LEARNS_FROM: ClassVar[Literal["prompts", "samples", "rated samples"]] = "prompts"
    """What it is given: prompts that it continues itself, samples, or samples with a reward each."""
    HAS_REFERENCE: ClassVar[bool] = True
    """Whether it needs what the model was at the start: the KL to it is told, and may be a penalty."""
    HEADS: ClassVar[Literal["value", "q", "none"]] = "none"
    """What is learned beside the language model: a critic's "value" head, "q" heads, or "none"."""

    name: str

    @property
    def samples_itself(self) -> bool:
        """Whether it learns from what it samples, and not from given samples."""
        return self.LEARNS_FROM == "prompts"

    @property
    def short_name(self) -> str:
        """What the method is called in a sentence: PPO for PPOConfig."""
        return self.name.removesuffix("Config")

    def plan(self, train: TrainConfig, n_samples: int = 0, n_processes: int = 1) -> Plan:
        """How the method's run counts; see `config.plans`.

        Args:
            n_samples: how many samples are given, of all processes.
        Raises:
            NotImplementedError: a method of one's own does not say it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no plan(): say how its run counts, e.g. by plan_rounds")

    def problems(self, train: TrainConfig, as_trlx: bool) -> Iterable[str]:
        """What does not fit among the method's settings, or beside those of `train`: a line each.

        Args:
            as_trlx: with trlX's tolerance, such as for batches that do not come out even.
        """
        return ()

    def check(self) -> None:
        registered = _METHODS.get(self.name.lower())
        if registered is not None and registered not in type(self).__mro__:
            raise ConfigError(
                f"method.name = {shown(self.name)}: names {registered.__name__}, this is {type(self).__name__}"
            )
