"""`Recipe`: a configuration, the data and the reward."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.dataclasses import dataclass

from solotune.config.methods.base import MethodConfig, get_method
from solotune.config.secrets import secrets_in
from solotune.config.section import Section, field_values
from solotune.config.sources import DataConfig, RewardConfig
from solotune.config.trl import TRLConfig, build_sections, naming, writable
from solotune.config.values import STRICT, own_copy
from solotune.config.yaml import merged, parse_yaml, read_yaml, to_yaml
from solotune.errors import ConfigError


@dataclass(config=STRICT)
class Recipe(Section):
    """A configuration, the data and the reward: everything that `solotune train` needs.

    What learns from given samples (SFT, ILQL) needs no reward; where one is given, it scores the evaluations.
    """

    config: TRLConfig
    data: DataConfig
    reward: RewardConfig | None = None

    def check(self) -> None:
        """Raises ConfigError where the method lacks its data or its reward, or a setting holds a secret."""
        problems = list(_data_problems(self.config.method, self.data, self.reward))
        written_out = (
            "prompts",
            "eval_prompts",
            "samples",
            "prompt_template",
            "stop_sequences",
        )  # texts, not names of sources
        data = {k: v for k, v in field_values(self.data).items() if isinstance(v, str) or k not in written_out}
        reward = {} if self.reward is None else field_values(self.reward)
        if problems := [*problems, *secrets_in({"data": data, "reward": reward})]:
            raise ConfigError("\n".join(problems))

    @classmethod
    def from_dict(cls, recipe: Mapping[str, Any]) -> "Recipe":
        """The recipe in a mapping of sections; `versions`, which a saved run has, is left out.

        Raises:
            ConfigError: every problem of every section, one a line.
        """
        given = dict(own_copy(recipe)) if isinstance(recipe, Mapping) else recipe
        if isinstance(given, dict):
            given.pop("versions", None)
        optional = {"reward"} if isinstance(given, dict) and not _needs_reward(given.get("method")) else set()
        built = build_sections(given, TRLConfig.SECTIONS | {"data": DataConfig, "reward": RewardConfig}, optional)
        config = TRLConfig(**{name: built[name] for name in TRLConfig.SECTIONS})
        return cls(config, built["data"], built.get("reward"))

    @classmethod
    def load_yaml(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> "Recipe":
        """The recipe in a YAML file, with settings such as `"method.lam=0.9"` replaced; their values are YAML.

        Raises:
            ConfigError: not a file, not YAML, or what is wrong with its settings.
        """
        values = read_yaml(path)
        for override in overrides:
            values = merged(values, parse_override(override))
        with naming(path):
            return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Sections as dicts, all of them copies: those of the config, then data and reward."""
        reward = {} if self.reward is None else {"reward": field_values(self.reward)}
        return {**self.config.to_dict(), "data": field_values(self.data), **reward}

    def save_yaml(self, path: str | os.PathLike[str], versions: Mapping[str, str] | None = None) -> None:
        """Writes what `load_yaml` reads back as an equal recipe; `versions` (package: version) go along."""
        values = writable(self.to_dict())
        with open(path, "w", encoding="utf-8") as file:
            file.write(to_yaml({**values, "versions": dict(versions)} if versions else values))


def _needs_reward(method: Any) -> bool:
    """Whether a method section, an object or a mapping with the method's name, learns from rewards of what it samples;
    one that is not known is said elsewhere."""
    if isinstance(method, Mapping):
        try:
            return get_method(str(method.get("name"))).LEARNS_FROM == "prompts"
        except ConfigError:
            return True
    return not isinstance(method, MethodConfig) or method.samples_itself


def _data_problems(method: MethodConfig, data: DataConfig, reward: RewardConfig | None) -> Iterable[str]:
    if method.samples_itself:
        if data.samples is not None:
            yield f"data.samples is not used by {method.name}, which learns from what it samples: remove it"
        if data.prompts is None:
            yield f"data.prompts is missing: {method.name} continues prompts"
        if reward is None:
            yield f"section reward is missing: {method.name} learns from rewards of what it samples"
        return
    if data.samples is None:
        yield f"data.samples is missing: {method.name} learns from given samples"
    if data.prompts is not None:
        yield f"data.prompts is not used by {method.name}: remove it (evaluations continue data.eval_prompts)"


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=c` as {"a.b": c}, with c read as YAML.

    Raises:
        ConfigError: no `=`, no dotted name before it, or c is not YAML.
    """
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or "." not in name or not all(name.split(".")):
        raise ConfigError(f"override {text!r}: must be section.setting=value, e.g. train.batch_size=16")
    return {name: parse_yaml(value, f"the value of {text!r}")}
