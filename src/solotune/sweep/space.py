"""What a sweep file says: trlX's `tune_config` and its parameters. Nothing here imports Optuna but `distribution`.

tune_config: {mode: max, metric: reward/mean, search_alg: random, scheduler: fifo, num_samples: 32}
optimizer.kwargs.lr: {strategy: loguniform, values: [1e-6, 1e-3]}
method.ppo_epochs: {strategy: choice, values: [1, 2, 4]}
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass as section

from solotune.config.section import Section, build_section
from solotune.config.values import STRICT, PositiveInt, nearest, number, own_copy, real_number, shown, whole_number
from solotune.config.yaml import plain, read_yaml
from solotune.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

STRATEGIES = {
    "uniform": "low, high",
    "quniform": "low, high, step",
    "loguniform": "low, high",
    "randint": "low, high (itself never drawn)",
    "qrandint": "low, high, step",
    "lograndint": "low, high (itself never drawn)",
    "choice": "the values to choose from",
    "grid": "the values, all of which are tried",
}
"""Strategy -> what its `values` are, as in Ray Tune, which trlX handed them to."""

UNSUPPORTED = {
    "qloguniform": "loguniform",
    "qlograndint": "lograndint",
    "randn": "uniform",
    "qrandn": "quniform",
}
"""Strategies of trlX that Optuna has no distribution for (steps on a log scale, the normal distribution), and which one
to use instead."""


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


@section(config=STRICT)
class TuneConfig(Section):
    """What is searched for, and how.

    mode, metric: the largest or smallest value of a metric, under this project's name or trlX's, as last reported.
    search_alg: random; bayesopt and bohb are Optuna's TPE. scheduler: fifo runs every trial to its end, the others stop
    those that fall behind. num_samples: trials (with parameters of the strategy grid: trials per combination).
    """

    SECTION: ClassVar[str] = "tune_config"

    mode: Annotated[Literal["max", "min"], BeforeValidator(_lower)]
    metric: Annotated[str, Field(min_length=1)]
    search_alg: Annotated[Literal["random", "grid", "bayesopt", "bohb"], BeforeValidator(_lower)] = "random"
    scheduler: Annotated[Literal["fifo", "hyperband", "hyperbandforbohb"], BeforeValidator(_lower)] = "fifo"
    num_samples: PositiveInt | None = None

    @property
    def prunes(self) -> bool:
        """Whether trials that fall behind are stopped."""
        return self.scheduler != "fifo"


@dataclass(frozen=True)
class Parameter:
    """One setting that is searched over: its dotted name, strategy and values, checked."""

    name: str
    strategy: str
    values: tuple[Any, ...]

    @property
    def is_log(self) -> bool:
        return self.strategy in ("loguniform", "lograndint")

    @property
    def is_listed(self) -> bool:
        """Whether its values are named one by one."""
        return self.strategy in ("choice", "grid")

    @property
    def _is_scalar(self) -> bool:
        return all(value is None or isinstance(value, str | int | float) for value in self.values)

    def distribution(self) -> BaseDistribution:
        """What Optuna draws from."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.is_listed:
            return CategoricalDistribution([self.stored(value) for value in self.values])
        low, high, *step = self.values
        if self.strategy in ("randint", "lograndint"):
            return IntDistribution(low, high - 1, log=self.is_log)
        if self.strategy == "qrandint":
            return IntDistribution(low, high, step=step[0])
        return FloatDistribution(low, high, log=self.is_log, step=step[0] if step else None)

    def stored(self, value: Any) -> Any:
        """A value as Optuna's storage keeps it: lists and mappings as JSON text."""
        return value if self._is_scalar else json.dumps(value)

    def value(self, stored: Any) -> Any:
        """The inverse of `stored`."""
        return stored if self._is_scalar else json.loads(stored)


@dataclass(frozen=True)
class Plan:
    """A whole sweep file."""

    tune: TuneConfig
    parameters: tuple[Parameter, ...]

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """Every combination of the parameters of the strategy grid; a single empty one where there are none."""
        grids = [parameter for parameter in self.parameters if parameter.strategy == "grid"]
        return [
            dict(zip([p.name for p in grids], values, strict=True))
            for values in itertools.product(*(p.values for p in grids))
        ]

    @property
    def is_grid(self) -> bool:
        """Whether nothing is drawn."""
        return all(parameter.strategy == "grid" for parameter in self.parameters)

    @property
    def n_trials(self) -> int:
        """Trials in all: each combination once, or `num_samples` times where there is something left to draw."""
        return len(self.combinations) * (1 if self.is_grid else self.tune.num_samples or 1)

    def fixed(self, index: int) -> dict[str, Any]:
        """What trial `index` takes from the grid; the rest is drawn."""
        return self.combinations[index % len(self.combinations)]

    def notes(self) -> list[str]:
        """What is treated differently than the file's words suggest, one line each."""
        tune, lines = self.tune, []
        if self.is_grid:
            unused = f"; num_samples = {tune.num_samples} has no effect" if tune.num_samples else ""
            lines.append(f"every strategy is grid: each of the {self.n_trials} combinations is tried once{unused}")
        elif len(self.combinations) > 1:
            lines.append(f"each of the {len(self.combinations)} combinations of grid is tried num_samples times")
        if tune.search_alg in ("bayesopt", "bohb") and not self.is_grid:
            lines.append(f"search_alg {tune.search_alg} is Optuna's TPE, whose first 10 trials are drawn at random")
        if tune.prunes:
            lines.append(
                f"scheduler {tune.scheduler} is Optuna's Hyperband: a trial whose {tune.metric} falls behind those of "
                "others after as many reports is stopped"
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The parameters as the file has them, for comparing."""
        return {p.name: {"strategy": p.strategy, "values": plain(list(p.values))} for p in self.parameters}


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The sweep in a YAML file.

    Raises:
        ConfigError: every problem of the file, one a line; each names the parameter, the value and what is allowed.
    """
    values = read_yaml(path)
    problems: list[str] = []
    tune, parameters = None, []
    if "tune_config" not in values:
        problems.append("tune_config is missing: a mapping with mode, metric and num_samples")
    else:
        try:
            tune = build_section(TuneConfig, values["tune_config"])
        except ConfigError as error:
            problems.append(str(error))
    for name, given in values.items():
        if name == "tune_config":
            continue
        try:
            parameters.append(_parameter(name, given))
        except ConfigError as error:
            problems.append(str(error))
    if len(values) - ("tune_config" in values) == 0:
        problems.append(
            "there is nothing to search over: give settings such as "
            "optimizer.kwargs.lr: {strategy: loguniform, values: [1e-6, 1e-3]}"
        )
    if tune is not None and not problems:
        problems += _contradictions(tune, parameters)
    if tune is None or problems:
        raise ConfigError("\n".join(f"{os.fspath(path)}: {line}" for text in problems for line in text.split("\n")))
    return Plan(tune, tuple(parameters))


def _contradictions(tune: TuneConfig, parameters: list[Parameter]) -> list[str]:
    drawn = [p.name for p in parameters if p.strategy != "grid"]
    if tune.search_alg == "grid" and drawn:
        return [
            f"tune_config.search_alg = 'grid': every parameter must have the strategy grid, which {', '.join(drawn)} "
            "has not; choose the strategy grid, or search_alg random"
        ]
    if drawn and tune.num_samples is None:
        return ["tune_config.num_samples is missing: how many trials there are"]
    return []


def _parameter(name: Any, given: Any) -> Parameter:
    if not isinstance(name, str) or not all(name.split(".")):
        raise ConfigError(f"{shown(name)} must be the dotted name of a setting, e.g. optimizer.kwargs.lr")
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{name} = {shown(given)}: must be a mapping such as {{strategy: loguniform, values: [1e-6, 1e-3]}}"
        )
    for key in given:
        if key not in ("strategy", "values"):
            raise ConfigError(f"unknown setting {name}.{key}: {nearest(str(key), ('strategy', 'values'))}")
    for key in ("strategy", "values"):
        if key not in given:
            raise ConfigError(f"{name}.{key} is missing; allowed strategies are {', '.join(STRATEGIES)}")
    strategy, values = _lower(given["strategy"]), own_copy(given["values"])
    if isinstance(strategy, str) and strategy in UNSUPPORTED:
        raise ConfigError(
            f"{name}.strategy = {strategy!r}: is not supported; allowed are {', '.join(STRATEGIES)}, here for example "
            f"{UNSUPPORTED[strategy]}"
        )
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ConfigError(f"{name}.strategy = {shown(strategy)}: must be one of {', '.join(STRATEGIES)}")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{name}.values = {shown(values)}: must be a list: {STRATEGIES[strategy]}")
    try:
        checked = _listed(values) if strategy in ("choice", "grid") else _range(strategy, values)
    except ValueError as error:
        raise ConfigError(f"{name}.values = {shown(values)}: {error}") from None
    return Parameter(name, strategy, checked)


def _listed(values: list[Any]) -> tuple[Any, ...]:
    """Raises ValueError: what cannot be kept as JSON, or is given twice (as 1, 1.0 and true are)."""
    values = [number(value) for value in values]
    for value in values:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(f"{shown(value)} must be a number, a text, true, false, null, or lists of them") from None
        if values.count(value) > 1:
            raise ValueError(f"{shown(value)} is given twice")
    return tuple(values)


def _range(strategy: str, values: list[Any]) -> tuple[Any, ...]:
    """low, high and perhaps a step. Raises ValueError: what is allowed."""
    meant = STRATEGIES[strategy]
    if len(values) != meant.count(",") + 1:
        raise ValueError(f"{strategy} takes {meant.count(',') + 1} numbers: {meant}")
    is_whole = "randint" in strategy
    low, high, *step = (whole_number(value) if is_whole else real_number(value) for value in values)
    if not all(map(math.isfinite, (low, high, *step))):
        raise ValueError("must be finite numbers")
    if low >= high:
        raise ValueError("low must be less than high")
    if "log" in strategy and low <= 0:
        raise ValueError("low must be greater than 0 on a log scale")
    if step and step[0] <= 0:
        raise ValueError("step must be greater than 0")
    for name, bound in (("low", low), ("high", high)):
        if step and not math.isclose(bound / step[0], round(bound / step[0]), abs_tol=1e-9):
            raise ValueError(f"{name} must be a multiple of step, which is {step[0]:g}")
    return (low, high, *step)
