"""`Section`, the base of every configuration class, and how what is wrong with its settings is said: a line a problem.

Subclasses are dataclasses, pydantic's (ours) or the standard library's (people write
`@dataclass class MyConfig(MethodConfig)`); both are validated, and both raise `ConfigError`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, get_args

from pydantic import ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from solotune.config.values import STRICT, FreeKeyError, nearest, own_copy, shown
from solotune.errors import ConfigError


class _SectionType(type):
    """Turns what pydantic or a dataclass's own __init__ raises into a ConfigError, for every kind of subclass."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from None


class Section(metaclass=_SectionType):
    """Base of the configuration classes: validated when constructed and when a field is assigned.

    Raises:
        ConfigError: an unknown name, a wrong type or range, or two settings that contradict each other.
    """

    SECTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not _is_validated(type(self)):  # made with the standard library's @dataclass: validate it all the same
            values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # pyright: ignore[reportArgumentType]
            checked = validated_twin(type(self))(**values)
            vars(self).update({name: getattr(checked, name) for name in values})
        self.check()

    def check(self) -> None:
        """Raises ConfigError where settings contradict each other; also to be called after assigning to fields."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not _is_validated(type(self)):
            object.__setattr__(self, name, value)
            return
        try:
            type(self).__pydantic_validator__.validate_assignment(self, name, value)  # pyright: ignore[reportAttributeAccessIssue]
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None


def _is_validated(cls: type) -> bool:
    return "__pydantic_validator__" in cls.__dict__


@functools.cache
def validated_twin(cls: type) -> type:
    """`cls` itself where pydantic validates it, else a validated subclass of it."""
    return cls if _is_validated(cls) else pydantic_dataclass(cls, config=STRICT)


def field_values(section: Any) -> dict[str, Any]:
    """The fields of one section as a dict whose containers are copies; nested sections become dicts."""
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return {name: field_values(v) if isinstance(v, Section) else own_copy(v) for name, v in values.items()}


def build_section(cls: type, values: Any) -> Any:
    """`cls(**values)` without sharing anything with `values`.

    Raises:
        ConfigError: `values` is not a mapping, or what `cls` says of them.
    """
    path = getattr(cls, "SECTION", "") or cls.__name__
    if isinstance(values, cls):
        values = field_values(values)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} = {shown(values)}: must be a mapping of the settings of {cls.__name__}")
    values = {str(key): value for key, value in own_copy(values).items()}
    if not _is_validated(cls):
        validated_twin(cls)(**values)  # names every unknown or missing setting, which a plain dataclass does not
    return cls(**values)


def explain(error: ValidationError, cls: type) -> str:
    """One line for each problem: the setting's path, the value given, what is allowed."""
    return "\n".join(_explain_one(problem, cls) for problem in error.errors(include_url=False))


_WORDING = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "finite_number": "must be a finite number",
    "string_type": "must be text (in YAML, put it in quotes)",
    "string_too_short": "must not be empty",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dataclass_type": "must be a mapping of settings, or a {class_name}",
}


def _explain_one(problem: Any, cls: type) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    names = _field_names(cls, ())
    first, *rest = problem["loc"] or ("",)
    loc = (names[first] if isinstance(first, int) and first < len(names) else first, *rest)  # int: by position
    cause = context.get("error")
    if isinstance(cause, ConfigError):  # it names its settings itself
        return str(cause)
    prefix = getattr(cls, "SECTION", "")
    path = ".".join(str(part) for part in (prefix, *loc) if part != "")
    if kind in ("unexpected_keyword_argument", "no_such_attribute"):
        owner = path.rpartition(".")[0]
        where = f"section {owner}" if owner else cls.__name__
        return f"unknown setting {path} in {where}: {nearest(str(loc[-1]), _field_names(cls, loc[:-1]))}"
    if kind == "unexpected_positional_argument":
        return f"{cls.__name__} takes {len(names)} values, one more was given: {shown(problem['input'])}"
    if kind == "missing":
        return f"{path} is missing"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        hint = nearest(str(problem["input"]), allowed) if len(allowed) > 1 else ""
        wording = f"must be one of {context['expected']}" + (f"; {hint}" if hint.startswith("did") else "")
    elif isinstance(cause, FreeKeyError):
        return f"{path}.{cause.key} = {shown(cause.value)}: {cause}"
    elif cause is not None:
        wording = str(cause)
    else:
        wording = (
            _WORDING[kind].format(**context) if kind in _WORDING else problem["msg"].replace("Input should", "must")
        )
    return f"{path} = {shown(problem['input'])}: {wording}"


def _field_names(cls: type, loc: Iterable[Any]) -> list[str]:
    """Names of the settings at `loc` below `cls`, following fields that are sections (or optional sections)."""
    for part in loc:
        kind = next((f.type for f in dataclasses.fields(cls) if f.name == part), None)  # pyright: ignore[reportArgumentType]
        options = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, Section)]
        if not options:
            return []
        cls = options[0]
    return [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
