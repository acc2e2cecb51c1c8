"""Learning in rounds: sample, score, measure, credit, then passes of optimizer steps over the rollouts.

A round, in the order of the code:

    1  sample    prompts -> token ids, log-probs, trunk activations
    2  score     text -> rewards
    3  measure   log-probs of policy and reference, values: one pass over the top
    4  credit    what each token is worth: the method's
    5  update    passes x minibatches of the method's losses
    6  tell      metrics, evaluation, checkpoint

A signal may end it after any step; the round that was begun is then part of the checkpoint.

Shapes: N rollouts of this process and round, T response length, L losses and statistics of a step.
"""

from __future__ import annotations

import contextlib
import logging
import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from solotune.algorithms.kl import k1
from solotune.config import StepPlan, TRLConfig
from solotune.data.prompts import Prompts
from solotune.models.policy import Measured
from solotune.rollout.records import FinishReason, Rollouts
from solotune.trainers.online import OnlineTrainer
from solotune.trainers.order import PromptOrder, minibatches
from solotune.trainers.round import Round, rows_of

log = logging.getLogger("solotune")


class RoundTrainer(OnlineTrainer):
    """Learns each round's rollouts in passes; a method gives `credit` and `losses`. See `OnlineTrainer` for the
    arguments."""

    CREDIT: ClassVar[Any]
    """What `credit` returns: a NamedTuple of tensors, (N, ...), and plain numbers."""
    LOSSES: ClassVar[tuple[str, ...]]
    """The metrics that `losses` returns, in its order."""

    plan: StepPlan

    def __init__(
        self, config: TRLConfig, reward_fn: Callable[..., Any], prompts: Prompts, eval_prompts: Prompts, **shared: Any
    ):
        super().__init__(config, reward_fn, prompts, eval_prompts, **shared)
        self.order = PromptOrder(self.n_prompts, config.train.seed)
        self.prompts_taken = 0
        """The place in `order`: prompts that finished rounds have sampled, of all processes."""
        self._told_surplus = False
        self.round: Round | None = None  # the one that is being learned from

    @abstractmethod
    def credit(self, rollouts: Rollouts, scores: Tensor, measured: Measured) -> Any:
        """What the response tokens are worth, a `CREDIT`.

        Args:
            scores: of the reward function, (N,) or dense (N, T); zero where it failed, and no token is left of the row.
        """

    @abstractmethod
    def losses(
        self, now: Measured, then: Measured, credit: Any, mask_bT: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, which carries the gradient, and `LOSSES`, (L,), of it.

        Args:
            now: the policy as it is, with gradients. then: as it was measured when the round began.
            credit: a `CREDIT`.
            mask_bT: True on response tokens.
            tokens: what sums are divided by: the tokens of the whole optimizer step, so that neither the loss nor a
                statistic depends on how the step is cut into micro-batches and processes.
        """

    @property
    def passes_a_round(self) -> int:
        """Passes over a round's rollouts."""
        return 1

    def ends_early(self, steps: list[Tensor]) -> bool:
        """Whether the round's other passes are left out after a pass with these steps, (L + 1,) each."""
        return False

    def after_credit(self, metrics: dict[str, Any]) -> None:
        """For methods that act on what is known of a round before its update."""

    def train_round(self) -> dict[str, Any]:
        """One round; returns its metrics.

        Raises:
            RoundInterrupted: a signal came; the state is that of before the round, or has the round in it.
        """
        if self.round is None:
            self.round = self.begin_round()
        with self.phase("update"):
            metrics = {**self.round.metrics, **self.update(self.round)}
        first_step, self.round = self.round.first_step, None
        self.rounds_done += 1
        self.tell(metrics, first_step)
        return metrics

    def begin_round(self) -> Round:
        """Sample, score, measure, credit."""
        with self.phase("sample"):
            rollouts = self.sample_rollouts()
        self.pause_point()
        with self.phase("score"):
            rollouts, texts, given = self.scored(rollouts)
            scores = self._as_tensor(given, rollouts)
        if self.rollout_log is not None:
            self.rollout_log.write(rollouts, texts, given)
        with self.phase("measure"):
            measured = self.measure(rollouts)
        self.pause_point()
        with self.phase("credit"):
            credit = self.credit(rollouts, scores, measured)
            metrics = self.round_metrics(rollouts, scores, measured, credit)
            self.after_credit(metrics)
        self.prompts_taken += rollouts.n_rollouts * self.accelerator.num_processes
        return Round(rollouts, measured, credit, self.steps_done, metrics, [])

    def sample_rollouts(self) -> Rollouts:
        """A round's responses of this process; which prompts and random numbers depends on the place alone."""
        n = self.plan.rollouts
        first = self.prompts_taken + self.accelerator.process_index * n
        positions = range(first, first + n)
        chosen = [self.order[position] for position in positions]
        return self.sampled(chosen, positions, self.rollout_settings, told=self.progress.doing)

    @torch.no_grad()
    def measure(self, rollouts: Rollouts) -> Measured:
        """Log-probs of policy and reference, values and entropies, in micro-batches of the size the update uses."""
        rows = torch.arange(rollouts.n_rollouts, device=self.device)

        def run(micro_batch: int) -> list[Measured]:
            temperature = self.rollout_settings.temperature
            return [self.policy("measure", rollouts.select(part), temperature) for part in rows.split(micro_batch)]

        columns = zip(*self.in_memory(run), strict=True)
        return Measured._make(None if column[0] is None else torch.cat(column) for column in columns)

    def update(self, this: Round) -> dict[str, float]:
        """Reshuffled passes over the round's rollouts; stops where `total_steps` are done.

        Steps that the round has already are left out: it was interrupted after them. Numbers stay on the device until
        the end, so that the host never waits within an update.
        """
        steps, first = this.steps, 0  # of the pass, within the round
        for epoch in range(self.passes_a_round):
            counter = self.rounds_done * self.passes_a_round + epoch
            left = self.plan.total_steps - this.first_step - first
            if left <= 0:
                break
            size, seed = self.config.train.batch_size, self.config.train.seed
            batches = minibatches(this.rollouts.n_rollouts, size, seed, counter)[:left]
            order = torch.cat(batches).to(self.device)  # one copy: a copy from the host waits for the device
            todo = order.split(size)[max(len(steps) - first, 0) :]
            for rows in todo:
                steps.append(self.optimizer_step(this.rollouts, this.measured, this.credit, rows))
                self.steps_done += 1
                self.progress.doing(f"updating, step {len(steps):,} of {self.plan.steps_per_round:,}")
                self.pause_point()
            if todo:
                self.post_backward_callback()
            if self.ends_early(steps[first : first + len(batches)]):
                break
            first += len(batches)
        means = self.sum_over_processes(torch.stack(steps).double()) / self.accelerator.num_processes
        taken = means[:, -1].isfinite()
        self.stepper.count(taken.tolist(), partial(self.keep_failure, this.rollouts))
        averages = dict(zip((*self.LOSSES, "policy/grad_norm"), means[taken].mean(0).tolist(), strict=True))
        skipped = float(len(taken) - int(taken.sum()))
        return {**averages, "policy/lr": float(self.scheduler.get_last_lr()[0]), "policy/skipped_steps": skipped}

    def optimizer_step(self, rollouts: Rollouts, measured: Measured, credit: Any, rows: Tensor) -> Tensor:
        """One step on the given rollouts; the gradient does not depend on how they are cut into micro-batches.

        Returns `LOSSES` and the gradient's norm, (L + 1,).
        """
        totals = self.in_memory(partial(self._accumulate, rollouts, measured, credit, rows))
        totals[-1] = self.stepper.step()
        return totals

    def _accumulate(
        self, rollouts: Rollouts, measured: Measured, credit: Any, rows: Tensor, micro_batch: int
    ) -> Tensor:
        """The gradient of a step, and its losses and statistics."""
        # DDP averages the gradients of W processes, each divided by (all tokens / W): together, by all tokens.
        tokens = self.sum_over_processes(rollouts.response_mask_NT[rows].sum().float()) / self.accelerator.num_processes
        tokens = tokens.clamp(min=1.0)  # none where every row of the batch was skipped
        totals = torch.zeros(len(self.LOSSES) + 1, device=self.device)
        parts = rows.split(micro_batch)
        for index, part in enumerate(parts):
            is_last = index + 1 == len(parts)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.policy):
                now: Measured = self.policy("update", rollouts.select(part), self.rollout_settings.temperature)
                mask_bT = rollouts.response_mask_NT[part]
                loss, losses = self.losses(now, rows_of(measured, part), rows_of(credit, part), mask_bT, tokens)
                self.accelerator.backward(loss)
            totals[:-1] += losses.detach()
        return totals

    def _as_tensor(self, scores: list[Any], rollouts: Rollouts) -> Tensor:
        """Scores (N,), or dense ones (N, T); zero for samples that got none."""
        if not any(isinstance(score, list) for score in scores):
            return torch.tensor([score or 0.0 for score in scores], dtype=torch.float32, device=self.device)
        lengths = rollouts.response_mask_NT.sum(-1).tolist()
        dense = torch.zeros(rollouts.response_mask_NT.shape, device=self.device)
        surplus = 0
        for row, (values, length) in enumerate(zip(scores, lengths, strict=True)):
            if values is None:
                continue
            kept = [*values[: length - 1], sum(values[length - 1 :])] if len(values) > length else values
            surplus += len(values) > length
            dense[row, : len(kept)] = torch.tensor(kept, dtype=torch.float32)
        if surplus and not self._told_surplus:
            self._told_surplus = True
            log.warning(
                "reward_fn returned more numbers than the response has tokens for %d of %d samples (a text that is "
                "encoded anew can have more tokens than were sampled); what is too many is added to the last token's",
                surplus,
                len(scores),
            )
        return dense

    def round_metrics(self, rollouts: Rollouts, scores: Tensor, measured: Measured, credit: Any) -> dict[str, Any]:
        """Statistics of the round over all processes; those of tokens count response tokens only."""
        mask_NT = rollouts.response_mask_NT
        scores_N = scores.sum(-1) if scores.ndim == 2 else scores
        gap_NT = (measured.logprobs_bT - rollouts.sample_logprobs_NT).abs().masked_fill(~mask_NT, 0.0)
        scored_N = mask_NT.any(-1)
        finished_N = (rollouts.finish_N != FinishReason.LENGTH) & scored_N
        kl_NT = torch.zeros_like(measured.logprobs_bT)
        if measured.ref_logprobs_bT is not None:
            kl_NT = k1(measured.logprobs_bT, measured.ref_logprobs_bT, mask_NT)
        n, tokens, score, square, kl, finished, entropy, gap = self.totals(
            scored_N, mask_NT, scores_N, scores_N.square(), kl_NT.sum(-1), finished_N, measured.entropies_bT, gap_NT
        )
        score, per_token = score / n, max(tokens, 1.0)
        return {
            "objective/score": score,
            "objective/score_std": math.sqrt(max(square / n - score**2, 0.0)),
            **({"objective/kl": kl / n} if measured.ref_logprobs_bT is not None else {}),
            "objective/entropy": entropy / per_token,
            "rollout/response_tokens": tokens / n,
            "rollout/finished": finished / n,
            "rollout/logprob_gap": gap / per_token,
            "rollout/skipped": rollouts.n_rollouts * self.accelerator.num_processes - n,
            "rollout/all_tokens": tokens,
        }

    def totals(self, *parts: Tensor) -> list[float]:
        """The sum of each tensor over all processes."""
        return self.sum_over_processes(torch.stack([part.double().sum() for part in parts])).tolist()

    def state(self) -> dict[str, Any]:
        unfinished = None if self.round is None else self.round.numbers()
        return {**super().state(), "prompts_taken": self.prompts_taken, "unfinished": unfinished}

    def state_tensors(self) -> dict[str, Tensor]:
        return {} if self.round is None else self.round.tensors()

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        taken = state["prompts_taken"]
        if not isinstance(taken, int) or isinstance(taken, bool) or not 0 <= taken <= 2**53:
            raise ValueError(f"prompts_taken = {taken}: this is not of a run")
        self.prompts_taken, self.round = taken, None
        if state["unfinished"] is not None:
            self.round = Round.restored(state["unfinished"], state["tensors"], self.device, self.CREDIT)

    def _data_order(self) -> dict[str, Any]:
        return {**super()._data_order(), "method.num_rollouts": self.plan.rollouts}
