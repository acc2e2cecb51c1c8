"""From a recipe, or from the arguments of `solotune.train`, to a finished run."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from solotune.config import Recipe, TRLConfig, defaults
from solotune.data.samples import as_list
from solotune.errors import ConfigError
from solotune.models.loading import versions
from solotune.models.tree import parameter_tree
from solotune.quiet import quiet_libraries
from solotune.rewards.guard import OnError
from solotune.runs import checkpoint, tracking
from solotune.runs.console import say
from solotune.runs.files import named
from solotune.runs.finish import finish
from solotune.runs.folder import RunFolder
from solotune.runs.job import Job, Machine, Rewarding, given_samples, job_of_call, job_of_recipe
from solotune.trainers.base import Trainer
from solotune.trainers.registry import get_pipeline, trainer_of

log = logging.getLogger("solotune")


@quiet_libraries()
def run_recipe(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    started: float | None = None,
    on_round: Callable[[dict[str, Any]], None] | None = None,
) -> Trainer:
    """Train what a recipe says and leave a run folder.

    Args:
        recipe: a recipe of any method.
        out: the run's folder; an existing run there is moved aside unless it is resumed.
        resume: continue from the newest checkpoint in `out`.
        started: `time.perf_counter()` when the command began, default now.
        on_round: called after each round with its metrics.
    """
    _supported(recipe.config)
    recipe.config.check()
    machine = Machine.of(recipe.config, out, started)
    return run(job_of_recipe(recipe, out, resume, machine), machine, on_round)


@quiet_libraries()
def train(
    model_path: Any = None,
    reward_fn: Callable[..., Any] | None = None,
    dataset: Any = None,
    samples: Sequence[Any] | None = None,
    rewards: Sequence[float] | None = None,
    prompts: Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
    config: TRLConfig | None = None,
    stop_sequences: Sequence[str] = (),
    on_error: OnError | None = None,
) -> Trainer:
    """Tune a model with a reward function, or on given samples (trlX's `train`).

    Args:
        model_path: hub id or folder, a `PretrainedConfig` (random weights) or a `PreTrainedModel`; overrides
            `config.model.model_path`, and the tokenizer's path where no config is given.
        reward_fn: called with the keywords among samples, prompts, outputs, tokenizer and metadata columns that it
            takes; returns a number per sample, or a list of numbers per sample (one a response token). With `samples`
            it scores the evaluations alone.
        samples: texts, or dialogues [prompt, output, prompt, output, ...]: SFT learns their outputs.
        rewards: a number a sample: ILQL learns from them.
        dataset: (samples, rewards), trlX's older spelling.
        prompts: texts, or dicts with the key "prompt" whose other keys reach the reward function; default the
            tokenizer's BOS, `batch_size` times.
        eval_prompts: the same; default the first `batch_size` prompts, or the BOS where there are none.
        metric_fn: called at every evaluation; returns named numbers.
        config: default that of the method: `default_ppo_config()` with a reward function alone, `default_ilql_config()`
            with rewards, `default_sft_config()` with samples.
        stop_sequences: texts that end a response and are cut off it.
        on_error: what to do when `reward_fn` fails, e.g. `OnError("retry", timeout=60)`; default to stop.
    Returns:
        The trainer, trained: `.model`, `.tokenizer`, `.generate`, `.evaluate`, `.save_pretrained`.
    Raises:
        ConfigError: neither a reward function nor samples, or a config of another method than what is given asks for.
        DataError: samples or rewards cannot be used as they are.
    """
    if dataset is not None:
        log.warning("train(dataset=(samples, rewards)) is deprecated: give samples= and rewards=")
        if not isinstance(dataset, Sequence) or len(dataset) != 2:
            raise ConfigError(f"train() got dataset= of {type(dataset).__name__}: it has to be (samples, rewards)")
        samples, rewards = dataset
    if samples is None and rewards is not None:
        raise ConfigError("train() got rewards= without samples=: give the samples they belong to")
    if samples is None and reward_fn is None:
        raise ConfigError("train() got neither reward_fn= nor samples=: give one of them")
    uses_default = config is None
    if config is None:
        default = defaults.FOR["prompts" if samples is None else "samples" if rewards is None else "rated samples"]
        log.warning("no config was given: using %s()", default.__name__)
        config = default()
    config = config.evolve()
    if model_path is not None:
        config.model.model_path = model_path
        if uses_default and isinstance(model_path, str):
            config.tokenizer.tokenizer_path = model_path
    config.check()
    _supported(config)
    method = config.method
    given = None if samples is None else given_samples(method, as_list(samples), rewards)
    if samples is not None and prompts is not None:
        log.warning("prompts= is not used: %s learns from samples=; evaluations continue eval_prompts=", method.name)
    if samples is None and not method.samples_itself:
        raise ConfigError(f"method.name = {method.name!r} learns from given samples: train() needs samples=")
    out = Path(config.train.checkpoint_dir) / (config.train.run_name or Path(sys.argv[0] or "train").stem or "train")
    machine = Machine.of(config, out)
    rewarding = Rewarding(reward_fn, metric_fn, stop_sequences, on_error, on_main=True)
    return run(job_of_call(config, given, prompts, eval_prompts, rewarding, out, machine), machine)


def run(job: Job, machine: Machine, on_round: Callable[[dict[str, Any]], None] | None = None) -> Trainer:
    """Do a job; `on_round` is called after each round with its metrics."""
    config, out, accelerator = job.config, job.out, machine.accelerator
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # what has no such form is named, and runs
    main = accelerator.is_main_process
    start_from = _checkpoint_to_resume(config, out) if job.resume else None
    set_seed(config.train.seed)
    trainer = trainer_of(config)(
        config=config,
        reward_fn=job.rewarding.reward_fn,
        **job.given.arguments,
        eval_prompts=job.eval_prompts,
        metric_fn=job.rewarding.metric_fn,
        stop_sequences=job.rewarding.stop_sequences,
        accelerator=accelerator,
        clock=machine.clock,
        scores_on_main=job.rewarding.on_main,
        on_error=job.rewarding.on_error,
        **config.train.trainer_kwargs,
    )
    # Only now: what could be wrong with the settings did not cost an earlier run its place.
    trainer.run = folder = RunFolder(out, writes=main, continued=_is_within(start_from, out))
    try:
        accelerator.wait_for_everyone()
        if main:
            with named(out / "config.yaml"):  # aside first: an earlier one is what resuming needs
                job.as_recipe(folder).save_yaml(aside := out / ".config.yaml.partial", versions())
                os.replace(aside, out / "config.yaml")
            tree = parameter_tree(trainer.model.backbone, trainer.model.critic)
            say(f"{tree.trainable:,} of {tree.total:,} parameters are trained; files go to {out}")
            command = shlex.join(["solotune", "train", str(out / "config.yaml"), "--resume", "--out", str(out)])
            trainer.resume_hint = (
                f"go on with: {command}"
                if job.recipe is not None
                else (f"go on with train.resume_from_checkpoint={str(out)!r} and the same script")
            )
            say(f"after an interruption: {trainer.resume_hint}", soft_wrap=True)
        tracking.start(accelerator, config, out.name)
        trainer.learn(start_from, on_round)
        finish(trainer, folder)
    finally:
        folder.release()
    for tracker in accelerator.trackers:  # accelerate's end_training would take the process group down as well
        tracker.finish()
    return trainer


def _supported(config: TRLConfig) -> None:
    trainer: Any = trainer_of(config)
    if config.train.trainer_kwargs and trainer.__module__.startswith("solotune."):
        names = ", ".join(config.train.trainer_kwargs)
        raise ConfigError(f"train.trainer_kwargs: {config.train.trainer!r} takes none; remove {names}")
    get_pipeline(config.train.pipeline)
    ignored = {
        "tokenizer.padding_side": config.tokenizer.padding_side != "left",
        "method.ref_mean": getattr(config.method, "ref_mean", None) is not None,
    }
    if names := [name for name, is_set in ignored.items() if is_set]:
        log.warning("without effect here: %s", ", ".join(names))


def _checkpoint_to_resume(config: TRLConfig, out: Path) -> Path | None:
    given = config.train.resume_from_checkpoint
    found = checkpoint.newest(Path(given) if given is not None else out)
    if found is None and given is not None:
        raise ConfigError(
            f"train.resume_from_checkpoint {given!r} holds no checkpoint; allowed are a run's folder and a step_N "
            "folder in its checkpoints"
        )
    if found is None:
        log.warning("nothing to resume in %s: starting from the beginning", out)
    return found


def _is_within(start_from: Path | None, out: Path) -> bool:
    """Whether the run that is resumed is the one in `out`: only then are its files continued."""
    return start_from is not None and start_from.resolve().is_relative_to(out.resolve())
