"""Implicit language Q-learning (Snell et al. 2022, arXiv:2206.11871) on samples with a reward each; the loop is that of
`trainers/offline.py`, the loss that of `algorithms/ilql.py`."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from solotune.algorithms.ilql import ilql_loss, normalised
from solotune.config import ILQLConfig, TRLConfig
from solotune.data.batches import Batch
from solotune.data.dialogues import checked_rewards
from solotune.data.prompts import Prompts
from solotune.errors import ConfigError
from solotune.models.ilql import ILQLModel, QValues
from solotune.models.loading import build_policy
from solotune.models.policy import PolicyModel
from solotune.rollout.settings import SamplingSettings
from solotune.trainers.offline import OfflineTrainer
from solotune.trainers.registry import register_trainer

log = logging.getLogger("solotune")


@register_trainer("AccelerateILQLTrainer")
@register_trainer
class ILQLTrainer(OfflineTrainer):
    """Learns Q and V of given samples, and the policy by them; see `OfflineTrainer` for the other arguments.

    Args:
        rewards: a number a sample; normalised over all samples, it is the reward of the sample's last token.
    Raises:
        DataError: not one finite number a sample.
    """

    METHOD = ILQLConfig
    LOSSES = (
        "objective/loss",
        "value/q_loss",
        "value/v_loss",
        "policy/cql_loss",
        "policy/awac_loss",
        "value/q_mean",
        "value/mean",
        "value/advantage",
    )

    def __init__(
        self, config: TRLConfig, samples: Sequence[Any], rewards: Sequence[float], eval_prompts: Prompts, **shared: Any
    ):
        self.method = self.method_of(config)
        given = torch.tensor(checked_rewards(rewards, len(samples)), dtype=torch.float64)
        super().__init__(config, samples, eval_prompts, **shared)
        self.rewards_n = normalised(given)[self.samples.index].to(self.device)
        if not self.rewards_n.any():
            log.warning(
                "all rewards are %g: there is nothing to prefer, so Q and V learn 0 and the policy learns the samples",
                float(given[0]),
            )

    def build_policy(self) -> PolicyModel:
        """With a Q for each token that the samples choose, and one for all others."""
        return build_policy(self.config, self.device, tokens_C=torch.tensor(self.samples.chosen_tokens))

    def losses(self, batch: Batch, trunk_MH: Tensor | None, chosen: Tensor, tokens: Tensor) -> Tensor:
        """The loss, its terms, and the means of Q, V and the advantage."""
        method = self.method
        cql_weights_N = batch.counts_N / tokens if method.cql_scale > 0 else None
        now: QValues = self.policy("values", batch, trunk_MH, cql_weights_N, method.awac_scale > 0)
        rewards_N = torch.where(batch.last_N, self.rewards_n[chosen][batch.sample_N], 0)
        loss = ilql_loss(
            now.logprobs_N,
            now.qs_KN,
            now.target_qs_KN,
            now.values_N,
            now.cql,
            rewards_N,
            batch.last_N,
            batch.counts_N,
            tau=method.tau,
            gamma=method.gamma,
            beta=method.beta,
            cql_scale=method.cql_scale,
            awac_scale=method.awac_scale,
            denominator=tokens,
        )
        return torch.stack(loss)

    def after_step(self) -> None:
        """Move the target heads after every `steps_for_target_q_sync` optimizer steps."""
        if self.steps_done % self.method.steps_for_target_q_sync == 0:
            cast(ILQLModel, self.model).sync(self.method.alpha)

    def settings(self, gen_kwargs: dict[str, Any]) -> SamplingSettings:
        """How to decode: tokens are weighed by `beta` times their advantage; temperature 0 takes the likeliest."""
        own = {name: value for name, value in gen_kwargs.items() if name not in ("beta", "temperature")}
        temperature = float(gen_kwargs.get("temperature", 1.0))
        if temperature > 0:
            own["temperature"] = temperature
        else:
            own["do_sample"] = False
        return dataclasses.replace(super().settings(own), beta=float(gen_kwargs.get("beta", 1.0)))

    def _data_order(self) -> dict[str, Any]:
        tokens = torch.tensor(self.samples.chosen_tokens).numpy().tobytes()  # whose the rows of Q are
        return {**super()._data_order(), "tokens chosen": zlib.crc32(tokens)}

    def _hf_generate(self, input_ids: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        """`generate` decodes by the Q heads as evaluations do, with torch's own random numbers.

        Prompts are padded on the left.
        """
        settings = self.settings(options)
        if settings.other:
            raise ConfigError(
                f"generate() of ILQL got {', '.join(settings.other)}, which its own sampler does not know"
            )
        ids_BP = input_ids.to(self.device)
        mask_BP = torch.ones_like(ids_BP) if attention_mask is None else attention_mask.to(self.device)
        rollouts = self.policy(
            "sample",
            ids_BP,
            mask_BP.bool(),
            torch.arange(len(ids_BP), device=self.device),
            torch.rand(len(ids_BP), settings.max_new_tokens, dtype=torch.float64),
            settings,
            self.tokenizer.pad_token_id,
        )
        start_BP = rollouts.prompt_ids_NP if self.config.model.is_seq2seq else ids_BP  # the decoder's own start
        return torch.cat([start_BP, rollouts.response_ids_NT], dim=1)
