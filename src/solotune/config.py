"""The configuration: trlX's classes, names and nesting, strict and in YAML; and the recipe, which adds data and reward.

    config = default_ppo_config().evolve(train=dict(batch_size=16), method=dict(num_rollouts=64))
    recipe = Recipe.load_yaml("recipes/quickstart.yaml", overrides=["method.lam=0.9"])

Every value is checked when it is read; an error names the setting, the value given and what is allowed. Nothing here
imports torch or transformers.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from solotune.errors import ConfigError
from solotune.methods import (
    ILQLConfig,
    MethodConfig,
    PPOConfig,
    RFTConfig,
    SFTConfig,
    get_method,
    register_method,
)
from solotune.plans import GrowthPlan, StepPlan, plan_growth, plan_rounds
from solotune.rollout.settings import LIST_VALUED
from solotune.secrets import secrets_in
from solotune.sections import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RewardTrainingConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
)
from solotune.validation import (
    STRICT,
    Section,
    build_section,
    field_values,
    merged,
    nearest,
    own_copy,
    parse_yaml,
    plain,
    read_yaml,
    to_yaml,
)

__all__ = [
    "DataConfig",
    "ILQLConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "RFTConfig",
    "Recipe",
    "RewardConfig",
    "RewardTrainingConfig",
    "SFTConfig",
    "SchedulerConfig",
    "StepPlan",
    "TRLConfig",
    "TokenizerConfig",
    "TrainConfig",
    "default_ilql_config",
    "default_ppo_config",
    "default_sft_config",
    "describe_steps",
    "get_method",
    "register_method",
]

_SECTIONS: dict[str, type] = {
    "method": MethodConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
    "tokenizer": TokenizerConfig,
    "train": TrainConfig,
}
_RECIPE_SECTIONS: dict[str, type] = {"data": DataConfig, "reward": RewardConfig}


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
            *_adaptive_kl_problems(self),
            *_max_kl_problems(self),
        ]
        if not self.AS_TRLX:
            problems += _remainder_problems(self)
        if problems:
            raise ConfigError("\n".join(problems))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TRLConfig":
        """The configuration in a mapping of sections, which is not changed.

        Raises:
            ConfigError: every problem of every section, one a line.
        """
        return cls(**_build_sections(config, cls.SECTIONS))

    def to_dict(self) -> dict[str, Any]:
        """Sections as dicts, all of them copies; objects (a model given as one) are the same objects."""
        return field_values(self)

    @classmethod
    def load_yaml(cls, path: str | os.PathLike[str]) -> "TRLConfig":
        """The configuration in a YAML file; a recipe, which has `data` and `reward` too, is for `Recipe.load_yaml`."""
        values = read_yaml(path)
        with _naming(path):
            return cls.from_dict(values)

    def save_yaml(self, path: str | os.PathLike[str]) -> None:
        """Writes what `load_yaml` reads back as an equal configuration."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(to_yaml(_writable(self.to_dict())))

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
        return json.dumps(plain(_writable(self.to_dict())), indent=4)


# ---- rules between sections ---------------------------------------------------------------------------------------


def _nothing_trains(config: TRLConfig) -> Iterable[str]:
    model = config.model
    if isinstance(config.method, ILQLConfig):  # its Q and V heads train even with every block frozen
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


def _adaptive_kl_problems(config: TRLConfig) -> Iterable[str]:
    method = config.method
    if not isinstance(method, PPOConfig):
        return
    if method.target is not None and method.init_kl_coef == 0:
        yield "method.init_kl_coef = 0: must be greater than 0 with method.target, which multiplies it"
    if method.target is not None and method.num_rollouts >= 5 * method.horizon:
        yield (
            f"method.horizon = {method.horizon:g}: must be greater than a fifth of method.num_rollouts, which is "
            f"{method.num_rollouts}"
        )


def _max_kl_problems(config: TRLConfig) -> Iterable[str]:
    if getattr(config.method, "max_kl", None) is not None and config.train.keep_checkpoints < 2:
        yield "train.keep_checkpoints = 1: must be at least 2 with method.max_kl, which goes back to the one before"


def _remainder_problems(config: TRLConfig) -> Iterable[str]:
    method = config.method
    if not isinstance(method, PPOConfig):
        return
    for path, size in (("train.batch_size", config.train.batch_size), ("method.chunk_size", method.chunk_size)):
        count = method.num_rollouts
        if count % size == 0 or (path == "method.chunk_size" and size >= count):
            continue
        fits = [n for n in (count // size * size, -(-count // size) * size) if n]
        yield (
            f"method.num_rollouts = {count}: must be a multiple of {path}, which is {size}, "
            f"e.g. {' or '.join(map(str, fits))}"
        )


# ---- recipes ------------------------------------------------------------------------------------------------------


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
        optional = {"reward"} if isinstance(given, dict) and _is_offline(given.get("method")) else set()
        built = _build_sections(given, _SECTIONS | _RECIPE_SECTIONS, optional)
        config = TRLConfig(**{name: built[name] for name in _SECTIONS})
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
        with _naming(path):
            return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Sections as dicts, all of them copies: those of the config, then data and reward."""
        reward = {} if self.reward is None else {"reward": field_values(self.reward)}
        return {**self.config.to_dict(), "data": field_values(self.data), **reward}

    def save_yaml(self, path: str | os.PathLike[str], versions: Mapping[str, str] | None = None) -> None:
        """Writes what `load_yaml` reads back as an equal recipe; `versions` (package: version) go along."""
        values = _writable(self.to_dict())
        with open(path, "w", encoding="utf-8") as file:
            file.write(to_yaml({**values, "versions": dict(versions)} if versions else values))


def _is_offline(method: Any) -> bool:
    """Whether a method section, an object or a mapping with the method's name, learns from given samples."""
    if isinstance(method, Mapping):
        try:
            return issubclass(get_method(str(method.get("name"))), SFTConfig | ILQLConfig)
        except ConfigError:
            return False
    return isinstance(method, SFTConfig | ILQLConfig)


def _data_problems(method: MethodConfig, data: DataConfig, reward: RewardConfig | None) -> Iterable[str]:
    if not _is_offline(method):
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


def _build_sections(values: Any, sections: Mapping[str, type], optional: Iterable[str] = ()) -> dict[str, Any]:
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


def _writable(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with a model object replaced by its name and, for the parameter tree, its architecture."""
    model = dict(values["model"])
    given = model["model_path"]
    if not isinstance(given, str):
        architecture = getattr(given, "config", given)
        model["model_path"] = getattr(architecture, "_name_or_path", "") or f"<{type(given).__name__}>"
        model["architecture"] = model["architecture"] or plain(architecture.to_dict())
    return {**values, "model": model}


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the file's name before the problems that are found in its settings."""
    try:
        yield
    except ConfigError as error:
        problems = str(error).splitlines()
        between = " " if len(problems) == 1 else "\n  "
        raise ConfigError(between.join([f"{os.fspath(path)}:", *problems])) from None


# ---- trlX's defaults, and step accounting ---------------------------------------------------------------------------


def default_ppo_config() -> TRLConfig:
    """trlX's defaults: GPT-2 that knows film reviews, its last two blocks trained."""
    train = TrainConfig(
        total_steps=10000, seq_length=1024, epochs=100, batch_size=32, checkpoint_interval=10000, eval_interval=100
    )
    return _defaults(PPOConfig(), ModelConfig(model_path="lvwerra/gpt2-imdb", num_layers_unfrozen=2), 3e-5, train)


def default_ilql_config() -> TRLConfig:
    """trlX's defaults: GPT-2, everything trained, by implicit language Q-learning."""
    train = TrainConfig(
        total_steps=1000, seq_length=64, epochs=100, batch_size=128, checkpoint_interval=1000, eval_interval=100,
        trainer="AccelerateILQLTrainer",
    )  # fmt: skip
    return _defaults(ILQLConfig(), ModelConfig(model_path="gpt2"), 5e-5, train)


def default_sft_config() -> TRLConfig:
    """trlX's defaults: GPT-2, everything trained, on given samples."""
    train = TrainConfig(
        total_steps=1000, seq_length=1024, epochs=100, batch_size=8, checkpoint_interval=10000, eval_interval=100,
        trainer="AccelerateSFTTrainer",
    )  # fmt: skip
    return _defaults(SFTConfig(), ModelConfig(model_path="gpt2"), 1e-4, train)


def _defaults(method: MethodConfig, model: ModelConfig, lr: float, train: TrainConfig) -> TRLConfig:
    """With the optimizer, the (constant) schedule and the tokenizer that all of trlX's defaults have."""
    adamw = {"lr": lr, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-6}
    return TRLConfig(
        method=method,
        model=model,
        optimizer=OptimizerConfig(name="adamw", kwargs=adamw),
        scheduler=SchedulerConfig(name="cosine_annealing", kwargs={"T_max": 1e12, "eta_min": lr}),
        tokenizer=TokenizerConfig(tokenizer_path="gpt2"),
        train=train,
    )


def describe_steps(config: TRLConfig) -> StepPlan | GrowthPlan:
    """How many rounds and optimizer steps a PPO or RFT run takes, and which setting ends it.

    As in trlX: total steps = min(train.total_steps, epochs * ppo_epochs * num_rollouts / batch_size), rounded up.

    Raises:
        ConfigError: the method does not sample, and counts in another way.
    """
    method = config.method
    if isinstance(method, RFTConfig):
        return plan_growth(config)
    if not isinstance(method, PPOConfig):
        raise ConfigError(f"method.name = {method.name!r}: rounds are counted for PPOConfig and RFTConfig only")
    return plan_rounds(config)
