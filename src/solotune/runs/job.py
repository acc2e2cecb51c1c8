"""What a run is to do, as one value: what is learned from, what is evaluated, what is rewarded, and where to.

A recipe and a call of `train()` become the same `Job`; `runs.start.run` takes it from there.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from solotune.config import DataConfig, MethodConfig, Recipe, RewardConfig, TRLConfig, defaults
from solotune.data.dialogues import checked_rewards
from solotune.data.prompts import Prompts, cut, encode, fitting, load_eval_prompts, load_prompts
from solotune.data.samples import load_samples
from solotune.errors import ConfigError
from solotune.models.loading import build_policy, load_tokenizer
from solotune.progress import phase_progress
from solotune.rewards import build_reward
from solotune.rewards.guard import OnError
from solotune.runs import tracking
from solotune.runs.clock import Clock
from solotune.runs.console import say, show_logs
from solotune.runs.folder import RunFolder
from solotune.trainers.estimate import first_line, time_line
from solotune.trainers.learner import DDP
from solotune.trainers.optim import build_optimizer, build_scheduler
from solotune.trainers.registry import get_pipeline
from solotune.trainers.sampling import room_for_prompts

log = logging.getLogger("solotune")

MOST_PROMPTS_IN_CONFIG = 100


class Given(NamedTuple):
    """What a method learns from: prompts that it continues, or samples, with a reward each where it wants them."""

    prompts: Prompts | None = None
    samples: list[Any] | None = None
    rewards: list[float] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What there is of it, as the method's trainer takes it."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Rewarding(NamedTuple):
    """What is rewarded, and how.

    Args:
        reward_fn, metric_fn: see `solotune.train`.
        stop_sequences: texts that end a response and are cut off it.
        on_error: what to do when `reward_fn` fails; None for the default, to stop.
        on_main: the two functions are called on the first process alone, with the samples of all.
    """

    reward_fn: Callable[..., Any] | None = None
    metric_fn: Callable[..., dict[str, Any]] | None = None
    stop_sequences: Sequence[str] = ()
    on_error: OnError | None = None
    on_main: bool = False


@dataclass(frozen=True)
class Job:
    """A run that is to be.

    Args:
        config: settings of the run.
        given: what is learned from.
        eval_prompts: what is evaluated.
        rewarding: what is rewarded.
        out: the run's folder.
        resume: continue from the newest checkpoint there, or where `train.resume_from_checkpoint` says.
        recipe: what it was read from; None for a call, whose reward function is the caller's own code.
    """

    config: TRLConfig
    given: Given
    eval_prompts: Prompts
    rewarding: Rewarding
    out: Path
    resume: bool = False
    recipe: Recipe | None = None

    def as_recipe(self, run: RunFolder) -> Recipe:
        """What is saved of it as `config.yaml`. Many prompts or samples of a call are written to a file of their own
        beside it."""
        if self.recipe is not None:
            return self.recipe
        given, sources = self.given, dict[str, Any]()
        if given.prompts is not None:
            sources["prompts"] = _in_file(_rows(given.prompts), "prompt", run.path / "prompts.jsonl", run)
        else:
            rows: list[Any] = given.samples or []
            if given.rewards is not None:
                rows = [{"sample": row, "reward": reward} for row, reward in zip(rows, given.rewards, strict=True)]
                sources["reward_column"] = "reward"
            sources["samples"] = _in_file(rows, "sample", run.path / "given_samples.jsonl", run)
        # A default evaluation prompt is the BOS alone, and has no text.
        has_texts = all(self.eval_prompts.texts) or given.prompts is not None
        sources["eval_prompts"] = _rows(self.eval_prompts) if has_texts else None
        data = DataConfig(**sources, stop_sequences=list(self.rewarding.stop_sequences))
        reward_fn = self.rewarding.reward_fn
        if reward_fn is None:
            return Recipe(self.config, data)
        source = f"{_source_file(reward_fn)}:{getattr(reward_fn, '__qualname__', 'reward_fn')}"
        asked = (self.rewarding.on_error or OnError())._asdict()
        return Recipe(self.config, data, RewardConfig(function=source, on_error=asked.pop("action"), **asked))


class Machine(NamedTuple):
    """What a job runs on."""

    accelerator: Accelerator
    clock: Clock

    @classmethod
    def of(cls, config: TRLConfig, out: Path, started: float | None = None) -> Machine:
        """Processes, devices and log lines set up as the configuration says; `started` as in `run_recipe`."""
        accelerator = Accelerator(
            log_with=tracking.available_tracker(config.train.tracker),
            project_dir=config.train.logging_dir or str(out),
            kwargs_handlers=[DDP],
        )
        show_logs(logging.INFO if accelerator.is_main_process else logging.WARNING)
        return cls(accelerator, Clock(accelerator.device, started))

    def batch(self, config: TRLConfig) -> int:
        """Samples of an optimizer step, of all processes."""
        return config.train.batch_size * self.accelerator.num_processes


def job_of_recipe(recipe: Recipe, out: Path, resume: bool, machine: Machine) -> Job:
    """Read a recipe's data, and build (or train) its reward; first how long it all will take is said.

    Raises:
        ConfigError, DataError, ModelError: what does not fit the model is said before a reward model is trained.
    """
    config, accelerator = recipe.config, machine.accelerator
    is_estimated = resume or not accelerator.is_main_process or accelerator.num_processes > 1
    if not is_estimated:
        line, is_estimated = first_line(recipe, accelerator.device)
        if line is not None:
            say(line)
    tokenizer = load_tokenizer(config.tokenizer)
    if config.method.samples_itself:
        with phase_progress("reading the prompts"):
            given = Given(prompts=_fitting(load_prompts(recipe.data), recipe, tokenizer))
    else:
        with phase_progress("reading the samples"):
            samples, rewards = load_samples(recipe.data)
        given = given_samples(config.method, samples, rewards)
    if config.method.samples_itself or recipe.data.eval_prompts is not None:
        eval_prompts = _fitting(load_eval_prompts(recipe.data), recipe, tokenizer)
    else:
        eval_prompts = _prompts(config, None, tokenizer, machine.batch(config))
    policy = build_policy(config, meta=True)
    build_scheduler(config.scheduler, build_optimizer(config.optimizer, policy.trainable_parameters()))
    if not is_estimated and (line := time_line(recipe, accelerator.device, policy)) is not None:
        say(line)
    rewarding = Rewarding(stop_sequences=recipe.data.stop_sequences)
    with accelerator.main_process_first(), machine.clock.phase("reward_model"):
        if (asked := recipe.reward) is not None:
            rewarding = rewarding._replace(
                reward_fn=build_reward(asked, device=str(accelerator.device)),
                on_error=OnError(asked.on_error, asked.retries, asked.backoff, asked.timeout),
            )
    resume = resume or config.train.resume_from_checkpoint is not None
    return Job(config, given, eval_prompts, rewarding, out, resume, recipe)


def job_of_call(
    config: TRLConfig,
    given: Given | None,
    prompts: Sequence[Any] | None,
    eval_prompts: Sequence[Any] | None,
    rewarding: Rewarding,
    out: Path,
    machine: Machine,
) -> Job:
    """What `train()` was called with.

    Args:
        given: samples; None where prompts are continued.
        prompts, eval_prompts: a script's own, or None for the defaults.
    """
    batch, tokenizer = machine.batch(config), load_tokenizer(config.tokenizer)
    if given is None:
        own = _prompts(config, prompts, tokenizer, batch)
        given = Given(prompts=own)
        if eval_prompts is None:
            evaluated = own.select(range(min(batch, len(own))))
        else:
            evaluated = _prompts(config, eval_prompts, tokenizer, batch)
    else:
        evaluated = _prompts(config, eval_prompts, tokenizer, batch)
    return Job(config, given, evaluated, rewarding, out, config.train.resume_from_checkpoint is not None)


def given_samples(method: MethodConfig, samples: Sequence[Any], rewards: Any) -> Given:
    """Samples as the method learns from them.

    Raises:
        ConfigError: rewards without a method that learns from them, or the reverse, or a method that samples itself.
        DataError: the rewards do not belong to the samples.
    """
    if method.samples_itself:
        wanted = defaults.FOR["samples" if rewards is None else "rated samples"].__name__
        raise ConfigError(f"method.name = {method.name!r} does not learn from given samples: start from {wanted}()")
    if method.LEARNS_FROM == "rated samples":
        if rewards is None:
            raise ConfigError(
                f"{method.short_name} learns from a reward of each sample: give rewards= (data.reward_column in a "
                "recipe)"
            )
        return Given(samples=list(samples), rewards=checked_rewards(rewards, len(samples)))
    if rewards is not None:
        checked_rewards(rewards, len(samples))
        log.info("%s learns every sample alike: the rewards are not used", method.short_name)
    return Given(samples=list(samples))


def _fitting(prompts: Prompts, recipe: Recipe, tokenizer: Any) -> Prompts:
    """A recipe's prompts, those that are too long left out where it says so.

    Raises:
        DataError: one is too long, or empty: said before a reward model is trained.
    """
    room, special = room_for_prompts(recipe.config), recipe.config.tokenizer.add_special_tokens
    if recipe.data.long_prompts == "drop":
        prompts = fitting(prompts, tokenizer, room, special)
    encode(prompts, tokenizer, room, special, goes_on=not recipe.config.model.is_seq2seq)
    return prompts


def _prompts(config: TRLConfig, rows: Sequence[Any] | None, tokenizer: Any, batch: int) -> Prompts:
    """A script's prompts, by its own pipeline if it registered one; by default the BOS, `batch` times."""
    pipeline = get_pipeline(config.train.pipeline)
    if rows is None:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ConfigError(
                "the tokenizer has neither a BOS nor an EOS to start from: give prompts= and eval_prompts= "
                "(data.eval_prompts in a recipe)"
            )
        return Prompts([""] * batch, ids=[[start]] * batch)
    if pipeline is None:
        given = Prompts.from_list(list(rows))
        special, side = config.tokenizer.add_special_tokens, config.tokenizer.truncation_side
        if not config.AS_TRLX:
            return given
        return cut(given, tokenizer, room_for_prompts(config), special, side, goes_on=not config.model.is_seq2seq)
    options = {"add_special_tokens": True} if config.model.is_seq2seq else {}
    encoded = pipeline(list(rows), room_for_prompts(config), tokenizer, **options)
    items = [dict(encoded[index]) for index in range(len(encoded))]
    ids = [[int(token) for token in item.pop("input_ids")] for item in items]
    names = [name for name in (items[0] if items else {}) if name != "attention_mask"]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Prompts(texts, {name: [item[name] for item in items] for name in names}, ids)


def _in_file(rows: list[Any], column: str, path: Path, run: RunFolder) -> Any:
    """The rows, or the file they are written to where they are many."""
    if len(rows) <= MOST_PROMPTS_IN_CONFIG:
        return rows
    path.unlink(missing_ok=True)
    run.append(path, [row if isinstance(row, dict) else {column: row} for row in rows])
    return str(path)


def _source_file(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsourcefile(function) or "unknown.py"
    except TypeError:  # an object that can be called
        return inspect.getsourcefile(type(function)) or "unknown.py"


def _rows(prompts: Prompts) -> list[Any]:
    if not prompts.metadata:
        return list(prompts.texts)
    columns = {"prompt": prompts.texts, **prompts.metadata}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
