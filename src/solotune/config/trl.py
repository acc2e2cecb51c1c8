"""`TRLConfig`: trlX's configuration, and the rules between its sections."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from solotune.config.methods.base import MethodConfig, get_method
from solotune.config.plans import Plan
from solotune.config.secrets import secrets_in
from solotune.config.section import Section, build_section, field_values
from solotune.config.sections import ModelConfig, OptimizerConfig, SchedulerConfig, TokenizerConfig, TrainConfig
from solotune.config.values import STRICT, nearest
from solotune.config.yaml import merged, plain, read_yaml, to_yaml
from solotune.errors import ConfigError
from solotune.rollout.settings import LIST_VALUED

_SECTIONS: dict[str, type] = {
    "method": MethodConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
    "tokenizer": TokenizerConfig,
    "train": TrainConfig,
}


def _build_method(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    if "name" not in values:
        raise ConfigError("method.name is missing: the name of the method, e.g. PPOConfig")
    return build_section(get_method(values["name"]), values)


@dataclass(config=STRICT)
class TRLConfig(Section):
    """All settings of a training run; sections in trlX's order."""

    method: Annotated[MethodConfig, BeforeValidator(_build_method)]
    model: ModelConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    tokenizer: TokenizerConfig
    train: TrainConfig

    SECTIONS: ClassVar[dict[str, type]] = _SECTIONS
    AS_TRLX: ClassVar[bool] = False  # uneven batches, prompts cut to fit, the EOS in what rewards see: see docs/trlx.md

    def check(self) -> None:
        """Raises ConfigError where settings of one section or of two contradict each other."""
        for name in _SECTIONS:
            getattr(self, name).check()
        problems = [
            *secrets_in(self.to_dict()),
            *_nothing_trains(self),
            *_quantization_problems(self),
            *_generation_problems(self),
            *self.method.problems(self.train, self.AS_TRLX),
        ]
        if problems:
            raise ConfigError("\n".join(problems))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TRLConfig":
        """The configuration in a mapping of sections, which is not changed.

        Raises:
            ConfigError: every problem of every section, one a line.
        """
        return cls(**build_sections(config, cls.SECTIONS))

    def to_dict(self) -> dict[str, Any]:
        """Sections as dicts, all of them copies; objects (a model given as one) are the same objects."""
        return field_values(self)

    @classmethod
    def load_yaml(cls, path: str | os.PathLike[str]) -> "TRLConfig":
        """The configuration in a YAML file; a recipe, which has `data` and `reward` too, is for `Recipe.load_yaml`."""
        values = read_yaml(path)
        with naming(path):
            return cls.from_dict(values)

    def save_yaml(self, path: str | os.PathLike[str]) -> None:
        """Writes what `load_yaml` reads back as an equal configuration."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(to_yaml(writable(self.to_dict())))

    def evolve(self, **sections: Any) -> "TRLConfig":
        """A new configuration with the given settings merged in: `evolve(train=dict(batch_size=8))`."""
        return type(self).from_dict(merged(self.to_dict(), sections))

    @classmethod
    def update(cls, baseconfig: "Mapping[str, Any] | TRLConfig", config: Mapping[str, Any]) -> "TRLConfig":
        """A new configuration: `baseconfig` with nested or dotted settings (`"optimizer.kwargs.lr": 1e-5`) merged in.

        Keys may be new in free dicts (`gen_kwargs`, `kwargs`); any other unknown name is an error.
        """
        base = baseconfig.to_dict() if isinstance(baseconfig, TRLConfig) else baseconfig
        return cls.from_dict(merged(base, config))

    def __str__(self) -> str:
        return json.dumps(plain(writable(self.to_dict())), indent=4)


# ---- rules between sections ---------------------------------------------------------------------------------------


def _nothing_trains(config: TRLConfig) -> Iterable[str]:
    model = config.model
    if config.method.HEADS == "q":  # they train even with every block frozen
        return
    if model.num_layers_unfrozen == 0 and model.peft_config is None and model.delta_kwargs is None:
        yield (
            "model.num_layers_unfrozen = 0: nothing would train without LoRA; must be -1 (everything) or at least 1, "
            "or give model.peft_config"
        )


def _quantization_problems(config: TRLConfig) -> Iterable[str]:
    if config.model.quantization is None:
        return
    where = f"model.quantization = {config.model.quantization}"
    if getattr(config.method, "num_value_layers_unfrozen", 0):
        yield f"{where}: weights in so few bits cannot be trained; set method.num_value_layers_unfrozen to 0"
    if not isinstance(config.model.model_path, str):
        yield f"{where}: model.model_path must be a name or a folder, whose weights are quantised as they are read"


def _generation_problems(config: TRLConfig) -> Iterable[str]:
    for field_name in ("gen_kwargs", "gen_experience_kwargs"):
        kwargs = getattr(config.method, field_name, None)
        if not isinstance(kwargs, dict):
            continue
        path = f"method.{field_name}.max_new_tokens"
        given = kwargs.get("max_new_tokens")
        if given is None:
            yield f"{path} is missing: how many tokens a response may have, less than train.seq_length"
            continue
        swept = [name for name, values in kwargs.items() if isinstance(values, list) and name not in LIST_VALUED]
        if len(swept) > 1:
            yield f"method.{field_name} has lists for {' and '.join(swept)}: a sweep takes one list at a time"
        if [] in kwargs.values():
            name = next(name for name, value in kwargs.items() if value == [])
            yield f"method.{field_name}.{name} = []: an empty list sweeps over nothing"
        for new_tokens in given if isinstance(given, list) else [given]:
            if new_tokens >= config.train.seq_length:
                yield (
                    f"{path} = {new_tokens}: must be less than train.seq_length, which is {config.train.seq_length} "
                    "and has to hold the prompt as well"
                )


# ---- reading and writing -----------------------------------------------------------------------------------------


def build_sections(values: Any, sections: Mapping[str, type], optional: Iterable[str] = ()) -> dict[str, Any]:
    """One object a section; the problems of all sections are collected."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"a configuration must be a mapping of {', '.join(sections)}, not {type(values).__name__}")
    built, problems = {}, []
    for name in values:
        if name not in sections:
            settings = [] if isinstance(values[name], Mapping) else _dotted_names(values, sections)
            problems.append(f"unknown section {name}: {nearest(str(name), [*sections, *settings])}")
    for name, cls in sections.items():
        if values.get(name) is None and name in optional:
            continue
        if name not in values:
            problems.append(f"section {name} is missing")
            continue
        try:
            section = values[name]
            built[name] = build_section(cls, section) if cls is not MethodConfig else _built_method(section)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return built


def _built_method(values: Any) -> Any:
    if isinstance(values, MethodConfig):
        return build_section(type(values), values)
    if not isinstance(values, Mapping):
        return build_section(MethodConfig, values)
    return _build_method(values)


def _dotted_names(values: Mapping[str, Any], sections: Iterable[str]) -> Iterable[str]:
    """train.seed, optimizer.kwargs.lr, ...: for the hint on a setting that was given without its section."""
    for section in sections:
        settings = values.get(section)
        for name, value in settings.items() if isinstance(settings, Mapping) else ():
            yield f"{section}.{name}"
            if isinstance(value, Mapping):
                yield from (f"{section}.{name}.{key}" for key in value)


def writable(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with a model object replaced by its name and, for the parameter tree, its architecture."""
    model = dict(values["model"])
    given = model["model_path"]
    if not isinstance(given, str):
        architecture = getattr(given, "config", given)
        model["model_path"] = getattr(architecture, "_name_or_path", "") or f"<{type(given).__name__}>"
        model["architecture"] = model["architecture"] or plain(architecture.to_dict())
    return {**values, "model": model}


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the file's name before the problems that are found in its settings."""
    try:
        yield
    except ConfigError as error:
        problems = str(error).splitlines()
        between = " " if len(problems) == 1 else "\n  "
        raise ConfigError(between.join([f"{os.fspath(path)}:", *problems])) from None


def describe_steps(config: TRLConfig) -> Plan:
    """How many rounds and optimizer steps a run takes of a method that samples itself, and which setting ends it.

    As in trlX, of PPO: total steps = min(train.total_steps, epochs * ppo_epochs * num_rollouts / batch_size), rounded
    up.

    Raises:
        ConfigError: the method learns from given samples, and counts by how many there are.
    """
    method = config.method
    if not method.samples_itself:
        raise ConfigError(f"method.name = {method.name!r}: its steps are counted by the samples it is given")
    return method.plan(config.train)
