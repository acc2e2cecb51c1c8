"""What methods that learn from given samples share: passes over the data, the cached trunk, rounds between evaluations.

A round, in the order of the code:

    1  measure   what the frozen trunk makes of every sample: once in a run, where samples are learned from again
    2  update    optimizer steps up to the next evaluation, checkpoint or end of a pass
    3  tell      metrics, evaluation, checkpoint

Which samples a step learns from is a function of the seed and the step, so a resumed run needs no other position.
"""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from solotune.config import TRLConfig
from solotune.config.plans import PassPlan
from solotune.data.batches import Batch, collate
from solotune.data.dialogues import encode_pairs, encode_samples
from solotune.data.prompts import Prompts
from solotune.models.loading import load_tokenizer
from solotune.models.offline import OfflineModel
from solotune.progress import phase_progress
from solotune.trainers.base import Trainer
from solotune.trainers.order import minibatches
from solotune.trainers.sampling import room_for_prompts
from solotune.trainers.trunk_cache import TrunkCache

log = logging.getLogger("solotune")

SAMPLES_A_SECOND = 3000
"""That are tokenized, roughly: only to say so where it will take long."""


class OfflineTrainer(Trainer):
    """Learns from given samples; see `Trainer` for the other arguments.

    Args:
        samples: texts, or dialogues [prompt, output, prompt, output, ...].
        reward_fn: scores evaluation samples; None for no score.
    Raises:
        DataError: a sample is no text or dialogue; see `data.dialogues.encode_samples`.
    """

    TOKENS = ("policy", "update")
    LOSSES: ClassVar[tuple[str, ...]]
    """Metrics that `losses` returns, in its order; the first is what is minimised."""

    plan: PassPlan

    def __init__(
        self,
        config: TRLConfig,
        samples: Sequence[Any],
        eval_prompts: Prompts,
        reward_fn: Callable[..., Any] | None = None,
        **shared: Any,
    ):
        self.method_of(config)  # before anything is read
        tokenizer = load_tokenizer(config.tokenizer)
        special = config.tokenizer.add_special_tokens
        encode = encode_pairs if config.model.is_seq2seq else encode_samples
        accelerator = shared.get("accelerator")
        shown = accelerator is None or accelerator.is_main_process
        about = len(samples) / SAMPLES_A_SECOND
        with phase_progress(f"tokenizing {len(samples):,} samples", expected=about, shown=shown):
            self.samples = encode(samples, tokenizer, config.train.seq_length, special)
        n_processes = 1 if accelerator is None else accelerator.num_processes
        plan = config.method.plan(config.train, len(self.samples), n_processes)
        super().__init__(config, plan, reward_fn, eval_prompts, room_for_prompts(config), **shared)
        self.own, self.stands_in = self._share()
        self.packs = self._packs()
        self._cache: TrunkCache | None = None
        self._steps: list[Tensor] = []  # losses and statistics of the round's steps so far

    def _longest(self, prompt_ids: list[list[int]]) -> int:
        inputs = [len(ids) - 1 for ids in self.samples.ids] + [len(ids) for ids in self.samples.prompts]
        return max(super()._longest(prompt_ids), *inputs)

    @abstractmethod
    def losses(self, batch: Batch, trunk_MH: Tensor | None, chosen: Tensor, tokens: Tensor) -> Tensor:
        """The losses of a micro-batch, (len(LOSSES),): sums divided by `tokens`; the first carries the gradient.

        Args:
            batch, trunk_MH: the samples, and what the trunk makes of them where that is kept.
            chosen: their indices, (n,).
            tokens: what sums are divided by.
        """

    def after_step(self) -> None:
        """For methods that do something after every optimizer step."""

    def train_round(self) -> dict[str, Any]:
        """Optimizer steps up to the next evaluation, checkpoint or end of a pass; returns their metrics."""
        first_step = self.steps_done - len(self._steps)
        with self.phase("measure"):
            self._fill_cache()
        with self.phase("update"):
            metrics = self.update()
        self._steps = []
        self.rounds_done += 1
        self.tell(metrics, first_step)
        return metrics

    @property
    def is_over(self) -> bool:
        """By steps alone: how many rounds there are depends on the intervals, which may change when a run goes on."""
        return self.steps_done >= self.plan.total_steps

    def update(self) -> dict[str, Any]:
        """The steps of a round. Numbers stay on the device until its end, so that the host never waits within it."""
        steps = self._steps  # not empty where the round was interrupted after them
        while not steps or not self.plan.ends_round(self.steps_done):
            steps.append(self.optimizer_step(self.rows_at(self.steps_done)))
            self.steps_done += 1
            self.progress.step(self.steps_done, self.plan.total_steps)
            self.after_step()
            if self.steps_done % self.plan.steps_per_pass == 0:
                self.post_backward_callback()
            self.pause_point()
        means = self.sum_over_processes(torch.stack(steps).double()) / self.accelerator.num_processes
        taken = means[:, -1].isfinite()
        self.stepper.count(taken.tolist(), self.keep_failure)
        averages = means[taken].mean(0).tolist()
        return {
            **dict(zip((*self.LOSSES, "policy/tokens", "policy/grad_norm"), averages, strict=True)),
            "policy/lr": float(self.scheduler.get_last_lr()[0]),
            "policy/skipped_steps": float(len(taken) - int(taken.sum())),
            "policy/passes": self.steps_done / self.plan.steps_per_pass,
            "policy/all_tokens": float(means[:, -2].sum()) * self.accelerator.num_processes,
        }

    def rows_at(self, step: int) -> Tensor:
        """Which of this process's samples a step learns from: those of a shuffled pass at its place."""
        train = self.config.train
        which_pass, place = divmod(step, self.plan.steps_per_pass)
        return minibatches(len(self.own), train.batch_size, train.seed, which_pass)[place]

    def optimizer_step(self, rows: Tensor) -> Tensor:
        """One step on the given samples of this process; the gradient does not depend on how they are cut into
        micro-batches. Returns the losses, the tokens (of a process) and the gradient's norm, (len(LOSSES) + 2,)."""
        totals = self.in_memory(partial(self._accumulate, rows))
        totals[-1] = self.stepper.step()
        return totals

    def _accumulate(self, rows: Tensor, micro_batch: int) -> Tensor:
        parts = [self._batch(part.tolist()) for part in rows.split(micro_batch)]
        # DDP averages the gradients of W processes, each divided by (all tokens / W): together, by all tokens.
        own_tokens = torch.stack([batch.counts_N.sum() for batch, _, _ in parts]).sum().float()
        tokens = self.sum_over_processes(own_tokens) / self.accelerator.num_processes
        totals = torch.zeros(len(self.LOSSES) + 2, device=self.device)
        totals[-2] = own_tokens
        for index, (batch, trunk_MH, chosen) in enumerate(parts):
            is_last = index + 1 == len(parts)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.policy):
                losses = self.losses(batch, trunk_MH, chosen, tokens)
                self.accelerator.backward(losses[0])
            totals[: len(self.LOSSES)] += losses.detach()
        return totals

    def _batch(self, rows: list[int]) -> tuple[Batch, Tensor | None, Tensor]:
        """The given samples of this process, what the trunk makes of them where that is kept, and their indices."""
        chosen = [self.own[row] for row in rows]
        batch = collate(self.samples, chosen, [self.stands_in[row] for row in rows], self.packs)
        trunk_MH = None if self._cache is None else self._cache.of(chosen).to(self.device, non_blocking=True)
        return batch.to(self.device), trunk_MH, torch.tensor(chosen, device=self.device)

    def _fill_cache(self) -> None:
        """Compute what the frozen trunk makes of this process's samples, where they are learned from more than once."""
        model, limit = cast(OfflineModel, self.model), self.config.train.trunk_cache_gb
        if self._cache is not None or model.start == 0 or limit is None or not self.plan.repeats:
            return
        folder = None if self.run is None or not self.accelerator.is_main_process else self.run.path
        cache = TrunkCache(self.samples, self.own, self._trunk_width(), model.trunk_dtype, limit * 1e9, folder)
        shown = self.accelerator.is_main_process
        self.in_memory(lambda rows: cache.fill(lambda batch: self.policy("trunk", batch.to(self.device)), rows, shown))
        self._cache = cache

    def _trunk_width(self) -> int:
        """Width of the trunk's output, asked of the shortest sample."""
        shortest = min(self.own, key=lambda index: len(self.samples.ids[index]))
        return int(self.policy("trunk", collate(self.samples, [shortest]).to(self.device)).shape[-1])

    def _share(self) -> tuple[list[int], list[bool]]:
        """The samples of this process. All processes have as many: where there are too few, some only stand in."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        per_process = -(-len(self.samples) // processes)
        places = [process + processes * i for i in range(per_process)]
        return [p if p < len(self.samples) else 0 for p in places], [p >= len(self.samples) for p in places]

    def _packs(self) -> bool:
        """Whether rows hold several samples; an architecture that cannot is told about in one line."""
        if not self.config.train.pack:
            return False
        model = cast(OfflineModel, self.model)
        if not model.can_pack:
            log.info(
                "%s takes no masks of our own: every row holds one sample, and padding",
                model.decoder.module.config.model_type,  # type: ignore[union-attr]
            )
        return model.can_pack

    def state_tensors(self) -> dict[str, Tensor]:
        return {"round.steps": torch.stack(self._steps).cpu()} if self._steps else {}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        steps = state["tensors"].get("round.steps")
        self._steps = [] if steps is None else list(steps.to(self.device))

    def _data_order(self) -> dict[str, Any]:
        train = self.config.train
        return {
            "train.seed": train.seed,
            "train.batch_size": train.batch_size,
            "samples": len(self.samples),
            "processes": self.accelerator.num_processes,
        }
