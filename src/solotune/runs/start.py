"""From a recipe, or from the arguments of `solotune.train`, to a finished run."""

from __future__ import annotations

import inspect
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed

from solotune.config import (
    DataConfig,
    ILQLConfig,
    PPOConfig,
    Recipe,
    RewardConfig,
    RFTConfig,
    SFTConfig,
    TRLConfig,
    default_ilql_config,
    default_ppo_config,
    default_sft_config,
)
from solotune.data.dialogues import checked_rewards
from solotune.data.prompts import Prompts, cut, encode, fitting, load_eval_prompts, load_prompts
from solotune.data.samples import as_list, load_samples
from solotune.errors import ConfigError, NotYetError, SolotuneError
from solotune.models.loading import build_policy, load_tokenizer, versions
from solotune.models.tree import format_bytes, parameter_tree
from solotune.report.page import write_report
from solotune.report.reading import read_run
from solotune.report.table import before_after_table
from solotune.rewards import build_reward
from solotune.rewards.guard import OnError
from solotune.runs import checkpoint, tracking
from solotune.runs.clock import Clock, peak_memory_bytes
from solotune.runs.console import console, say, show_logs
from solotune.runs.files import named
from solotune.runs.folder import RunFolder
from solotune.trainers.base import DDP, Trainer
from solotune.trainers.optim import build_optimizer, build_scheduler
from solotune.trainers.registry import get_pipeline, trainer_of
from solotune.trainers.sampling import room_for_prompts

log = logging.getLogger("solotune")

MOST_PROMPTS_IN_CONFIG = 100


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
    config = recipe.config
    _supported(config)
    accelerator = _accelerator(config, out)
    clock = Clock(accelerator.device, started)
    config.check()
    tokenizer = load_tokenizer(config.tokenizer)
    given: dict[str, Any] = {}
    if _is_offline(config):
        samples, rewards = load_samples(recipe.data)
        given = _offline_data(config, samples, rewards)
        if recipe.data.eval_prompts is not None:
            eval_prompts = _fitting(load_eval_prompts(recipe.data), recipe, tokenizer)
        else:
            eval_prompts = _prompts(config, None, tokenizer, config.train.batch_size * accelerator.num_processes)
    else:
        given["prompts"] = _fitting(load_prompts(recipe.data), recipe, tokenizer)
        eval_prompts = _fitting(load_eval_prompts(recipe.data), recipe, tokenizer)
    # What does not fit the model is said before a reward model is trained and weights are loaded.
    build_scheduler(
        config.scheduler, build_optimizer(config.optimizer, build_policy(config, meta=True).trainable_parameters())
    )
    with accelerator.main_process_first(), clock.phase("reward_model"):
        reward_fn = None
        if recipe.reward is not None:
            reward_fn = build_reward(recipe.reward, device=str(accelerator.device))
    resume = resume or config.train.resume_from_checkpoint is not None
    stops = recipe.data.stop_sequences
    on_error = None
    if recipe.reward is not None:
        asked = recipe.reward
        on_error = OnError(asked.on_error, asked.retries, asked.backoff, asked.timeout)
    return _run(
        config,
        recipe,
        reward_fn,
        given,
        eval_prompts,
        out,
        resume,
        accelerator,
        clock,
        None,
        stops,
        on_round,
        on_error,
    )


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
        default = (
            default_ppo_config if samples is None else default_sft_config if rewards is None else default_ilql_config
        )
        log.warning("no config was given: using %s()", default.__name__)
        config = default()
    config = config.evolve()
    if model_path is not None:
        config.model.model_path = model_path
        if uses_default and isinstance(model_path, str):
            config.tokenizer.tokenizer_path = model_path
    config.check()
    _supported(config)
    given = {} if samples is None else _offline_data(config, as_list(samples), rewards)
    if samples is not None and prompts is not None:
        log.warning(
            "prompts= is not used: %s learns from samples=; evaluations continue eval_prompts=", config.method.name
        )
    if samples is None and _is_offline(config):
        raise ConfigError(f"method.name = {config.method.name!r} learns from given samples: train() needs samples=")
    name = config.train.run_name or Path(sys.argv[0] or "train").stem or "train"
    out = Path(config.train.checkpoint_dir) / name
    accelerator = _accelerator(config, out)
    tokenizer = load_tokenizer(config.tokenizer)
    batch = config.train.batch_size * accelerator.num_processes
    if samples is None:
        given = {"prompts": _prompts(config, prompts, tokenizer, batch)}
    if samples is None and eval_prompts is None:
        given_eval = given["prompts"].select(range(min(batch, len(given["prompts"]))))
    else:
        given_eval = _prompts(config, eval_prompts, tokenizer, batch)
    resume = config.train.resume_from_checkpoint is not None
    return _run(
        config,
        None,
        reward_fn,
        given,
        given_eval,
        out,
        resume,
        accelerator,
        Clock(accelerator.device),
        metric_fn,
        stop_sequences,
        on_error=on_error,
    )


def _run(
    config: TRLConfig,
    recipe: Recipe | None,
    reward_fn: Callable[..., Any] | None,
    given: dict[str, Any],
    eval_prompts: Prompts,
    out: Path,
    resume: bool,
    accelerator: Accelerator,
    clock: Clock,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
    stop_sequences: Sequence[str] = (),
    on_round: Callable[[dict[str, Any]], None] | None = None,
    on_error: OnError | None = None,
) -> Trainer:
    """Train with what a method learns from: `given` are the trainer's `prompts`, or `samples` and `rewards`."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # what has no such form is named, and runs
    main = accelerator.is_main_process
    start_from = _checkpoint_to_resume(config, out) if resume else None
    set_seed(config.train.seed)
    trainer = trainer_of(config)(
        config=config,
        reward_fn=reward_fn,
        **given,
        eval_prompts=eval_prompts,
        metric_fn=metric_fn,
        stop_sequences=stop_sequences,
        accelerator=accelerator,
        clock=clock,
        scores_on_main=recipe is None,
        on_error=on_error,
        **config.train.trainer_kwargs,
    )
    # Only now: what could be wrong with the settings did not cost an earlier run its place.
    trainer.run = run = RunFolder(out, writes=main, continued=_is_within(start_from, out))
    try:
        accelerator.wait_for_everyone()
        if main:
            saved = recipe or _as_recipe(config, given, eval_prompts, reward_fn, stop_sequences, run, on_error)
            with named(out / "config.yaml"):  # aside first: an earlier one is what resuming needs
                saved.save_yaml(aside := out / ".config.yaml.partial", versions())
                os.replace(aside, out / "config.yaml")
            tree = parameter_tree(trainer.model.backbone, trainer.model.critic)
            say(f"{tree.trainable:,} of {tree.total:,} parameters are trained; files go to {out}")
            command = shlex.join(["solotune", "train", str(out / "config.yaml"), "--resume", "--out", str(out)])
            trainer.resume_hint = (
                f"go on with: {command}"
                if recipe is not None
                else (f"go on with train.resume_from_checkpoint={str(out)!r} and the same script")
            )
            say(f"after an interruption: {trainer.resume_hint}", soft_wrap=True)
        tracking.start(accelerator, config, out.name)
        trainer.learn(start_from, on_round)
        finish(trainer, run)
    finally:
        run.release()
    for tracker in accelerator.trackers:  # accelerate's end_training would take the process group down as well
        tracker.finish()
    return trainer


def finish(trainer: Trainer, run: RunFolder) -> None:
    """Save the tuned model, the summary and the page, and print the before/after table."""
    accelerator, clock = trainer.accelerator, trainer.clock
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    before, after = trainer.first_evaluation, trainer.last_evaluation
    assert before is not None
    assert after is not None
    with clock.phase("save"):
        is_adapter = hasattr(trainer.model.backbone, "peft_config")
        with run.whole("adapter" if is_adapter else "model") as folder:
            trainer.save_pretrained(folder)
    tree = parameter_tree(trainer.model.backbone, trainer.model.critic)
    summary = {
        "reward_before": before.reward,
        "reward_after": after.reward,
        "kl": after.kl,
        "metrics": after.metrics,
        "wall_seconds": clock.wall_seconds(),
        "seconds_by_phase": dict(clock.total),
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "rounds": trainer.rounds_done,
        "seed": trainer.config.train.seed,
        "steps": trainer.steps_done,
        "tokens_per_second": trainer.tokens_done / max(clock.total[trainer.TOKENS[1]], 1e-9),
        "model": str(getattr(trainer.config.model.model_path, "model_type", trainer.config.model.model_path)),
        "trainable_parameters": tree.trainable,
        "total_parameters": tree.total,
        "parameter_tree": tree.text(),
    }
    run.write_json("summary.json", summary)
    samples, changes = (before.samples, after.samples), {"reward": (before.reward, after.reward)}
    try:
        page = f"see {write_report(run.path)}"
        if (shown := read_run(run.path)).sweep and len(shown.before) == len(shown.after):
            samples = shown.before, shown.after
            changes = {f"reward at {setting}": change for setting, change in shown.sweep.items()}
    except SolotuneError as error:  # the tuned model is saved: no reason to end as a run that failed
        log.warning("%s", error)
        page = "there is no page of it"
    console.print(before_after_table(*samples, rows=8))
    label, _ = trainer.eval_settings[0]
    changes |= {f"{name}{label}": (before.metrics.get(name), value) for name, value in after.metrics.items()}
    told = [f"{name} {a:.3f} -> {b:.3f}" for name, (a, b) in changes.items() if a is not None and b is not None]
    told += [f"KL{label} {after.kl:.2f} nats a response"] if after.kl is not None else []
    told += [f"{summary['wall_seconds']:.0f} s, peak {format_bytes(summary['peak_memory_bytes'])}; {page}"]
    say(", ".join(told))


def _supported(config: TRLConfig) -> None:
    if not isinstance(config.method, PPOConfig | RFTConfig | SFTConfig | ILQLConfig):
        raise NotYetError(f"method.name {config.method.name!r} is not there yet; allowed are PPO, RFT, SFT and ILQL")
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


def _is_offline(config: TRLConfig) -> bool:
    return isinstance(config.method, SFTConfig | ILQLConfig)


def _offline_data(config: TRLConfig, samples: Sequence[Any], rewards: Any) -> dict[str, Any]:
    """What the method's trainer learns from.

    Raises:
        ConfigError: rewards without a method that learns from them, or the reverse, or a method that samples itself.
        DataError: the rewards do not belong to the samples.
    """
    method = config.method
    if isinstance(method, ILQLConfig):
        if rewards is None:
            raise ConfigError(
                "ILQL learns from a reward of each sample: give rewards= (data.reward_column in a recipe)"
            )
        return {"samples": list(samples), "rewards": checked_rewards(rewards, len(samples))}
    if not isinstance(method, SFTConfig):
        wanted = "default_sft_config()" if rewards is None else "default_ilql_config()"
        raise ConfigError(f"method.name = {method.name!r} does not learn from given samples: start from {wanted}")
    if rewards is not None:
        checked_rewards(rewards, len(samples))
        log.info("SFT learns every sample alike: the rewards are not used")
    return {"samples": list(samples)}


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


def _accelerator(config: TRLConfig, out: Path) -> Accelerator:
    accelerator = Accelerator(
        log_with=tracking.available_tracker(config.train.tracker),
        project_dir=config.train.logging_dir or str(out),
        kwargs_handlers=[DDP],
    )
    show_logs(logging.INFO if accelerator.is_main_process else logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return accelerator


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


def _as_recipe(
    config: TRLConfig,
    given: dict[str, Any],
    eval_prompts: Prompts,
    reward_fn: Callable[..., Any] | None,
    stop_sequences: Sequence[str],
    run: RunFolder,
    on_error: OnError | None,
) -> Recipe:
    """What `train()` was called with, as a recipe; its reward function is the caller's own code.

    Many prompts or samples are written to a file of their own beside it.
    """
    sources: dict[str, Any] = {}
    if "prompts" in given:
        sources["prompts"] = _in_file(_rows(given["prompts"]), "prompt", run.path / "prompts.jsonl", run)
    else:
        rewards = given.get("rewards")
        rows: list[Any] = given["samples"]
        if rewards is not None:
            rows = [{"sample": row, "reward": reward} for row, reward in zip(rows, rewards, strict=True)]
            sources["reward_column"] = "reward"
        sources["samples"] = _in_file(rows, "sample", run.path / "given_samples.jsonl", run)
    # A default evaluation prompt is the BOS alone, and has no text.
    sources["eval_prompts"] = _rows(eval_prompts) if all(eval_prompts.texts) or "prompts" in given else None
    data = DataConfig(**sources, stop_sequences=list(stop_sequences))
    if reward_fn is None:
        return Recipe(config, data)
    source = f"{_source_file(reward_fn)}:{getattr(reward_fn, '__qualname__', 'reward_fn')}"
    asked = (on_error or OnError())._asdict()
    return Recipe(config, data, RewardConfig(function=source, on_error=asked.pop("action"), **asked))


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
