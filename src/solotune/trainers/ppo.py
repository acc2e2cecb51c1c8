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
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from solotune.algorithms.advantages import Advantages, gae, whiten
from solotune.algorithms.kl import AdaptiveKLController, FixedKLController, k1
from solotune.algorithms.ppo import explained_variance, ppo_loss
from solotune.algorithms.rewards import RunningMoments, scale_and_clip, token_rewards
from solotune.data.prompts import Prompts, encode
from solotune.errors import ConfigError, ModelError, RewardError
from solotune.models.loading import build_policy, load_tokenizer
from solotune.models.policy import Measured, PolicyModel
from solotune.rewards import score
from solotune.rollout.records import FinishReason, Rollouts
from solotune.rollout.settings import SamplingSettings
from solotune.trainers import checkpoint
from solotune.trainers.clock import Clock, peak_memory_bytes
from solotune.trainers.console import console, round_progress
from solotune.trainers.evaluation import Evaluation, evaluate
from solotune.trainers.optim import build_optimizer, build_scheduler
from solotune.trainers.order import PromptOrder, Stream, minibatches
from solotune.trainers.run_folder import RunFolder
from solotune.trainers.sampling import PromptSampler, Texts

if TYPE_CHECKING:
    from solotune.config import PPOConfig, TRLConfig


class Credit(NamedTuple):
    """What a round's tokens are worth.

    Args:
        advantages_NT: whitened over the response tokens of all processes.
        returns_NT: targets of the critic.
        metrics: `objective/*` of this round, over all processes.
    """

    advantages_NT: Tensor
    returns_NT: Tensor
    metrics: dict[str, float]


class PPOTrainer:
    """Tunes a language model with PPO.

    Args:
        config: trlX's configuration with a `PPOConfig`.
        reward_fn: called with the keywords among samples, prompts, outputs, tokenizer and the prompts' metadata that it
            takes; a number per sample, or a list of numbers per sample, one a response token.
        prompts, eval_prompts: what is continued.
        run: where files go; None writes none.
        metric_fn: called at every evaluation with samples, prompts, outputs and metadata; a dict of named numbers.
        stop_sequences: texts that end a response and are cut off it.
        clock: phases are counted here, default a clock that starts now.
    Raises:
        ConfigError, DataError, ModelError: before weights are loaded where that can be told.
    """

    def __init__(
        self,
        config: TRLConfig,
        reward_fn: Callable[..., Any],
        prompts: Prompts,
        eval_prompts: Prompts,
        run: RunFolder | None = None,
        metric_fn: Callable[..., dict[str, Any]] | None = None,
        stop_sequences: Sequence[str] = (),
        accelerator: Accelerator | None = None,
        clock: Clock | None = None,
    ):
        from solotune.config import PPOConfig, describe_steps

        if not isinstance(config.method, PPOConfig):
            raise ConfigError(f"method.name {config.method.name!r} is not PPO; this trainer needs a PPOConfig")
        self.config, self.method = config, config.method
        self.plan = describe_steps(config)
        self.reward_fn, self.metric_fn, self.run = reward_fn, metric_fn, run
        self.accelerator = accelerator or Accelerator()
        self.device = self.accelerator.device
        self.clock = clock or Clock(self.device)

        self.tokenizer = load_tokenizer(config.tokenizer)
        self._check_room(prompts, eval_prompts)
        with self.clock.phase("load"):
            policy = build_policy(config, self.device)
        self._check_vocabulary(policy)
        self.parameters = policy.trainable_parameters()
        optimizer = build_optimizer(config.optimizer, self.parameters)
        self.scheduler = build_scheduler(config.scheduler, optimizer)
        self.policy, self.optimizer = self.accelerator.prepare(policy, optimizer)

        eos = _eos_token_ids(policy, self.tokenizer)
        stops = list(stop_sequences)
        rollout_kwargs = self.method.gen_experience_kwargs or self.method.gen_kwargs
        self.rollout_settings = SamplingSettings.from_gen_kwargs(rollout_kwargs, eos, stops)
        self.eval_settings = SamplingSettings.from_gen_kwargs(self.method.gen_kwargs, eos, stops)
        self.order = PromptOrder(len(prompts), config.train.seed)
        self._sample = self._sampler(prompts, Stream.ROLLOUTS)
        self._sample_eval = self._sampler(eval_prompts, Stream.EVALUATION)
        self.n_eval_prompts = len(eval_prompts)

        if self.method.target is None:
            self.kl_controller: Any = FixedKLController(self.method.init_kl_coef)
        else:
            self.kl_controller = AdaptiveKLController(self.method.init_kl_coef, self.method.target, self.method.horizon)
        self.moments = RunningMoments(self._sum_over_processes)
        self.ref_std = self.method.ref_std
        self.rounds_done = 0
        self.steps_done = 0
        self.rollout_tokens = 0.0
        self.first_evaluation: Evaluation | None = None
        self.last_evaluation: Evaluation | None = None
        self.best_reward = -math.inf

    # ------------------------------------------------------------------ the loop

    def learn(self, resume_from: Path | None = None) -> None:
        """Train for the planned rounds, evaluating before the first, at every `eval_interval` and at the end."""
        self._say(self.plan.line)
        if self.rollout_settings.is_biased:
            self._say("top_k > 0 or top_p < 1 in the rollouts: tokens are drawn from a part of the distribution, so PPO's "
                      "ratio is biased")  # fmt: skip
        if resume_from is not None:
            self._restore(resume_from)
            self._say(f"resumed from {resume_from} at round {self.rounds_done}, step {self.steps_done}")
        else:
            self.evaluate_and_record()
        with round_progress(self.plan.rounds, self.rounds_done, self.accelerator.is_main_process) as progress:
            while self.steps_done < self.plan.total_steps:
                progress.advance(self.train_round())

    def train_round(self) -> dict[str, Any]:
        """One round; returns its metrics."""
        first_step = self.steps_done
        with self.clock.phase("sample"):
            rollouts = self.sample_rollouts()
        with self.clock.phase("score"):
            texts = self._sample.texts(rollouts, self.rollout_settings.stop_strings)
            scores = self._as_tensor(self.score(texts), rollouts)
        with self.clock.phase("measure"):
            measured = self.measure(rollouts)
        with self.clock.phase("credit"):
            credit = self.credit(rollouts, scores, measured)
        with self.clock.phase("update"):
            update_metrics = self.update(rollouts, measured, credit)
        self.rounds_done += 1
        metrics = {**credit.metrics, **self._rollout_metrics(rollouts, measured, credit), **update_metrics}
        self.tell(metrics, first_step)
        return metrics

    # ------------------------------------------------------------------ 1 sample, 2 score, 3 measure

    def sample_rollouts(self) -> Rollouts:
        """`num_rollouts` responses of this process; which prompts and random numbers depends on the position alone."""
        n, processes = self.method.num_rollouts, self.accelerator.num_processes
        first = (self.rounds_done * processes + self.accelerator.process_index) * n
        positions = range(first, first + n)
        return self._sample([self.order[position] for position in positions], positions, self.rollout_settings)

    def score(self, texts: Texts) -> list[Any]:
        """The reward function's answer: a number or a list of numbers a sample."""
        folder = self.run.path if self.run is not None else Path.cwd()
        return score(
            self.reward_fn, texts.samples, texts.prompts, texts.outputs, self.tokenizer, texts.metadata, failure_dir=folder
        )

    def measure(self, rollouts: Rollouts) -> Measured:
        """Log-probs of policy and reference, values and entropies, in micro-batches of the size the update uses."""
        rows = torch.arange(rollouts.n_rollouts, device=self.device).split(self._micro_batch)
        parts = [self.policy("measure", rollouts.select(r), self.rollout_settings.temperature) for r in rows]
        return Measured(*(torch.cat(column) for column in zip(*parts, strict=True)))

    # ------------------------------------------------------------------ 4 credit

    def credit(self, rollouts: Rollouts, scores: Tensor, measured: Measured) -> Credit:
        """Scores and KL penalty to advantages and returns; steps the KL controller."""
        mask_NT = rollouts.response_mask_NT
        assert measured.ref_logprobs_bT is not None
        scaled = scale_and_clip(
            scores,
            scale_reward=None if self.method.scale_reward == "ignored" else self.method.scale_reward,
            moments=self.moments,
            ref_std=self.ref_std,
            cliprange=self.method.cliprange_reward,
            mask_BT=mask_NT if scores.ndim == 2 else None,
        )
        self.ref_std = scaled.ref_std
        kl_NT = k1(measured.logprobs_bT, measured.ref_logprobs_bT, mask_NT)
        coef = self.kl_controller.value
        rewards_NT = token_rewards(scaled.scores, kl_NT, coef, mask_NT)
        advantages: Advantages = gae(rewards_NT, measured.values_bT, mask_NT, self.method.gamma, self.method.lam)
        whitened_NT = whiten(advantages.advantages_BT, mask_NT, self._sum_over_processes)

        raw_N = scores.sum(-1) if scores.ndim == 2 else scores
        entropy_tokens_N = measured.entropies_bT.sum(-1) if measured.entropies_bT is not None else torch.zeros_like(raw_N)
        sums = self._sum_over_processes(
            torch.stack(
                [
                    torch.tensor(float(len(raw_N)), device=self.device),
                    raw_N.sum(),
                    raw_N.square().sum(),
                    kl_NT.sum(),
                    rewards_NT.sum(),
                    entropy_tokens_N.sum(),
                    mask_NT.sum(),
                    (measured.values_bT * mask_NT).sum(),
                ]
            ).double()
        ).tolist()
        n, total, squares, kl, rewards, entropy, tokens, values = sums
        mean_kl = kl / n
        metrics = {
            "objective/score": total / n,
            "objective/score_std": math.sqrt(max(squares / n - (total / n) ** 2, 0.0)),
            "objective/reward": rewards / n,
            "objective/kl": mean_kl,
            "objective/kl_coef": coef,
            "objective/entropy": entropy / max(tokens, 1),
            "value/mean": values / max(tokens, 1),
            "value/explained_variance": float(
                explained_variance(measured.values_bT, advantages.returns_BT, mask_NT, self._sum_over_processes)
            ),
        }
        self.kl_controller.update(mean_kl, int(n))
        return Credit(whitened_NT, advantages.returns_BT, metrics)

    # ------------------------------------------------------------------ 5 update

    def update(self, rollouts: Rollouts, measured: Measured, credit: Credit) -> dict[str, float]:
        """`ppo_epochs` reshuffled passes over the round's rollouts; stops where `total_steps` are done.

        Numbers stay on the device until the end, so that the host never waits within an update.
        """
        rows_of: list[Tensor] = []
        for epoch in range(self.method.ppo_epochs):
            counter = self.rounds_done * self.method.ppo_epochs + epoch
            rows_of += minibatches(rollouts.n_rollouts, self.config.train.batch_size, self.config.train.seed, counter)
        steps: list[Tensor] = []
        for rows in rows_of[: self.plan.total_steps - self.steps_done]:
            steps.append(self.optimizer_step(rollouts, measured, credit, rows.to(self.device)))
            self.steps_done += 1
        names = ("policy/loss", "value/loss", "policy/approx_kl", "policy/clipfrac", "value/clipfrac", "policy/ratio")
        means = self._sum_over_processes(torch.stack(steps).double()) / self.accelerator.num_processes
        *columns, norms = means.mean(0).tolist()
        return {
            **dict(zip(names, columns, strict=True)),
            "policy/grad_norm": norms,
            "policy/lr": self.scheduler.get_last_lr()[0],
        }

    def optimizer_step(self, rollouts: Rollouts, measured: Measured, credit: Credit, rows: Tensor) -> Tensor:
        """One step on the given rollouts; the gradient does not depend on how they are cut into micro-batches.

        Returns the losses and statistics in the order of `update`, and the gradient's norm, (7,).
        """
        # DDP averages the gradients of W processes, each divided by (all tokens / W): together, by all tokens.
        tokens = self._sum_over_processes(rollouts.response_mask_NT[rows].sum().float()) / self.accelerator.num_processes
        totals = torch.zeros(7, device=self.device)
        parts = rows.split(self._micro_batch)
        for index, part in enumerate(parts):
            is_last = index + 1 == len(parts)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.policy):
                now: Measured = self.policy("update", rollouts.select(part), self.rollout_settings.temperature)
                loss = ppo_loss(
                    now.logprobs_bT,
                    now.values_bT,
                    measured.logprobs_bT[part],
                    measured.values_bT[part],
                    credit.advantages_NT[part],
                    credit.returns_NT[part],
                    rollouts.response_mask_NT[part],
                    cliprange=self.method.cliprange,
                    cliprange_value=self.method.cliprange_value,
                    vf_coef=self.method.vf_coef,
                    denominator=tokens,
                )
                self.accelerator.backward(loss.loss)
            totals[:6] += torch.stack(
                [loss.policy_loss, loss.value_loss, loss.approx_kl, loss.clipfrac, loss.value_clipfrac, loss.ratio]
            ).detach()
        limit = self.config.train.max_grad_norm
        totals[6] = self.accelerator.clip_grad_norm_(self.parameters, limit if limit is not None else math.inf)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return totals

    # ------------------------------------------------------------------ 6 tell

    def tell(self, metrics: dict[str, Any], first_step: int) -> None:
        """Evaluate and save where an interval was crossed or the run is over; write the round's metrics."""
        train = self.config.train
        is_over = self.steps_done >= self.plan.total_steps
        if is_over or self.steps_done // train.eval_interval > first_step // train.eval_interval:
            self.evaluate_and_record()
        seconds = self.clock.end_round()
        tokens = metrics.pop("rollout/all_tokens")
        self.rollout_tokens += tokens
        metrics["rollout/tokens_per_second"] = tokens / max(seconds.get("sample", 0.0), 1e-9)
        metrics |= {f"time/{name}": seconds.get(name, 0.0) for name in PHASES}
        metrics["time/round"] = sum(seconds.get(name, 0.0) for name in PHASES)
        metrics["memory/peak_bytes"] = peak_memory_bytes(self.device)
        if self.run is not None:
            self.run.append(self.run.metrics, [{"round": self.rounds_done, "step": self.steps_done, **metrics}])
        self.accelerator.log(metrics, step=self.steps_done)
        if is_over or self.steps_done // train.checkpoint_interval > first_step // train.checkpoint_interval:
            self.save_checkpoint()

    def evaluate(self) -> Evaluation:
        """Sample the evaluation prompts with the same random numbers as ever, and score them."""
        with self.clock.phase("evaluate"):
            return evaluate(
                self.accelerator,
                self.policy,
                self._sample_eval,
                self.n_eval_prompts,
                self.eval_settings,
                self.score,
                self.metric_fn,
                self._micro_batch,
            )

    def evaluate_and_record(self) -> Evaluation:
        """Evaluate, append the samples to the run's file, keep the best model."""
        evaluation = self.evaluate()
        self.first_evaluation = self.first_evaluation or evaluation
        self.last_evaluation = evaluation
        if self.run is not None:
            place = {"round": self.rounds_done, "step": self.steps_done}
            self.run.append(self.run.samples, [{**place, **sample} for sample in evaluation.samples])
        named = {"eval/reward": evaluation.reward, "eval/kl": evaluation.kl}
        named |= {f"metrics/{name}": value for name, value in evaluation.metrics.items()}
        self.accelerator.log(named, step=self.steps_done)
        if evaluation.reward > self.best_reward and self.steps_done > 0 and self.config.train.save_best:
            self.best_reward = evaluation.reward
            if self.run is not None:
                self.save_pretrained(self.run.path / "best")
        return evaluation

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter (or the whole model, where it was trained itself) and the tokenizer; PEFT or transformers
        load it without solotune."""
        if self.accelerator.is_main_process:
            self.model.save_pretrained(Path(folder))
            self.tokenizer.save_pretrained(folder)

    def save_checkpoint(self) -> None:
        """Save what resuming needs, at the end of a round."""
        self.accelerator.wait_for_everyone()
        if self.run is not None and self.accelerator.is_main_process:
            checkpoint.save(self.run.checkpoints, self.steps_done, self.model, self.optimizer.optimizer, self._state())

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`transformers.generate` of the tuned model, with the configuration's `gen_kwargs` where none are given."""
        options = {**self.method.gen_kwargs, "pad_token_id": self.tokenizer.pad_token_id, **kwargs}
        return self.model.backbone.generate(input_ids=input_ids, attention_mask=attention_mask, **options)  # type: ignore[operator]

    @property
    def model(self) -> PolicyModel:
        """The policy without what `accelerate` wrapped around it."""
        return self.accelerator.unwrap_model(self.policy)

    # ------------------------------------------------------------------ what the steps above use

    @property
    def _micro_batch(self) -> int:
        return self.config.train.minibatch_size or self.config.train.batch_size

    def _sampler(self, prompts: Prompts, stream: Stream) -> PromptSampler:
        ids = encode(prompts, self.tokenizer, self._room(), self.config.tokenizer.add_special_tokens)
        return PromptSampler(
            self.policy, self.tokenizer, prompts, ids, self.config.train.seed, stream, self.method.chunk_size, self.device
        )

    def _room(self) -> int:
        """Tokens a prompt may have."""
        settings = [self.method.gen_kwargs, self.method.gen_experience_kwargs or {}]
        return self.config.train.seq_length - max(int(s.get("max_new_tokens", 0)) for s in settings)

    def _check_room(self, *sets: Prompts) -> None:
        for prompts in sets:
            encode(prompts, self.tokenizer, self._room(), self.config.tokenizer.add_special_tokens)

    def _check_vocabulary(self, policy: PolicyModel) -> None:
        embeddings = policy.lm.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > embeddings:
            raise ModelError(
                f"tokenizer.tokenizer_path {self.config.tokenizer.tokenizer_path!r} has {len(self.tokenizer):,} tokens, "
                f"but the model has embeddings for {embeddings:,}; use the model's own tokenizer"
            )

    def _as_tensor(self, scores: list[Any], rollouts: Rollouts) -> Tensor:
        """Scores (N,), or dense ones (N, T)."""
        if not isinstance(scores[0], list):
            return torch.tensor(scores, dtype=torch.float32, device=self.device)
        lengths = rollouts.response_mask_NT.sum(-1).tolist()
        dense = torch.zeros(rollouts.response_mask_NT.shape, device=self.device)
        for row, (values, length) in enumerate(zip(scores, lengths, strict=True)):
            if len(values) > length:
                raise RewardError(
                    f"reward_fn returned {len(values)} numbers for sample {row}, whose response has {length} tokens; "
                    "allowed is at most one a response token"
                )
            dense[row, : len(values)] = torch.tensor(values, dtype=torch.float32)
        return dense

    def _rollout_metrics(self, rollouts: Rollouts, measured: Measured, credit: Credit) -> dict[str, float]:
        mask_NT = rollouts.response_mask_NT
        gap_NT = (measured.logprobs_bT - rollouts.sample_logprobs_NT).abs().masked_fill(~mask_NT, 0.0)
        sums = self._sum_over_processes(
            torch.stack([mask_NT.sum(), (rollouts.finish_N != FinishReason.LENGTH).sum(), gap_NT.sum()]).double()
        ).tolist()
        n = rollouts.n_rollouts * self.accelerator.num_processes
        return {
            "rollout/response_tokens": sums[0] / n,
            "rollout/finished": sums[1] / n,
            "rollout/logprob_gap": sums[2] / max(sums[0], 1),
            "rollout/all_tokens": sums[0],
        }

    def _sum_over_processes(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, reduction="sum") if self.accelerator.num_processes > 1 else x  # type: ignore[return-value]

    def _state(self) -> dict[str, Any]:
        first = self.first_evaluation
        return {
            "round": self.rounds_done,
            "kl_controller": self.kl_controller.state_dict(),
            "moments": self.moments.state_dict(),
            "ref_std": self.ref_std,
            "best_reward": self.best_reward if math.isfinite(self.best_reward) else None,
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if _is_json(v)},
            "first_evaluation": first._asdict() if first is not None else None,
            "seconds_by_phase": dict(self.clock.total),
        }

    def _restore(self, path: Path) -> None:
        state = checkpoint.restore(path, self.model, self.optimizer.optimizer)
        self.rounds_done, self.steps_done = state["round"], state["step"]
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.moments.load_state_dict(state["moments"])
        self.ref_std = state["ref_std"]
        self.best_reward = -math.inf if state["best_reward"] is None else state["best_reward"]
        self.scheduler.load_state_dict(state["scheduler"])
        if state["first_evaluation"] is not None:
            self.first_evaluation = Evaluation(**state["first_evaluation"])
        for name, seconds in state["seconds_by_phase"].items():
            self.clock.total[name] += seconds
        if self.run is not None:
            self.run.cut_after(self.rounds_done)

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            console.print(line, highlight=False)


PHASES = ("sample", "score", "measure", "credit", "update", "evaluate")


def _is_json(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool, list, type(None)))


def _eos_token_ids(policy: PolicyModel, tokenizer: Any) -> list[int]:
    """The model's own end-of-sequence tokens and the tokenizer's."""
    generation = getattr(policy.lm, "generation_config", None)
    given = getattr(generation, "eos_token_id", None)
    ids = given if isinstance(given, list) else [given]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
