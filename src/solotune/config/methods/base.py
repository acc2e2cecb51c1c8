"""What every method's settings share, and their registry: `register_method` adds a method of one's own."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, overload

from pydantic.dataclasses import dataclass

from solotune.config.section import Section
from solotune.config.values import STRICT, nearest, shown
from solotune.errors import ConfigError

_METHODS: dict[str, type] = {}
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


def get_method(name: str) -> type:
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
    HEADS: ClassVar[str] = "value"
    """What is learned beside the language model: a "value" head (and a frozen reference), "q" heads, or "none"."""

    name: str

    def check(self) -> None:
        registered = _METHODS.get(self.name.lower())
        if registered is not None and registered not in type(self).__mro__:
            raise ConfigError(
                f"method.name = {shown(self.name)}: names {registered.__name__}, this is {type(self).__name__}"
            )
