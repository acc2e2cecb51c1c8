"""A person's reward function: loading it, calling it with what it asks for, and checking what it returns."""

import importlib.util
import inspect
import json
import logging
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from solotune.errors import ConfigError, RewardError

logger = logging.getLogger(__name__)

Scores = list[float] | list[list[float]]
RewardFunction = Callable[..., Any]

FAILURE_FILE = "reward_failure.jsonl"


def load_function(reference: str) -> RewardFunction:
    """The function that `path/to/file.py:name` refers to. The file's code is run.

    Raises:
        ConfigError: there is no such file, or no such function in it.
        RewardError: the file raised while it ran.
    """
    location, _, name = reference.rpartition(":")
    if "<" in name:  # a lambda, or a function inside another: what a run that was started from Python has saved
        raise ConfigError(
            f"reward.function = {reference!r}: {name} cannot be found by its name. The run was started from Python: "
            "set train.resume_from_checkpoint to its folder and run the script again"
        )
    path = Path(location).expanduser()
    if not path.is_file():
        raise ConfigError(f"reward.function = {reference!r}: there is no file {location!r} in {Path.cwd()}")
    spec = importlib.util.spec_from_file_location(f"solotune_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"reward.function = {reference!r}: {location!r} is not a Python file (.py)")
    logger.info("running the code of %s for its reward function %s", path, name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a module up by its name
    sys.path.insert(0, str(path.parent.absolute()))  # so that it can import its neighbours, as a script can
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"reward.function = {reference!r}: {path} raised {_said(error)}") from error
    finally:
        sys.path.remove(str(path.parent.absolute()))
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ConfigError(
            f"reward.function = {reference!r}: {path} has no function {name!r}; it has {', '.join(own) or 'none'}"
        )
    return function


def arguments_for(reward_fn: RewardFunction, available: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `reward_fn` is called with: the names that its signature takes, or all of them if it takes `**kwargs`.

    A first parameter of another name gets the samples, as older reward functions, `f(texts)`, expect.

    Raises:
        RewardError: it requires a parameter that there is no value for.
    """
    try:
        parameters = list(inspect.signature(reward_fn).parameters.values())
    except (TypeError, ValueError):  # some callables written in C tell nothing
        return (available["samples"],), {}
    positional: list[Any] = []
    named: dict[str, Any] = {}
    samples_taken = False
    for index, parameter in enumerate(parameters):
        name, kind = parameter.name, parameter.kind
        by_position = kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if kind is parameter.VAR_KEYWORD:
            named = {
                **{key: value for key, value in available.items() if not (key == "samples" and samples_taken)},
                **named,
            }
        elif kind is parameter.VAR_POSITIONAL:
            if index == 0:
                positional.append(available["samples"])
                samples_taken = True
        elif name in available and kind is parameter.POSITIONAL_ONLY:
            positional.append(available[name])
            samples_taken |= name == "samples"
        elif name in available:
            named[name] = available[name]
        elif index == 0 and by_position and parameter.default is parameter.empty:
            positional.append(available["samples"])
            samples_taken = True
        elif parameter.default is parameter.empty:
            raise RewardError(
                f"reward: {name_of(reward_fn)} requires {name!r}, and there is no such value; there are "
                f"{', '.join(available)}. Give the prompts a metadata column of that name, or the parameter a default"
            )
    return tuple(positional), named


def score(
    reward_fn: RewardFunction,
    samples: Sequence[str],
    prompts: Sequence[str],
    outputs: Sequence[str],
    tokenizer: Any,
    metadata: Mapping[str, Sequence[Any]],
    failure_dir: Path | str,
) -> Scores:
    """Rewards of B samples: B numbers, or B lists with a number a token, all finite.

    Every list handed over is a copy, so `reward_fn` may change its arguments.

    Args:
        samples: B texts, prompt and output together. prompts, outputs: the two halves.
        metadata: name -> B values.
        failure_dir: where `reward_failure.jsonl` with the samples is written when something is wrong.
    Raises:
        RewardError: `reward_fn` raised (its exception is the cause), or returned something else than that.
    """
    columns = {"samples": samples, "prompts": prompts, "outputs": outputs, **metadata}
    for name, values in columns.items():
        if len(values) != len(samples):
            raise ValueError(f"{name} has {len(values)} values for {len(samples)} samples")
    available: dict[str, Any] = {name: list(values) for name, values in columns.items()}
    available["tokenizer"] = tokenizer
    positional, named = arguments_for(reward_fn, available)
    who = f"reward: {name_of(reward_fn)}"
    try:
        returned = reward_fn(*positional, **named)
    except Exception as error:
        path = _write_failure(failure_dir, columns, None)
        if isinstance(error, RewardError):
            raise
        raise RewardError(f"{who} raised {_said(error)}. The {len(samples)} samples it got are in {path}") from error
    except BaseException:  # its time is up
        _write_failure(failure_dir, columns, None)
        raise
    try:
        return checked(returned, len(samples))
    except ValueError as problem:
        path = _write_failure(failure_dir, columns, returned)
        raise RewardError(
            f"{who} {problem}; it must return one finite number per sample, or one list of finite numbers "
            f"(one per token) per sample. The {len(samples)} samples it got are in {path}"
        ) from problem


def checked(returned: Any, count: int) -> Scores:
    """`returned` as plain floats.

    Raises:
        ValueError: it is not `count` finite numbers, nor `count` lists of finite numbers; says what it is instead.
    """
    values = _plain(returned)
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"returned {_shown(returned)} ({type(returned).__name__})")
    values = [_plain(value) for value in values]
    if len(values) != count:
        raise ValueError(f"returned {len(values)} values for {count} samples")
    dense = [isinstance(value, list | tuple) for value in values]
    if any(dense) and not all(dense):
        raise ValueError(f"returned a number for sample {dense.index(False)} and a list for sample {dense.index(True)}")
    if values and dense[0]:
        return [
            [_number(_plain(value), f"sample {index}, token {token}") for token, value in enumerate(row)]
            for index, row in enumerate(values)
        ]
    return [_number(value, f"sample {index}") for index, value in enumerate(values)]


def name_of(reward_fn: RewardFunction) -> str:
    """How messages call a reward function."""
    return getattr(reward_fn, "__name__", None) or type(reward_fn).__name__


def _plain(value: Any) -> Any:
    """Tensors and arrays as (nested) lists or Python numbers; anything else unchanged."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return value.tolist() if hasattr(value, "tolist") else value


def _number(value: Any, where: str) -> float:
    if not isinstance(value, numbers.Real):
        raise ValueError(f"returned {_shown(value)} ({type(value).__name__}) for {where}")
    if not math.isfinite(value):
        raise ValueError(f"returned {float(value)} for {where}")
    return float(value)


def _write_failure(folder: Path | str, columns: Mapping[str, Sequence[Any]], returned: Any) -> Path:
    singular = {"samples": "sample", "prompts": "prompt", "outputs": "output"}
    rows = [
        {"index": index} | {singular.get(name, name): values[index] for name, values in columns.items()}
        for index in range(len(columns["samples"]))
    ]
    return write_failure(folder, rows if returned is None else [*rows, {"returned": _shown(returned, 10_000)}])


def write_failure(folder: Path | str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write what a reward function failed on; returns the file. Where the disk fails too, that is one log line: the
    reward's error is the one to be told."""
    path = Path(folder) / FAILURE_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        path.write_bytes(content.encode("utf-8", "backslashreplace"))
    except OSError as error:
        logger.warning("%s could not be written: %s", path, error)
    return path


def _shown(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
