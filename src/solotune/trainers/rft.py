"""Rejection-sampling fine-tuning: sample, keep each prompt's best, learn them as text; as in ReST (arXiv:2308.08998).

A round, in the order of the code:

    1  sample    every prompt -> n_generations_per_prompt responses, trunk activations
    2  score     text -> rewards
    3  credit    n_improve_steps selections with a rising percentile, duplicates removed
    4  update    a pass over each selection: negative log-likelihood of the responses
    5  tell      metrics, evaluation, checkpoint

A round learns from its own samples alone, so nothing has to be kept from one to the next.

Shapes: P prompts of this process, G samples of each, N = P * G rollouts, T response length.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from solotune.algorithms.rft import first_of_each, percentile_schedule, select
from solotune.algorithms.sft import sft_loss
from solotune.config import RFTConfig, TRLConfig
from solotune.config.plans import GrowthPlan
from solotune.data.prompts import Prompts
from solotune.errors import ConfigError
from solotune.rollout.records import FinishReason, Rollouts
from solotune.trainers.online import OnlineTrainer
from solotune.trainers.order import even_batches
from solotune.trainers.registry import register_trainer

log = logging.getLogger("solotune")


@register_trainer("AccelerateRFTTrainer")
@register_trainer
class RFTTrainer(OnlineTrainer):
    """Tunes a language model on the best of its own samples; processes share the training prompts out. See
    `OnlineTrainer` for the arguments."""

    METHOD = RFTConfig

    plan: GrowthPlan

    def __init__(
        self, config: TRLConfig, reward_fn: Callable[..., Any], prompts: Prompts, eval_prompts: Prompts, **shared: Any
    ):
        super().__init__(config, reward_fn, prompts, eval_prompts, **shared)
        if not self.rollout_settings.do_sample:
            raise ConfigError(
                "method.gen_kwargs.do_sample = False: a prompt's samples would all be the same, and none better than "
                "another; must be true"
            )
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        if self.n_prompts < processes:
            raise ConfigError(f"{self.n_prompts} prompts for {processes} processes: each needs one of its own at least")
        self.own_prompts = list(range(process, self.n_prompts, processes))

    def train_round(self) -> dict[str, Any]:
        """One growth step and its improvement steps; returns their metrics."""
        first_step = self.steps_done
        with self.phase("sample"):
            rollouts = self.sample_rollouts()
        self.pause_point()
        with self.phase("score"):
            rollouts, texts, given = self.scored(rollouts)
            sums = [math.nan if s is None else sum(s) if isinstance(s, list) else s for s in given]
            scores_N = self._without_gaps(torch.tensor(sums, dtype=torch.float64))
        self.pause_point()
        if self.rollout_log is not None:
            self.rollout_log.write(rollouts, texts, given)
        with self.phase("credit"):
            passes = self.select(rollouts, scores_N)
            metrics = self._round_metrics(rollouts, scores_N, passes)
            rollouts, passes = self._only_selected(rollouts, passes)
        with self.phase("update"):
            metrics |= self.update(rollouts, passes)
        self.rounds_done += 1
        self.tell(metrics, first_step)
        return metrics

    def sample_rollouts(self) -> Rollouts:
        """Every sample of every prompt of this process, prompt by prompt; a row's random numbers depend on the round,
        its prompt and its number alone."""
        samples_G = range(self.method.n_generations_per_prompt)
        rows = [(prompt, sample) for prompt in self.own_prompts for sample in samples_G]
        first = self.rounds_done * self.n_prompts
        row_ids = [(first + prompt) * len(samples_G) + sample for prompt, sample in rows]
        groups = [first + prompt for prompt, _ in rows]
        return self.sampled([prompt for prompt, _ in rows], row_ids, self.rollout_settings, groups, self.progress.doing)

    def _without_gaps(self, scores_N: Tensor) -> Tensor:
        """A sample without a score counts as its prompt's worst, so that no other is better because of it; it is never
        learned from."""
        scores_PG = scores_N.view(-1, self.method.n_generations_per_prompt)
        worst_P = scores_PG.nan_to_num(nan=math.inf, posinf=math.inf).amin(-1)
        worst_P = torch.where(worst_P.isinf(), 0.0, worst_P)
        return torch.where(scores_PG.isnan(), worst_P[:, None], scores_PG).flatten()

    def select(self, rollouts: Rollouts, scores_N: Tensor) -> list[Tensor]:
        """The rows that each improvement step of the round learns from: good enough, and each response once."""
        method = self.method
        scores_PG = scores_N.view(-1, method.n_generations_per_prompt)
        total = self.sum_over_processes(scores_N.sum().to(self.device))
        mean = float(total) / (self.n_prompts * method.n_generations_per_prompt)
        schedule = percentile_schedule(method.start_percentile, method.end_percentile, method.n_improve_steps)
        distinct = first_of_each(
            (*rollouts.prompt_tokens(row), -1, *rollouts.response_tokens(row)) for row in range(rollouts.n_rollouts)
        )
        rows = torch.tensor(distinct)
        rows = rows[rollouts.response_mask_NT.any(-1).cpu()[rows]]
        return [
            rows[select(scores_PG, percentile, mean).is_selected_PG.flatten()[rows]]
            for percentile in schedule[: self.plan.passes_in(self.rounds_done)]
        ]

    def update(self, rollouts: Rollouts, passes: list[Tensor]) -> dict[str, float]:
        """A shuffled pass over each selection, in batches of nearly equal size; stops where `total_steps` are done.

        Numbers stay on the device until the end, so that the host never waits within an update.
        """
        steps: list[Tensor] = []
        for index, selected in enumerate(passes):
            counter = self.rounds_done * self.method.n_improve_steps + index
            train, left = self.config.train, self.plan.total_steps - self.steps_done
            together = self._over_processes(len(selected))
            n_batches = math.ceil(together / (train.batch_size * self.accelerator.num_processes))
            if together == 0:
                log.info("no sample is better than another: pass %d takes no step", index + 1)
            for places in even_batches(len(selected), n_batches, train.seed, counter)[:left]:
                steps.append(self.optimizer_step(rollouts, selected[places].to(self.device)))
                self.steps_done += 1
                self.progress.doing(f"updating, {len(steps):,} steps in pass {index + 1} of {len(passes)}")
            self.post_backward_callback()
        lr = {"policy/lr": float(self.scheduler.get_last_lr()[0])}
        if not steps:
            return {"objective/loss": math.nan, "policy/grad_norm": math.nan, "policy/skipped_steps": 0.0, **lr}
        means = self.sum_over_processes(torch.stack(steps).double()) / self.accelerator.num_processes
        taken = means[:, -1].isfinite()
        self.stepper.count(taken.tolist(), partial(self.keep_failure, rollouts))
        averages = dict(zip(("objective/loss", "policy/grad_norm"), means[taken].mean(0).tolist(), strict=True))
        return {**averages, "policy/skipped_steps": float(len(taken) - int(taken.sum())), **lr}

    def optimizer_step(self, rollouts: Rollouts, rows: Tensor) -> Tensor:
        """One step on the given rollouts; the gradient does not depend on how they are cut into micro-batches.

        A process that has none left takes part with a loss of zero. Returns the loss and the gradient's norm, (2,).
        """
        loss = self.in_memory(partial(self._accumulate, rollouts, rows))
        return torch.stack([loss, self.stepper.step().to(loss)])

    def _accumulate(self, rollouts: Rollouts, rows: Tensor, micro_batch: int) -> Tensor:
        """The gradient of a step, and its loss."""
        # DDP averages the gradients of W processes, each divided by (all tokens / W): together, by all tokens.
        tokens = self.sum_over_processes(rollouts.response_mask_NT[rows].sum().float()) / self.accelerator.num_processes
        total = torch.zeros((), device=self.device)
        stands_in = len(rows) == 0
        parts = torch.zeros(1, dtype=torch.long, device=self.device).split(1) if stands_in else rows.split(micro_batch)
        for index, part in enumerate(parts):
            is_last = index + 1 == len(parts)
            chosen = rollouts.select(part)
            counts = chosen.response_mask_NT & (not stands_in)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.policy):
                now = self.policy("update", chosen, self.rollout_settings.temperature)
                loss = sft_loss(now.logprobs_bT.flatten(), counts.flatten(), tokens)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _only_selected(self, rollouts: Rollouts, passes: list[Tensor]) -> tuple[Rollouts, list[Tensor]]:
        """The rollouts that any pass learns from (the first one where none does), and the passes' rows among them."""
        kept = torch.cat([torch.zeros(0, dtype=torch.long), *passes]).unique()
        if len(kept) == 0:
            kept = torch.zeros(1, dtype=torch.long)
        return rollouts.select(kept.to(self.device)), [torch.searchsorted(kept, rows) for rows in passes]

    def _over_processes(self, count: int) -> int:
        return int(self.sum_over_processes(torch.tensor(float(count), device=self.device)))

    def _round_metrics(self, rollouts: Rollouts, scores_N: Tensor, passes: list[Tensor]) -> dict[str, float]:
        """Statistics of the round over all processes; those of tokens count response tokens only."""
        mask_NT = rollouts.response_mask_NT
        scored_N = mask_NT.any(-1).cpu()
        selected = torch.cat([torch.zeros(0, dtype=torch.long), *passes])
        scores_PG = scores_N.view(-1, self.method.n_generations_per_prompt)
        parts = [
            scored_N,
            scores_N[scored_N],
            scores_N[scored_N].square(),
            mask_NT.sum(-1),
            (rollouts.finish_N.cpu() != FinishReason.LENGTH) & scored_N,
            torch.tensor(float(len(selected))),
            scores_N[selected],
            scores_PG.amin(-1) == scores_PG.amax(-1),
            ~scored_N,
        ]
        totals = torch.stack([part.double().sum().to(self.device) for part in parts])
        n, score, square, tokens, finished, n_selected, good, equal, skipped = self.sum_over_processes(totals).tolist()
        score /= n
        return {
            "objective/score": score,
            "objective/score_std": math.sqrt(max(square / n - score**2, 0.0)),
            "objective/selected_score": good / n_selected if n_selected else math.nan,
            "rollout/selected": n_selected / max(len(passes), 1),
            "rollout/equal_prompts": equal / self.n_prompts,
            "rollout/response_tokens": tokens / n,
            "rollout/finished": finished / n,
            "rollout/skipped": skipped,
            "rollout/all_tokens": tokens,
        }

    def _data_order(self) -> dict[str, int]:
        return {
            "train.seed": self.config.train.seed,
            "method.n_generations_per_prompt": self.method.n_generations_per_prompt,
            "method.n_improve_steps": self.method.n_improve_steps,
            "prompts": self.n_prompts,
            "processes": self.accelerator.num_processes,
        }
