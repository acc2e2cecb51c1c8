"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) on a language model, as in Ziegler et al. 2019.

A round, in the order of the code:

    1  sample    prompts -> token ids, log-probs, trunk activations
    2  score     text -> rewards
    3  measure   log-probs of policy and reference, values: one pass over the top
    4  credit    KL penalty + score -> GAE -> whitened advantages, returns
    5  update    ppo_epochs x minibatches of the clipped losses
    6  tell      metrics, evaluation, checkpoint

Shapes: N rollouts of this process and round, T response length, S positions fed to the model.
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

from solotune.algorithms.advantages import gae, whiten
from solotune.algorithms.kl import AdaptiveKLController, FixedKLController, k1
from solotune.algorithms.ppo import PPOLoss, explained_variance, ppo_loss
from solotune.algorithms.rewards import RunningMoments, scale_and_clip, token_rewards
from solotune.config import PPOConfig, TRLConfig, describe_steps
from solotune.config.methods.ppo import LOSS_NAMES
from solotune.data.prompts import Prompts
from solotune.errors import ConfigError, TrainingError
from solotune.models.policy import Measured
from solotune.rollout.records import FinishReason, Rollouts
from solotune.rollout.settings import sweep
from solotune.runs import checkpoint
from solotune.trainers.base import Trainer
from solotune.trainers.order import PromptOrder, minibatches
from solotune.trainers.ppo_round import Credit, Round
from solotune.trainers.registry import register_trainer
from solotune.trainers.rollout_log import RolloutLog
from solotune.trainers.sampling import room_for_prompts

log = logging.getLogger("solotune")


def overrides(method: PPOConfig, name: str) -> bool:
    """Whether a user's own method config has another function of this name than `PPOConfig`."""
    return getattr(type(method), name) is not getattr(PPOConfig, name)


@register_trainer("AcceleratePPOTrainer")
@register_trainer
class PPOTrainer(Trainer):
    """Tunes a language model with PPO; see `Trainer` for the arguments.

    Args:
        config: trlX's configuration with a `PPOConfig`.
        prompts, eval_prompts: what is continued.
    """

    def __init__(
        self, config: TRLConfig, reward_fn: Callable[..., Any], prompts: Prompts, eval_prompts: Prompts, **shared: Any
    ):
        method = config.method
        if not isinstance(method, PPOConfig):
            raise ConfigError(f"method.name {method.name!r} is not PPO; this trainer needs a PPOConfig")
        room = room_for_prompts(config)
        super().__init__(config, describe_steps(config), reward_fn, eval_prompts, room, prompts=prompts, **shared)
        self.method = method
        of_eval = sweep(method.gen_kwargs)
        self.rollout_settings = self.settings(method.gen_experience_kwargs or of_eval[0].gen_kwargs)
        if len(of_eval) > 1 and method.gen_experience_kwargs is None:
            self.say(f"rollouts are sampled with {of_eval[0].label[1:]}, the first of method.gen_kwargs' sweep")
        self.order = PromptOrder(len(prompts), config.train.seed)
        self.kl_controller: FixedKLController | AdaptiveKLController = FixedKLController(method.init_kl_coef)
        if method.target is not None:
            self.kl_controller = AdaptiveKLController(method.init_kl_coef, method.target, method.horizon)
        self.rollout_log = None
        if config.train.rollout_logging_dir is not None:
            self.rollout_log = RolloutLog(config, self.accelerator)
        self.moments = RunningMoments(self.sum_over_processes)
        self.ref_std = method.ref_std
        self._told_surplus = False
        self.round: Round | None = None  # the one that is being learned from
        if self.rollout_settings.is_biased:
            self.say(
                f"method.gen_kwargs: top_k={self.rollout_settings.top_k} and top_p={self.rollout_settings.top_p} draw "
                "from a part of the distribution, so PPO's ratio is biased"
            )

    def train_round(self) -> dict[str, Any]:
        """One round; returns its metrics.

        Raises:
            RoundInterrupted: a signal came; the state is that of before the round, or has the round in it.
            TrainingError: the KL is above `method.max_kl`.
        """
        if self.round is None:
            self.round = self.begin_round()
        with self.clock.phase("update"):
            metrics = {**self.round.metrics, **self.update(self.round)}
        first_step, self.round = self.round.first_step, None
        self.rounds_done += 1
        self.tell(metrics, first_step)
        return metrics

    def begin_round(self) -> Round:
        """Sample, score, measure, credit."""
        with self.clock.phase("sample"):
            rollouts = self.sample_rollouts()
        self.pause_point()
        with self.clock.phase("score"):
            eos_text = self.tokenizer.eos_token or "" if self.config.AS_TRLX else ""
            texts = self.sampled.texts(rollouts, self.rollout_settings.stop_strings, eos_text)
            given = self.score(texts)
            rollouts = rollouts.without([row for row, value in enumerate(given) if value is None])
            scores = self._as_tensor(given, rollouts)
        if self.rollout_log is not None:
            self.rollout_log.write(rollouts, texts, given)
        with self.clock.phase("measure"):
            measured = self.measure(rollouts)
        self.pause_point()
        with self.clock.phase("credit"):
            credit = self.credit(rollouts, scores, measured)
            metrics = self._round_metrics(rollouts, scores, measured, credit)
            self._check_kl(metrics["objective/kl"])
            scored = rollouts.n_rollouts * self.accelerator.num_processes - round(metrics["rollout/skipped"])
            self.kl_controller.update(metrics["objective/kl"], scored)
        return Round(rollouts, measured, credit, self.steps_done, metrics, [])

    def _check_kl(self, kl: float) -> None:
        """Stop where the policy ran away from its reference, and leave the state of before that as the newest.

        Raises:
            TrainingError: the KL, nats per response, is above `method.max_kl`.
        """
        if self.method.max_kl is None or kl <= self.method.max_kl:
            return
        where = ""
        if self.run is not None:
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                checkpoint.drop_after(self.run.checkpoints, self.steps_done - 1)
            left = checkpoint.newest(self.run.path)
            where = f" The model of before is in {str(left / 'hf_model')!r}." if left is not None else ""
        raise TrainingError(
            f"the KL to the reference is {kl:.3g} nats a response after {self.rounds_done} rounds, above "
            f"method.max_kl = {self.method.max_kl:g}.{where} Start again with a lower optimizer.kwargs.lr or a higher "
            "method.init_kl_coef"
        )

    @property
    def saves_every_round(self) -> bool:
        """With a limit to the KL: the state before the round that broke it has to be there."""
        return self.method.max_kl is not None

    def sample_rollouts(self) -> Rollouts:
        """`num_rollouts` responses of this process; which prompts and random numbers depends on the position alone."""
        n, processes = self.method.num_rollouts, self.accelerator.num_processes
        first = (self.rounds_done * processes + self.accelerator.process_index) * n
        positions = range(first, first + n)
        return self.sampled([self.order[position] for position in positions], positions, self.rollout_settings)

    @torch.no_grad()
    def measure(self, rollouts: Rollouts) -> Measured:
        """Log-probs of policy and reference, values and entropies, in micro-batches of the size the update uses."""
        rows = torch.arange(rollouts.n_rollouts, device=self.device)

        def run(micro_batch: int) -> list[Measured]:
            temperature = self.rollout_settings.temperature
            return [self.policy("measure", rollouts.select(part), temperature) for part in rows.split(micro_batch)]

        return Measured._make(torch.cat(column) for column in zip(*self.in_memory(run), strict=True))

    def credit(self, rollouts: Rollouts, scores: Tensor, measured: Measured) -> Credit:
        """Scores, (N,) or dense (N, T), and the KL penalty to advantages and returns."""
        mask_NT = rollouts.response_mask_NT
        assert measured.ref_logprobs_bT is not None
        scored_N = mask_NT.any(-1)  # all but those that the reward function was allowed to fail on
        scaled = scale_and_clip(
            scores[scored_N],
            scale_reward=None if self.method.scale_reward == "ignored" else self.method.scale_reward,
            moments=self.moments,
            ref_std=self.ref_std,
            cliprange=self.method.cliprange_reward,
            mask_BT=mask_NT[scored_N] if scores.ndim == 2 else None,
        )
        self.ref_std = scaled.ref_std
        scaled_scores = torch.zeros_like(scores)
        scaled_scores[scored_N] = scaled.scores
        kl_NT = k1(measured.logprobs_bT, measured.ref_logprobs_bT, mask_NT)
        kl_coef = self.kl_controller.value
        rewards_NT = token_rewards(scaled_scores, kl_NT, kl_coef, mask_NT)
        if overrides(self.method, "get_advantages_and_returns"):
            width_T = mask_NT.shape[1]
            own_NT = self.method.get_advantages_and_returns(measured.values_bT, rewards_NT, width_T)
            advantages_NT, returns_NT = (x_NT.detach().masked_fill(~mask_NT, 0.0) for x_NT in own_NT)
            return Credit(advantages_NT, returns_NT, rewards_NT, kl_NT, kl_coef)
        advantages_NT, returns_NT = gae(rewards_NT, measured.values_bT, mask_NT, self.method.gamma, self.method.lam)
        return Credit(whiten(advantages_NT, mask_NT, self.sum_over_processes), returns_NT, rewards_NT, kl_NT, kl_coef)

    def update(self, this: Round) -> dict[str, float]:
        """`ppo_epochs` reshuffled passes over the round's rollouts; stops where `total_steps` are done.

        Steps that the round has already are left out: it was interrupted after them. Numbers stay on the device until
        the end, so that the host never waits within an update.
        """
        steps, first = this.steps, 0  # of the pass, within the round
        for epoch in range(self.method.ppo_epochs):
            counter = self.rounds_done * self.method.ppo_epochs + epoch
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
                self.pause_point()
            if todo:
                self.post_backward_callback()
            if self._has_moved_too_far(steps[first : first + len(batches)]):
                break
            first += len(batches)
        names = (
            *("policy/loss", "value/loss", "policy/approx_kl", "policy/clipfrac", "value/clipfrac", "policy/ratio"),
            "policy/grad_norm",
        )
        means = self.sum_over_processes(torch.stack(steps).double()) / self.accelerator.num_processes
        taken = means[:, -1].isfinite()
        self.stepper.count(taken.tolist(), partial(self.keep_failure, this.rollouts))
        averages = dict(zip(names, means[taken].mean(0).tolist(), strict=True))
        skipped = float(len(taken) - int(taken.sum()))
        return {**averages, "policy/lr": float(self.scheduler.get_last_lr()[0]), "policy/skipped_steps": skipped}

    def _has_moved_too_far(self, steps: list[Tensor]) -> bool:
        """Whether a pass over the rollouts moved the policy by more than `target_kl`."""
        if self.method.target_kl is None or not steps:
            return False
        approx_kl = self.sum_over_processes(torch.stack(steps)[:, 2].mean()) / self.accelerator.num_processes
        return float(approx_kl) > self.method.target_kl

    def optimizer_step(self, rollouts: Rollouts, measured: Measured, credit: Credit, rows: Tensor) -> Tensor:
        """One step on the given rollouts; the gradient does not depend on how they are cut into micro-batches.

        Returns the losses and statistics in the order of `update`, and the gradient's norm, (7,).
        """
        totals = self.in_memory(partial(self._accumulate, rollouts, measured, credit, rows))
        totals[6] = self.stepper.step()
        return totals

    def _accumulate(
        self, rollouts: Rollouts, measured: Measured, credit: Credit, rows: Tensor, micro_batch: int
    ) -> Tensor:
        """The gradient of a step, and its losses and statistics."""
        # DDP averages the gradients of W processes, each divided by (all tokens / W): together, by all tokens.
        tokens = self.sum_over_processes(rollouts.response_mask_NT[rows].sum().float()) / self.accelerator.num_processes
        tokens = tokens.clamp(min=1.0)  # none where every row of the batch was skipped
        totals = torch.zeros(7, device=self.device)
        parts = rows.split(micro_batch)
        for index, part in enumerate(parts):
            is_last = index + 1 == len(parts)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.policy):
                now: Measured = self.policy("update", rollouts.select(part), self.rollout_settings.temperature)
                loss = self._loss(
                    now.logprobs_bT,
                    now.values_bT,
                    measured.logprobs_bT[part],
                    measured.values_bT[part],
                    credit.advantages_NT[part],
                    credit.returns_NT[part],
                    rollouts.response_mask_NT[part],
                    tokens,
                )
                self.accelerator.backward(loss.loss)
            totals[:6] += torch.stack(
                [loss.policy_loss, loss.value_loss, loss.approx_kl, loss.clipfrac, loss.value_clipfrac, loss.ratio]
            ).detach()
        return totals

    def _loss(self, *tensors: Tensor) -> PPOLoss:
        """The clipped losses of a micro-batch, or what a user's own `PPOConfig.loss` makes of it.

        The last tensor is what sums are divided by.
        """
        *given, tokens = tensors
        if not overrides(self.method, "loss"):
            return ppo_loss(
                *given,
                cliprange=self.method.cliprange,
                cliprange_value=self.method.cliprange_value,
                vf_coef=self.method.vf_coef,
                denominator=tokens,
            )
        loss, stats = self.method.loss(*given)
        share = given[-1].sum() / tokens
        known = {field: stats.get(name, math.nan) for field, name in LOSS_NAMES.items()}
        scaled = {field: share * torch.as_tensor(value, device=self.device) for field, value in known.items()}
        return PPOLoss(**{**scaled, "loss": share * loss})

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

    def _round_metrics(
        self, rollouts: Rollouts, scores: Tensor, measured: Measured, credit: Credit
    ) -> dict[str, float]:
        """Statistics of the round over all processes; those of tokens count response tokens only."""
        mask_NT = rollouts.response_mask_NT
        scores_N = scores.sum(-1) if scores.ndim == 2 else scores
        gap_NT = (measured.logprobs_bT - rollouts.sample_logprobs_NT).abs().masked_fill(~mask_NT, 0.0)
        scored_N = mask_NT.any(-1)
        finished_N = (rollouts.finish_N != FinishReason.LENGTH) & scored_N
        per_response = [
            scores_N,
            scores_N.square(),
            credit.kl_NT.sum(-1),
            credit.rewards_NT.sum(-1),
            finished_N,
            mask_NT.sum(-1),
            scored_N,
        ]
        per_token = [measured.entropies_bT, measured.values_bT, gap_NT]
        sums = self.sum_over_processes(torch.stack([x.double().sum() for x in (*per_response, *per_token)])).tolist()
        n, tokens = sums[6], max(sums[5], 1.0)
        score, square, kl, reward, finished, length = (total / n for total in sums[:6])
        entropy, value, gap = (total / tokens for total in sums[7:])
        variance = explained_variance(measured.values_bT, credit.returns_NT, mask_NT, self.sum_over_processes)
        return {
            "objective/score": score,
            "objective/score_std": math.sqrt(max(square - score**2, 0.0)),
            "objective/reward": reward,
            "objective/kl": kl,
            "objective/kl_coef": credit.kl_coef,
            "objective/entropy": entropy,
            "value/mean": value,
            "value/explained_variance": float(variance),
            "rollout/response_tokens": length,
            "rollout/finished": finished,
            "rollout/logprob_gap": gap,
            "rollout/skipped": rollouts.n_rollouts * self.accelerator.num_processes - n,
            "rollout/all_tokens": sums[5],
        }

    def state(self) -> dict[str, Any]:
        own: dict[str, Any] = {"kl_controller": self.kl_controller.state_dict(), "moments": self.moments.state_dict()}
        unfinished = None if self.round is None else self.round.numbers()
        return {**super().state(), **own, "ref_std": self.ref_std, "unfinished": unfinished}

    def state_tensors(self) -> dict[str, Tensor]:
        return {} if self.round is None else self.round.tensors()

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.moments.load_state_dict(state["moments"])
        ref_std = state["ref_std"]
        if not (ref_std is None or 0 < float(ref_std) < math.inf):
            raise ValueError(f"ref_std = {ref_std}: this is not of a run")
        self.ref_std = None if ref_std is None else float(ref_std)
        self.round = None
        if state["unfinished"] is not None:
            self.round = Round.restored(state["unfinished"], state["tensors"], self.device)
