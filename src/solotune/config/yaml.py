"""Settings as YAML, in the types that it has, and merged into one another."""

import numbers
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from solotune.config.section import Section, field_values
from solotune.config.values import EXPONENT_NUMBER, check_values, own_copy, shown
from solotune.errors import ConfigError


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
