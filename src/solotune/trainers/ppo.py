"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) on a language model, as in Ziegler et al. 2019.

A round; its loop (1 to 3, and the steps of 5) is that of `trainers/rounds.py`:

    1  sample    prompts -> token ids, log-probs, trunk activations
    2  score     text -> rewards
    3  measure   log-probs of policy and reference, values: one pass over the top
    4  credit    KL penalty + score -> GAE -> whitened advantages, returns
    5  update    ppo_epochs x minibatches of the clipped losses
    6  tell      metrics, evaluation, checkpoint

Shapes: N rollouts of this process and round, T response length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solotune.algorithms.advantages import gae, whiten
from solotune.algorithms.kl import AdaptiveKLController, FixedKLController, k1
from solotune.algorithms.ppo import PPOLoss, explained_variance, ppo_loss
from solotune.algorithms.rewards import RunningMoments, scale_and_clip, token_rewards
from solotune.config import PPOConfig, TRLConfig
from solotune.config.methods.ppo import LOSS_NAMES
from solotune.data.prompts import Prompts
from solotune.errors import TrainingError
from solotune.models.policy import Measured
from solotune.rollout.records import Rollouts
from solotune.runs import checkpoint
from solotune.trainers.registry import register_trainer
from solotune.trainers.rounds import RoundTrainer


class Credit(NamedTuple):
    """What a round's tokens are worth.

    Args:
        advantages_NT: whitened over the response tokens of all processes.
        returns_NT: targets of the critic.
        rewards_NT: score less KL penalty, of each token.
        kl_NT: log p - log p_ref of each token, nats.
        kl_coef: the weight the penalty had.
    """

    advantages_NT: Tensor
    returns_NT: Tensor
    rewards_NT: Tensor
    kl_NT: Tensor
    kl_coef: float


def overrides(method: PPOConfig, name: str) -> bool:
    """Whether a user's own method config has another function of this name than `PPOConfig`."""
    return getattr(type(method), name) is not getattr(PPOConfig, name)


@register_trainer("AcceleratePPOTrainer")
@register_trainer
class PPOTrainer(RoundTrainer):
    """Tunes a language model with PPO; see `OnlineTrainer` for the arguments."""

    METHOD = PPOConfig
    CREDIT = Credit
    LOSSES = ("policy/loss", "value/loss", "policy/approx_kl", "policy/clipfrac", "value/clipfrac", "policy/ratio")

    def __init__(
        self, config: TRLConfig, reward_fn: Callable[..., Any], prompts: Prompts, eval_prompts: Prompts, **shared: Any
    ):
        super().__init__(config, reward_fn, prompts, eval_prompts, **shared)
        method = self.method
        self.kl_controller: FixedKLController | AdaptiveKLController = FixedKLController(method.init_kl_coef)
        if method.target is not None:
            self.kl_controller = AdaptiveKLController(method.init_kl_coef, method.target, method.horizon)
        self.moments = RunningMoments(self.sum_over_processes)
        self.ref_std = method.ref_std
        if self.rollout_settings.is_biased:
            self.say(
                f"method.gen_kwargs: top_k={self.rollout_settings.top_k} and top_p={self.rollout_settings.top_p} draw "
                "from a part of the distribution, so PPO's ratio is biased"
            )

    @property
    def passes_a_round(self) -> int:
        return self.method.ppo_epochs

    def credit(self, rollouts: Rollouts, scores: Tensor, measured: Measured) -> Credit:
        """Scores, (N,) or dense (N, T), and the KL penalty to advantages and returns."""
        mask_NT = rollouts.response_mask_NT
        assert measured.values_bT is not None
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

    def losses(
        self, now: Measured, then: Measured, credit: Credit, mask_bT: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The clipped losses, and what is told of them."""
        assert now.values_bT is not None
        assert then.values_bT is not None
        loss = self._loss(
            now.logprobs_bT,
            now.values_bT,
            then.logprobs_bT,
            then.values_bT,
            credit.advantages_NT,
            credit.returns_NT,
            mask_bT,
            tokens,
        )
        told = (loss.policy_loss, loss.value_loss, loss.approx_kl, loss.clipfrac, loss.value_clipfrac, loss.ratio)
        return loss.loss, torch.stack(told)

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

    def ends_early(self, steps: list[Tensor]) -> bool:
        """Whether a pass over the rollouts moved the policy by more than `target_kl`."""
        if self.method.target_kl is None or not steps:
            return False
        approx_kl = self.sum_over_processes(torch.stack(steps)[:, 2].mean()) / self.accelerator.num_processes
        return float(approx_kl) > self.method.target_kl

    def after_credit(self, metrics: dict[str, Any]) -> None:
        """Stop where the KL is too high; move its weight."""
        self._check_kl(metrics["objective/kl"])
        scored = self.plan.rollouts * self.accelerator.num_processes - round(metrics["rollout/skipped"])
        self.kl_controller.update(metrics["objective/kl"], scored)

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

    def round_metrics(self, rollouts: Rollouts, scores: Tensor, measured: Measured, credit: Credit) -> dict[str, Any]:
        """With the penalised reward, the penalty's weight, and how good the critic is."""
        assert measured.values_bT is not None
        mask_NT = rollouts.response_mask_NT
        n, tokens, reward, value = self.totals(mask_NT.any(-1), mask_NT, credit.rewards_NT.sum(-1), measured.values_bT)
        variance = explained_variance(measured.values_bT, credit.returns_NT, mask_NT, self.sum_over_processes)
        return {
            **super().round_metrics(rollouts, scores, measured, credit),
            "objective/reward": reward / n,
            "objective/kl_coef": credit.kl_coef,
            "value/mean": value / max(tokens, 1.0),
            "value/explained_variance": float(variance),
        }

    def state(self) -> dict[str, Any]:
        own: dict[str, Any] = {"kl_controller": self.kl_controller.state_dict(), "moments": self.moments.state_dict()}
        return {**super().state(), **own, "ref_std": self.ref_std}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.moments.load_state_dict(state["moments"])
        ref_std = state["ref_std"]
        if not (ref_std is None or 0 < float(ref_std) < math.inf):
            raise ValueError(f"ref_std = {ref_std}: this is not of a run")
        self.ref_std = None if ref_std is None else float(ref_std)
