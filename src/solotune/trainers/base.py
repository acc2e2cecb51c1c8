"""The loop around a method's rounds: rounds, evaluations, metrics, checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor

from solotune.errors import ConfigError, RewardError
from solotune.progress import phase_progress
from solotune.runs import checkpoint, tracking
from solotune.runs.clock import peak_memory_bytes
from solotune.runs.console import Rounds, round_progress
from solotune.runs.evaluation import Evaluation
from solotune.runs.signals import RoundInterrupted, Stop, stop_requests
from solotune.trainers.learner import Learner
from solotune.trainers.optim import load_scheduler

if TYPE_CHECKING:
    from solotune.config import TRLConfig
    from solotune.config.plans import Plan
    from solotune.rollout.settings import SamplingSettings

PHASES = ("sample", "score", "measure", "credit", "update", "evaluate")
TOLD = {"sample": "sampling", "score": "scoring", "measure": "measuring", "update": "updating"}
"""What a round says that it is doing, by phase."""


class Trainer(Learner, ABC):
    """The loop around a method's rounds.

    A method gives `train_round`, which ends with `tell`, and adds what it has to remember to `state` and `load_state`.

    Args:
        config: trlX's configuration.
        plan: how many rounds and steps.
        given: see `Learner`.
    """

    def __init__(self, config: TRLConfig, plan: Plan, *given: Any, **shared: Any):
        super().__init__(config, *given, **shared)
        self.plan = plan
        self.resume_hint = "train.resume_from_checkpoint goes on from there"
        self.progress = Rounds(plan.rounds)
        self.tokens_done = 0.0
        self.first_evaluation: Evaluation | None = None
        self.last_evaluation: Evaluation | None = None
        self.evaluated_step = -1
        self._saving_seconds = 0.0
        self.best_reward = -math.inf
        self.stop = Stop()
        self._untold: dict[str, Any] | None = None  # metrics and first step of a round that is done and not yet told of

    TOKENS: ClassVar[tuple[str, str]] = ("rollout", "sample")
    """The tokens whose number a second is told: the family of their metric, and the phase in which they are made."""

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
        after = self._evaluation_seconds or 0.0
        rounds = round_progress(self.plan.rounds, self.rounds_done, shown, after)
        with stop_requests() as self.stop, rounds as self.progress:
            while not self.is_over:
                try:
                    metrics = self.train_round()
                except RoundInterrupted:
                    self._save_and_exit()
                except RewardError as error:
                    self.save_checkpoint()
                    raise RewardError(f"{error}. The state is saved: {self.resume_hint}") from error
                self.progress.end_round(metrics)
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

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of a round: its seconds are counted, and it is told what is being done."""
        if name in TOLD:
            self.progress.doing(TOLD[name])
        with self.clock.phase(name):
            yield

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

    def post_epoch_callback(self) -> None:
        """For subclasses: called after every round (trlX's name)."""

    def post_backward_callback(self) -> None:
        """For subclasses: called after every pass over the rollouts of a round (trlX's name)."""

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
            place = {"round": self.rounds_done, "step": self.steps_done, "time/at": time.time()}
            self.run.append(self.run.metrics, [{**place, **metrics}])
        vf_coef = float(getattr(self.config.method, "vf_coef", 0.0))
        self.accelerator.log(tracking.round_names(metrics, vf_coef), step=self.steps_done)
        self._untold = None
        is_due = self.steps_done // train.checkpoint_interval > first_step // train.checkpoint_interval
        if self.is_over or is_due or self.saves_every_round:
            if self.run is not None and self.accelerator.is_main_process:
                checkpoint.drop_after(self.run.checkpoints, first_step, before=self.steps_done)
            self.save_checkpoint()

    def evaluate(self, settings: SamplingSettings | None = None) -> Evaluation:
        """As `Learner.evaluate`; the rounds hear how long it took."""
        evaluation = super().evaluate(settings)
        self.progress.evaluated(self._evaluation_seconds or 0.0)
        return evaluation

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

    def save_checkpoint(self) -> None:
        """Save what resuming needs, at the end of a round."""
        if self.run is not None:
            self.save(self.run.checkpoints)

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint, `step_N`, into a folder: what resuming needs (not with `train.save_optimizer` false), and
        in `hf_model` what PEFT or transformers load. The last `train.keep_checkpoints` in the folder are kept."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        with phase_progress("saving a checkpoint", expected=self._saving_seconds) as phase:
            optimizer = self.optimizer.optimizer if self.config.train.save_optimizer else None
            with checkpoint.writing(Path(folder), self.steps_done, self.config.train.keep_checkpoints) as aside:
                self.save_pretrained(aside / "hf_model")
                if optimizer is not None:
                    checkpoint.save(aside, self.steps_done, self.model, optimizer, self.state(), self.state_tensors())
        self._saving_seconds = phase.seconds

    def load(self, folder: str | Path) -> None:
        """Go on from a checkpoint that `save` wrote: its `step_N` folder, or the newest in the folder it was given."""
        found = checkpoint.newest(Path(folder))
        if found is None:
            raise ConfigError(f"{str(folder)!r} holds no checkpoint; allowed are what save() was given, and its step_N")
        state = checkpoint.restore(found, self.model, self.optimizer.optimizer)
        with checkpoint.reading(found):
            self.load_state(state)

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
        return {"train.seed": self.config.train.seed, "processes": self.accelerator.num_processes}


def _is_json(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool, list, type(None)))
