"""What every trainer shares: model, optimizer, evaluation, metrics, checkpoints."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from solotune.data.prompts import Prompts, encode
from solotune.errors import ConfigError, ModelError, RewardError
from solotune.models.loading import build_policy, load_tokenizer
from solotune.models.policy import PolicyModel
from solotune.models.products import allow_tf32_beside, use_fastest_products
from solotune.rewards.guard import OnError
from solotune.rollout.records import Rollouts
from solotune.rollout.settings import SamplingSettings, sweep
from solotune.runs import checkpoint, tracking
from solotune.runs.clock import Clock, peak_memory_bytes
from solotune.runs.console import round_progress, say
from solotune.runs.evaluation import Evaluation
from solotune.runs.folder import RunFolder
from solotune.runs.signals import RoundInterrupted, Stop, stop_requests
from solotune.trainers.evaluation import evaluate
from solotune.trainers.optim import Stepper, build_optimizer, build_scheduler, load_scheduler
from solotune.trainers.order import Stream
from solotune.trainers.sampling import PromptSampler, Texts, separator_of
from solotune.trainers.scoring import Scorer

if TYPE_CHECKING:
    from solotune.config import StepPlan, TRLConfig
    from solotune.config.plans import GrowthPlan, PassPlan

T = TypeVar("T")
log = logging.getLogger("solotune")
DDP = DistributedDataParallelKwargs(broadcast_buffers=False)
"""Forward passes of evaluations differ in number between processes, and no buffer is trained."""
PHASES = ("sample", "score", "measure", "credit", "update", "evaluate")


class Trainer(ABC):
    """The loop around a method's rounds.

    A method gives `train_round`, which ends with `tell`, and adds what it has to remember to `state` and `load_state`.

    Args:
        config: trlX's configuration.
        plan: how many rounds and steps.
        reward_fn: called with the keywords among samples, prompts, outputs, tokenizer and the prompts' metadata that it
            takes; a number per sample, or a list of numbers per sample, one a response token. None: evaluations have no
            reward.
        eval_prompts: what is continued at every evaluation.
        room: tokens a prompt may have.
        run: where files go; None writes none.
        metric_fn: called at every evaluation with samples, prompts, outputs and metadata; a dict of named numbers.
        stop_sequences: texts that end a response and are cut off it.
        prompts: the training prompts, checked before weights are loaded.
        scores_on_main: call `reward_fn` and `metric_fn` on the first process alone, with the samples of all (as trlX);
            otherwise every process scores its own.
        on_error: what to do when `reward_fn` fails; default to stop.
        accelerator: default a new one.
        clock: phases are counted here, default a clock that starts now.
    Raises:
        ConfigError, DataError, ModelError: before weights are loaded where that can be told.
    """

    def __init__(
        self,
        config: TRLConfig,
        plan: StepPlan | GrowthPlan | PassPlan,
        reward_fn: Callable[..., Any] | None,
        eval_prompts: Prompts,
        room: int,
        run: RunFolder | None = None,
        metric_fn: Callable[..., dict[str, Any]] | None = None,
        stop_sequences: Sequence[str] = (),
        prompts: Prompts | None = None,
        scores_on_main: bool = False,
        on_error: OnError | None = None,
        accelerator: Accelerator | None = None,
        clock: Clock | None = None,
    ):
        self.config, self.plan = config, plan
        self.run = run
        self.accelerator = accelerator or Accelerator(kwargs_handlers=[DDP])
        self.device = self.accelerator.device
        self.clock = clock or Clock(self.device)
        use_fastest_products(self.device)

        self.tokenizer = load_tokenizer(config.tokenizer)
        self._scorer = Scorer(
            reward_fn,
            metric_fn,
            self.tokenizer,
            self.accelerator,
            scores_on_main,
            on_error or OnError(),
            config.train.seed,
        )
        self._room = room
        prompt_ids = [] if prompts is None else self._encode(prompts)
        eval_ids = self._encode(eval_prompts)
        with self.clock.phase("load"):
            policy = self.build_policy()
        allow_tf32_beside(p for p in policy.parameters() if not p.requires_grad)
        self._check_vocabulary(policy)
        self._check_positions(policy, self._longest([*prompt_ids, *eval_ids]))
        self._has_reference = policy.has_reference
        self.parameters = policy.trainable_parameters()
        optimizer = build_optimizer(config.optimizer, self.parameters)
        self.scheduler = build_scheduler(config.scheduler, optimizer)
        self.policy, self.optimizer = self.accelerator.prepare(policy, optimizer)
        self.stepper = Stepper(
            self.accelerator,
            self.parameters,
            self.optimizer,
            self.scheduler,
            config.train.max_grad_norm,
            config.train.max_skipped_steps,
        )

        self._eos, self._stops = _eos_token_ids(policy, self.tokenizer), list(stop_sequences)
        self._gen_kwargs: dict[str, Any] = getattr(config.method, "gen_kwargs", {})
        self.eval_settings = [(s.label, self.settings(s.gen_kwargs)) for s in sweep(self._gen_kwargs)]
        self._sample_eval = self.sampler(eval_prompts, eval_ids, Stream.EVALUATION)
        if prompts is not None:
            self.sampled = self.sampler(prompts, prompt_ids, Stream.ROLLOUTS)
        self.n_eval_prompts = len(eval_prompts)
        self.micro_batch = config.train.minibatch_size or config.train.batch_size
        self.resume_hint = "train.resume_from_checkpoint goes on from there"
        self.rounds_done = 0
        self.steps_done = 0
        self.tokens_done = 0.0
        self.first_evaluation: Evaluation | None = None
        self.last_evaluation: Evaluation | None = None
        self.evaluated_step = -1
        self.best_reward = -math.inf
        self.stop = Stop()
        self._untold: dict[str, Any] | None = None  # metrics and first step of a round that is done and not yet told of

    TOKENS: ClassVar[tuple[str, str]] = ("rollout", "sample")
    """The tokens whose number a second is told: the family of their metric, and the phase in which they are made."""

    def build_policy(self) -> PolicyModel:
        """The model, on this process's device, before anything is wrapped around it."""
        return build_policy(self.config, self.device)

    @abstractmethod
    def train_round(self) -> dict[str, Any]:
        """One round; returns its metrics."""

    def learn(self, resume_from: Path | None = None, on_round: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Train for the planned rounds, evaluating before the first, at every `eval_interval` and at the end.

        `on_round` is called after each round with its metrics.
        """
        self.say(self.plan.line)
        if resume_from is not None:
            self.load(resume_from)
            if self.run is not None:
                self.run.cut_after(self.rounds_done - (self._untold is not None))
                if self.accelerator.is_main_process:
                    checkpoint.drop_after(self.run.checkpoints, self.steps_done)
            self.clock.continue_from(self._seconds_before)
            self.say(f"resumed from {resume_from} at round {self.rounds_done}, step {self.steps_done}")
            if self._untold is not None:
                self.tell(**self._untold)
        else:
            self.evaluate_and_record()
        shown = self.accelerator.is_main_process
        with stop_requests() as self.stop, round_progress(self.plan.rounds, self.rounds_done, shown) as progress:
            while not self.is_over:
                try:
                    metrics = self.train_round()
                except RoundInterrupted:
                    self._save_and_exit()
                except RewardError as error:
                    self.save_checkpoint()
                    raise RewardError(f"{error}. The state is saved: {self.resume_hint}") from error
                progress.advance(metrics)
                self.post_epoch_callback()
                if on_round is not None:
                    on_round(metrics)
                if self._is_asked_to_stop() and not self.is_over:
                    self._save_and_exit()
        if self.evaluated_step != self.steps_done:  # resumed with nothing left to do
            self.evaluate_and_record()

    @property
    def is_over(self) -> bool:
        """Whether the planned steps or rounds are done; a round that ended early takes fewer steps."""
        return self.steps_done >= self.plan.total_steps or self.rounds_done >= self.plan.rounds

    def pause_point(self) -> None:
        """Called by a round where its state can be saved: ends the round here when a signal came.

        Several processes finish their round: they would have to agree, and that would make a GPU wait at each step.
        """
        asked = self.accelerator.num_processes == 1 and self.stop.signal_number is not None
        if asked and not self.is_over:  # the last round is finished instead: nothing is left to resume
            raise RoundInterrupted

    def _is_asked_to_stop(self) -> bool:
        """Whether any process got a signal: all of them stop after the same round."""
        asked = torch.tensor(float(self.stop.signal_number is not None), device=self.device)
        return bool(self.sum_over_processes(asked) > 0)

    def _save_and_exit(self) -> NoReturn:
        self.save_checkpoint()
        goes_on = f"saved. {self.resume_hint}"
        if not self.config.train.save_optimizer:
            goes_on = "the model is saved, but the run cannot go on: train.save_optimizer is false"
        self.say(f"stopped after {self.rounds_done} rounds and {self.steps_done} steps; {goes_on}")
        raise SystemExit(self.stop.exit_code)

    @property
    def saves_every_round(self) -> bool:
        """Whether every round ends with a checkpoint, whatever `train.checkpoint_interval` says."""
        return False

    def post_epoch_callback(self) -> None:  # noqa: B027  may be overridden, need not be
        """For subclasses: called after every round (trlX's name)."""

    def post_backward_callback(self) -> None:  # noqa: B027
        """For subclasses: called after every pass over the rollouts of a round (trlX's name)."""

    def score(self, texts: Texts, stream: Stream = Stream.ROLLOUTS) -> list[Any]:
        """The reward function's answer: a number or a list of numbers a sample; None for one without a reward."""
        return self._scorer.rewards(
            texts, stream, self.steps_done, self.run.path if self.run is not None else Path.cwd()
        )

    def tell(self, metrics: dict[str, Any], first_step: int) -> None:
        """Evaluate and save where an interval was crossed or the run is over; write the round's metrics."""
        train = self.config.train
        self._untold = {"metrics": dict(metrics), "first_step": first_step}  # the evaluation calls other people's code
        if self.is_over or self.steps_done // train.eval_interval > first_step // train.eval_interval:
            self.evaluate_and_record()
        seconds = self.clock.end_round()
        family, phase = self.TOKENS
        tokens = metrics.pop(f"{family}/all_tokens")
        self.tokens_done += tokens
        metrics[f"{family}/tokens_per_second"] = tokens / max(seconds.get(phase, 0.0), 1e-9)
        metrics |= {f"time/{name}": seconds.get(name, 0.0) for name in PHASES}
        metrics["time/round"] = sum(seconds.get(name, 0.0) for name in PHASES)
        metrics["memory/peak_bytes"] = peak_memory_bytes(self.device)
        if self.run is not None:
            self.run.append(self.run.metrics, [{"round": self.rounds_done, "step": self.steps_done, **metrics}])
        vf_coef = float(getattr(self.config.method, "vf_coef", 0.0))
        self.accelerator.log(tracking.round_names(metrics, vf_coef), step=self.steps_done)
        self._untold = None
        is_due = self.steps_done // train.checkpoint_interval > first_step // train.checkpoint_interval
        if self.is_over or is_due or self.saves_every_round:
            if self.run is not None and self.accelerator.is_main_process:
                checkpoint.drop_after(self.run.checkpoints, first_step, before=self.steps_done)
            self.save_checkpoint()

    def evaluate(self, settings: SamplingSettings | None = None) -> Evaluation:
        """Sample the evaluation prompts with the same random numbers as ever, and score them.

        Args:
            settings: how to sample, default `gen_kwargs` (of a sweep, its first value).
        """
        with self.clock.phase("evaluate"):
            return evaluate(
                self.accelerator,
                self.policy,
                self._sample_eval,
                self.n_eval_prompts,
                settings or self.eval_settings[0][1],
                lambda texts: self.score(texts, Stream.EVALUATION),
                lambda texts: self._scorer.metrics(texts, self.steps_done),
                self.in_memory,
                measures_kl=self._has_reference,
            )

    def evaluate_and_record(self) -> Evaluation:
        """Evaluate, append the samples to the run's file, keep the best model.

        A generation sweep (a list in `gen_kwargs`) is evaluated at each of its values; the first one is returned, the
        highest reward of all decides whether the model is the best.
        """
        evaluations = [(label, self.evaluate(settings)) for label, settings in self.eval_settings]
        evaluation = evaluations[0][1]
        self.first_evaluation = self.first_evaluation or evaluation
        self.last_evaluation, self.evaluated_step = evaluation, self.steps_done
        for label, each in evaluations:
            if self.run is not None:
                place = {"round": self.rounds_done, "step": self.steps_done}
                place |= {"setting": label.removeprefix("@")} if label else {}
                self.run.append(self.run.samples, [{**place, **sample} for sample in each.samples])
            self.accelerator.log(tracking.evaluation_names(each, label), step=self.steps_done)
            tracking.log_samples(self.accelerator, each, self.steps_done, label)
        rewards = [e.metrics.get("reward") if e.reward is None else e.reward for _, e in evaluations]  # as trlX
        best = max((reward for reward in rewards if reward is not None), default=-math.inf)
        if best > self.best_reward and self.steps_done > 0 and self.config.train.save_best:
            self.best_reward = best
            if self.run is not None:
                with self.run.whole("best") as folder:
                    self.save_pretrained(folder)
        return evaluation

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter (or the whole model, where it was trained itself) and the tokenizer; PEFT or transformers
        load it without solotune."""
        if self.accelerator.is_main_process:
            self.model.save_pretrained(Path(folder))
            self.tokenizer.save_pretrained(folder)

    def keep_failure(self, rollouts: Rollouts | None = None) -> Path | None:
        """Write down what a failure can be understood by; the folder it is in."""
        return None if self.run is None else self.run.save_failure(self.model, rollouts)

    def save_checkpoint(self) -> None:
        """Save what resuming needs, at the end of a round."""
        if self.run is not None:
            self.save(self.run.checkpoints)

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint, `step_N`, into a folder: what resuming needs (not with `train.save_optimizer` false), and
        in `hf_model` what PEFT or transformers load. The last `train.keep_checkpoints` in the folder are kept."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            optimizer = self.optimizer.optimizer if self.config.train.save_optimizer else None
            with checkpoint.writing(Path(folder), self.steps_done, self.config.train.keep_checkpoints) as aside:
                self.save_pretrained(aside / "hf_model")
                if optimizer is not None:
                    checkpoint.save(aside, self.steps_done, self.model, optimizer, self.state(), self.state_tensors())

    def load(self, folder: str | Path) -> None:
        """Go on from a checkpoint that `save` wrote: its `step_N` folder, or the newest in the folder it was given."""
        found = checkpoint.newest(Path(folder))
        if found is None:
            raise ConfigError(f"{str(folder)!r} holds no checkpoint; allowed are what save() was given, and its step_N")
        state = checkpoint.restore(found, self.model, self.optimizer.optimizer)
        with checkpoint.reading(found):
            self.load_state(state)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`transformers.generate` of the tuned model, with the `gen_kwargs` of rollouts where none are given."""
        own = getattr(self.config.method, "gen_experience_kwargs", None) or sweep(self._gen_kwargs)[0].gen_kwargs
        return self._hf_generate(input_ids, attention_mask, {**own, **kwargs})

    def generate_eval(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The same with the `gen_kwargs` of evaluations."""
        return self._hf_generate(input_ids, attention_mask, {**sweep(self._gen_kwargs)[0].gen_kwargs, **kwargs})

    def _hf_generate(self, input_ids: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        ids = input_ids.to(self.device)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(self.device)
        if options.get("eos_token_id") == -1:
            options["eos_token_id"] = None
        options = {"pad_token_id": self.tokenizer.pad_token_id, **options}
        return self.model.generate(input_ids=ids, attention_mask=mask, **options)

    @property
    def model(self) -> PolicyModel:
        """The policy without what `accelerate` wrapped around it."""
        return self.accelerator.unwrap_model(self.policy)

    def settings(self, gen_kwargs: dict[str, Any]) -> SamplingSettings:
        """How to sample, with the model's and tokenizer's EOS unless `gen_kwargs` name others."""
        return SamplingSettings.from_gen_kwargs(gen_kwargs, self._eos, self._stops)

    def sampler(self, prompts: Prompts, prompt_ids: list[list[int]], stream: Stream) -> PromptSampler:
        """A sampler over these prompts with random numbers of its own."""
        chunk_size = getattr(self.config.method, "chunk_size", self.config.train.batch_size)
        seed, separator = self.config.train.seed, separator_of(self.config)
        return PromptSampler(
            self.policy, self.tokenizer, prompts, prompt_ids, seed, stream, chunk_size, self.device, separator
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors, JSON."""
        first, last = self.first_evaluation, self.last_evaluation
        return {
            "round": self.rounds_done,
            "best_reward": self.best_reward if math.isfinite(self.best_reward) else None,
            "scheduler": {key: value for key, value in self.scheduler.state_dict().items() if _is_json(value)},
            "first_evaluation": first._asdict() if first is not None else None,
            "last_evaluation": last._asdict() if last is not None else None,
            "evaluated_step": self.evaluated_step,
            "skipped_in_a_row": self.stepper.skipped_in_a_row,
            "data_order": self._data_order(),
            "tokens_done": self.tokens_done,
            "seconds_by_phase": dict(self.clock.total),
            "untold": self._untold,
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """The part of `state` that is tensors, by name, on the CPU; `load_state` gets it as `state["tensors"]`."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        if state["data_order"] != self._data_order():
            raise ConfigError(
                f"the checkpoint was made with {state['data_order']}, this run has {self._data_order()}: prompts "
                "would be repeated or skipped; resume with the same settings"
            )
        self.rounds_done, self.steps_done = state["round"], state["step"]
        self.evaluated_step = state["evaluated_step"]
        self.stepper.skipped_in_a_row = state["skipped_in_a_row"]
        self.best_reward = -math.inf if state["best_reward"] is None else state["best_reward"]
        load_scheduler(self.scheduler, state["scheduler"])
        if state["first_evaluation"] is not None:
            self.first_evaluation = Evaluation(**state["first_evaluation"])
            self.last_evaluation = Evaluation(**state["last_evaluation"])
        self.tokens_done = state["tokens_done"]
        self._seconds_before: dict[str, float] = state["seconds_by_phase"]
        self._untold = state["untold"]

    def _data_order(self) -> dict[str, Any]:
        """What decides which prompts and random numbers a round takes."""
        rollouts = getattr(self.config.method, "num_rollouts", 0)
        processes = self.accelerator.num_processes
        return {"train.seed": self.config.train.seed, "method.num_rollouts": rollouts, "processes": processes}

    def say(self, line: str) -> None:
        """One line on the terminal, from one process."""
        if self.accelerator.is_main_process:
            say(line)

    def in_memory(self, run: Callable[[int], T]) -> T:
        """`run(micro_batch)`, repeated with half the rows a pass whenever the GPU's memory does not hold them.

        What `run` does must not depend on the size of its passes; training draws no random numbers that would have to
        be put back. Several processes do not recover: the others are waiting inside a reduction.
        """
        while True:
            try:
                return run(self.micro_batch)
            except torch.OutOfMemoryError:
                if self.micro_batch == 1 or self.accelerator.num_processes > 1:
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.micro_batch = -(-self.micro_batch // 2)
            log.warning(
                "out of GPU memory: the pass is repeated with %d rows at a time, to the same result; "
                "train.minibatch_size: %d says so from the start",
                self.micro_batch,
                self.micro_batch,
            )

    def sum_over_processes(self, x: Tensor) -> Tensor:
        """The same tensor with the values of all processes added up."""
        return self.accelerator.reduce(x, reduction="sum") if self.accelerator.num_processes > 1 else x  # type: ignore[return-value]

    def _encode(self, prompts: Prompts) -> list[list[int]]:
        special, goes_on = self.config.tokenizer.add_special_tokens, not self.config.model.is_seq2seq
        return encode(prompts, self.tokenizer, self._room, special, goes_on)

    def _check_vocabulary(self, policy: PolicyModel) -> None:
        embeddings: int = policy.lm.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        if len(self.tokenizer) > embeddings:
            raise ModelError(
                f"tokenizer.tokenizer_path {self.config.tokenizer.tokenizer_path!r} has {len(self.tokenizer):,} "
                f"tokens, but the model has embeddings for {embeddings:,}; use the model's own tokenizer"
            )

    def _longest(self, prompt_ids: list[list[int]]) -> int:
        """Tokens of the longest sequence that the model may be given."""
        prompt, new = max(map(len, prompt_ids), default=0), self.config.train.seq_length - self._room
        return max(prompt, new) if self.config.model.is_seq2seq else prompt + new

    def _check_positions(self, policy: PolicyModel, longest: int) -> None:
        if policy.n_positions is not None and longest > policy.n_positions:
            raise ModelError(
                f"{type(policy.lm).__name__} has {policy.n_positions:,} positions, but sequences have up to "
                f"{longest:,} tokens; lower train.seq_length = {self.config.train.seq_length:,} or max_new_tokens in "
                "method.gen_kwargs"
            )


def _is_json(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool, list, type(None)))


def _eos_token_ids(policy: PolicyModel, tokenizer: Any) -> list[int]:
    """The model's own end-of-sequence tokens and the tokenizer's."""
    generation = getattr(policy.lm, "generation_config", None)
    given = getattr(generation, "eos_token_id", None)
    ids = given if isinstance(given, list) else [given]
    vocabulary = int(policy.lm.get_output_embeddings().weight.shape[0])  # type: ignore[union-attr,arg-type]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None and i < vocabulary})
