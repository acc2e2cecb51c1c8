"""How settings are checked: human numbers, unknown names with the nearest known one, one line a problem.

`Section` is the base of every configuration class. Its subclasses are dataclasses, pydantic's (ours) or the standard
library's (people write `@dataclass class MyConfig(MethodConfig)`); both are validated, and both raise `ConfigError`.
"""

import dataclasses
import difflib
import functools
import numbers
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, get_args

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from solotune.data.tables import is_unicode
from solotune.errors import ConfigError

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

# What YAML 1.1 takes for a string and people mean as a number: 1e-4, 2.5E3, -1e6.
EXPONENT_NUMBER = re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$")


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean X?' where one of `known` is close to `name`, else the list of what is known."""
    known = sorted(known)
    lowered = {other.lower(): other for other in reversed(known)}
    same_end_or_start = sorted((k for k in known if k.endswith(f".{name}") or k.startswith(name)), key=len)
    match = same_end_or_start or [lowered[m] for m in difflib.get_close_matches(name.lower(), lowered, n=1)]
    return f"did you mean {match[0]}?" if match else f"known: {', '.join(known)}"


def shown(value: object) -> str:
    """A value as it is quoted in an error: at most about 80 characters."""
    short = _Short()
    short.maxstring = short.maxother = 80
    return short.repr(value)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return f"a number of {x.bit_length()} bits" if x.bit_length() > _MOST_BITS else super().repr_int(x, level)


# ---- values -------------------------------------------------------------------------------------------------------


def number(value: Any) -> Any:
    """`value` as a float where it is an exponent number that YAML 1.1 left a string, else unchanged."""
    return float(value) if isinstance(value, str) and EXPONENT_NUMBER.match(value) else value


def whole_number(value: Any) -> int:
    """`value` as an int; 2.0 and '1e4' are whole numbers, True and 2.5 are not."""
    value = number(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not _as_float(value).is_integer():
        raise ValueError("must be a whole number")
    return value if isinstance(value, int) else int(float(value))


def real_number(value: Any) -> float:
    """`value` as a float; ints and '1e-4' are numbers, True and '0.1' are not."""
    value = number(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError("must be a number")
    return _as_float(value)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError("must be a number that a float can hold") from None


def own_copy(value: Any) -> Any:
    """A copy of nested dicts and lists (tuples become lists, as YAML has none); other objects are shared.

    Raises:
        ConfigError: see `check_values`.
    """
    check_values(value)
    return _copied(value)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value


_MOST_LEVELS, _MOST_VALUES, _MOST_BITS = 60, 20_000_000, 1024


def check_values(value: Any) -> None:
    """That nested dicts and lists can be walked and written: YAML's aliases make lists that hold themselves, and a few
    lines of them stand for more values than any memory holds.

    Raises:
        ConfigError: too deep or too many, a text that is no Unicode, or a number that not even a float holds.
    """
    _measure(value, 0, {})


def _measure(value: Any, level: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values there are with every alias written out, and how many levels below this one."""
    if isinstance(value, str):
        if not is_unicode(value):
            raise ConfigError(f"{shown(value)} is no text: it holds half of a surrogate pair")
        return 1, 0
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ConfigError(f"{shown(value)} is more than any setting takes")
    if not isinstance(value, Mapping | list | tuple):
        return 1, 0
    count, depth = known.get(id(value), (0, 0))
    if count == 0 and level <= _MOST_LEVELS:
        items = [*value, *value.values()] if isinstance(value, Mapping) else value
        measured = [_measure(item, level + 1, known) for item in items]
        count = 1 + sum(count for count, _ in measured)
        depth = 1 + max((depth for _, depth in measured), default=0)
        known[id(value)] = count, depth
    if level + depth > _MOST_LEVELS:
        raise ConfigError(f"lists and mappings may be nested {_MOST_LEVELS} levels deep, and not hold themselves")
    if count > _MOST_VALUES:
        raise ConfigError(f"aliases (&name, *name) stand for {count:.1e} values; allowed are {_MOST_VALUES:,}")
    return count, depth


class FreeKeyError(ValueError):
    """What is wrong with one key of a free dict, for validators: `path.key = value: message`."""

    def __init__(self, key: str, value: Any, message: str) -> None:
        super().__init__(message)
        self.key, self.value = key, value


def _free_dict(value: Any) -> dict[str, Any]:
    if value is None:  # `kwargs:` with nothing after it
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError("must be a mapping of names to values")
    return own_copy(value)


def _number_dict(value: Any) -> dict[str, Any]:
    return {key: number(item) for key, item in _free_dict(value).items()}


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Flag = StrictBool
Whole = Annotated[int, BeforeValidator(whole_number)]
PositiveInt = Annotated[int, BeforeValidator(whole_number), Field(ge=1)]
CountInt = Annotated[int, BeforeValidator(whole_number), Field(ge=0)]
Real = Annotated[float, BeforeValidator(real_number)]
PositiveReal = Annotated[float, BeforeValidator(real_number), Field(gt=0)]
NonNegativeReal = Annotated[float, BeforeValidator(real_number), Field(ge=0)]
UnitReal = Annotated[float, BeforeValidator(real_number), Field(ge=0, le=1)]
PathText = Annotated[str, BeforeValidator(_path_text), Field(min_length=1)]
FreeDict = Annotated[dict[str, Any], BeforeValidator(_free_dict)]
NumberDict = Annotated[dict[str, Any], BeforeValidator(_number_dict)]  # arguments among which no text looks like 1e-4


# ---- sections -----------------------------------------------------------------------------------------------------


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


# ---- YAML and merging ---------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number and refuses a name that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):  # else the base class says so
            names = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode) and not k.tag.endswith(":merge")]
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which _Loader would read as a number, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Text with line ends other than \\n in double quotes, which escape them; bare, YAML folds them into spaces."""
    style = '"' if any(end in text for end in ("\r", "\x85", "\u2028", "\u2029")) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT_NUMBER, list("-+0123456789."))


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; `source` is named in the error.

    Raises:
        ConfigError: not YAML (line and column are given), a name is given twice, or see `check_values`.
    """
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader
        check_values(value)
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        # Beside YAMLError, what PyYAML's constructors raise where a tag does not fit its value: !!bool maybe.
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source} is not valid YAML: it is nested too deeply") from None
    return value


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {os.fspath(path)}: {error}") from None
    content = parse_yaml(text, os.fspath(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{os.fspath(path)} holds {shown(content)}: must be a mapping of sections such as train:")
    return content


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML text of plain values (see `plain`), in the order given."""
    return yaml.dump(plain(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def plain(value: Any) -> Any:
    """`value` in the types that YAML and JSON have; an object that has none is written as <its type>."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(getattr(value, "value", value))  # a str enum is its value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    return f"<{type(value).__name__}>"


def merged(base: Mapping[str, Any], changes: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """A copy of `base` with `changes` merged in; dicts are merged, everything else is replaced.

    A key may be dotted (`optimizer.kwargs.lr`) where it names a section or a setting; deeper keys are taken as they
    are, since the keys of free dicts (a LoRA `rank_pattern`) hold dots of their own. Later keys win.

    Raises:
        ConfigError: one of them is no mapping, or see `check_values`.
    """
    for values in (base, changes):
        if not isinstance(values, Mapping):
            raise ConfigError(f"{shown(values)}: settings must be a mapping of names to values")
    if depth == 0:
        check_values(changes)
    result = own_copy(base)
    for key, value in changes.items():
        head, dot, rest = str(key).partition(".") if depth < 2 else (str(key), "", "")
        if dot:
            value = {rest: value}
        elif isinstance(value, Section):
            result[head] = field_values(value)
            continue
        old = result.get(head)
        old = field_values(old) if isinstance(old, Section) else old
        if isinstance(value, Mapping):
            result[head] = merged(old if isinstance(old, Mapping) else {}, value, depth + 1)
        else:
            result[head] = own_copy(value)
    return result
