"""Encoder-decoders: the encoder belongs to the trunk, the decoder is split as any other.

    prompt   -> [ encoder ] -> encoded_BEH ----------------------------+
                                                                       v (cross-attention)
    response -> [ decoder blocks 0..n-k-1, frozen ] -> trunk_BTH -> [ last k blocks + norm + head ]

To everything after sampling a response looks as a causal model's does: its "prompt" is the decoder's start token, and
`Rollouts` carry the encoder's output along. Pairs that were given and not sampled are made into such a record:

    pairs = policy("given", prompt_ids_BP, prompt_mask_BP, response_ids_BT, response_mask_BT)
    logprobs_BT = policy("update", pairs, 1.0).logprobs_bT

Shapes: B rows, P padded prompt length, E the encoder's (P, padded on the right), T padded response length, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from solotune.errors import ModelError
from solotune.models.policy import PolicyModel, WholePass
from solotune.models.split import Encoded, Top
from solotune.rollout.generate import as_rollouts, sequences_of
from solotune.rollout.records import Rollouts
from solotune.rollout.sampler import FindStop, sample
from solotune.rollout.seq2seq import ConditionedDecoder, Seq2SeqCache, right_padded
from solotune.rollout.settings import SamplingSettings


class EncoderDecoder(PolicyModel):
    """What all models on an encoder-decoder share: the encoder, and sampling; with a `PolicyModel` or one of its
    subclasses behind it.

    Args:
        backbone: an encoder-decoder whose trainable tensors require gradients, or a `PeftModel` around one.
        gradient_checkpointing: recompute the top's blocks (and a trained encoder's) in the backward pass.
    Raises:
        ModelError: the decoder's start token is not known.
    """

    def __init__(self, backbone: PreTrainedModel | PeftModel, gradient_checkpointing: bool = False, **others: Any):
        if any(p.requires_grad for name, p in backbone.named_parameters() if "relative_attention_bias" in name):
            # torch's fused attention has no gradient for the bias: with one it takes another path, to other last bits.
            backbone.set_attn_implementation("eager")
        super().__init__(backbone, gradient_checkpointing, **others)
        self.start_token_id = _start_token_id(self.lm)
        self.encoder_trains = any(p.requires_grad for p in self.encoder.parameters())

    @property
    def encoder(self) -> nn.Module:
        return self.lm.get_encoder()

    @torch.no_grad()
    def _sample(
        self,
        prompt_ids_BP: Tensor,
        prompt_mask_BP: Tensor,
        prompt_index_B: Tensor,
        uniforms_BT: Tensor,
        settings: SamplingSettings,
        pad_token_id: int,
        find_stop: FindStop | None = None,
    ) -> Rollouts:
        """`rollout.sampler.sample` of the decoder; the encoder runs once a prompt."""
        ids_BE, mask_BE = right_padded(prompt_ids_BP, prompt_mask_BP, pad_token_id)
        encoded = self._encode(self.lm, ids_BE, mask_BE)
        start_B1 = torch.full_like(ids_BE[:, :1], self.start_token_id)
        with self._recording(self.RECORDS_TRUNK) as take_trunk:
            rollouts = sample(
                ConditionedDecoder(self.decoder.module),
                self._sampling_head,
                start_B1,
                torch.ones_like(start_B1, dtype=torch.bool),
                prompt_index_B,
                uniforms_BT,
                settings,
                pad_token_id,
                take_trunk=take_trunk,
                find_stop=find_stop,
                cache=Seq2SeqCache(len(self.decoder.blocks), settings.max_new_tokens, *encoded),
            )
        return self._with_prompts(rollouts, ids_BE, encoded)

    @torch.no_grad()
    def _generate(
        self,
        prompt_ids_BP: Tensor,
        prompt_mask_BP: Tensor,
        prompt_index_B: Tensor,
        uniforms_BT: Tensor,
        settings: SamplingSettings,
        pad_token_id: int,
        find_stop: FindStop | None = None,
    ) -> Rollouts:
        """The same by `transformers.generate`, for arguments that the own sampler does not know."""
        ids_BE, mask_BE = right_padded(prompt_ids_BP, prompt_mask_BP, pad_token_id)
        with self._recording():  # no checkpointing, which would drop the cache
            sequences_BS = sequences_of(self.lm, ids_BE, mask_BE, uniforms_BT, settings, pad_token_id)
        start_B1, response_ids_BT = sequences_BS[:, :1], sequences_BS[:, 1:]
        start_mask_B1 = torch.ones_like(start_B1, dtype=torch.bool)
        rollouts = as_rollouts(
            start_B1, start_mask_B1, response_ids_BT, prompt_index_B, settings, pad_token_id, find_stop
        )
        return self._with_trunk(rollouts, ids_BE, mask_BE)

    def _with_trunk(self, rollouts: Rollouts, ids_BE: Tensor, mask_BE: Tensor) -> Rollouts:
        """Rollouts that were not recorded while they were sampled, with the encoder's and the trunk's output."""
        encoded = self._encode(self.lm, ids_BE, mask_BE)
        with self._recording(self.RECORDS_TRUNK) as take_trunk:
            if take_trunk is not None:
                ids_BS, attention_BS, _ = rollouts.inputs
                self.decoder.module(
                    input_ids=ids_BS,
                    attention_mask=attention_BS,
                    encoder_hidden_states=encoded.hidden_BEH,
                    encoder_attention_mask=mask_BE.long(),
                    use_cache=False,
                )
                rollouts = rollouts._replace(trunk_NSH=take_trunk())
        return self._with_prompts(rollouts, ids_BE, encoded)

    def _with_prompts(self, rollouts: Rollouts, ids_BE: Tensor, encoded: Encoded) -> Rollouts:
        kept = None if self.encoder_trains else encoded.hidden_BEH
        return rollouts._replace(encoder_ids_NE=ids_BE, encoder_mask_NE=encoded.mask_BE, encoder_hidden_NEH=kept)

    def _encode(self, lm: PreTrainedModel, ids_BE: Tensor, mask_BE: Tensor) -> Encoded:
        encoder = lm.get_encoder()
        if self._checkpointing and self.encoder_trains:
            encoder.train(torch.is_grad_enabled())
        return Encoded(encoder(input_ids=ids_BE, attention_mask=mask_BE.long()).last_hidden_state, mask_BE)


class Seq2SeqPolicy(EncoderDecoder):
    """Policy, reference, critic and sampler on one encoder-decoder; see `EncoderDecoder` for the arguments.

    Its further task: `given`, pairs as if they had been sampled.
    """

    def _passes(self) -> dict[str, Callable[..., Any]]:
        return {**super()._passes(), "given": self._given, "whole": self._whole_pairs}

    def _encoded(self, rollouts: Rollouts, top: Top) -> Encoded:
        """What the decoder attends to: as it was recorded or, where the encoder is trained, made anew."""
        ids_bE, mask_bE = rollouts.encoder_ids_NE, rollouts.encoder_mask_NE
        assert ids_bE is not None
        assert mask_bE is not None
        if rollouts.encoder_hidden_NEH is not None:
            return Encoded(rollouts.encoder_hidden_NEH, mask_bE)
        copied: Any = self.reference["lm"] if "lm" in self.reference and top is self.reference_top else None
        return self._encode(self.lm if copied is None else copied, ids_bE, mask_bE)

    @torch.no_grad()
    def _given(
        self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor, response_ids_BT: Tensor, response_mask_BT: Tensor
    ) -> Rollouts:
        """Given pairs as if they had been sampled: the encoder and the trunk run once, teacher-forced.

        Args:
            prompt_ids_BP, prompt_mask_BP: for the encoder, padded on either side.
            response_ids_BT, response_mask_BT: for the decoder, right-padded, without its start token.
        """
        start_B1 = torch.full_like(response_ids_BT[:, :1], self.start_token_id)
        return self._forced(prompt_ids_BP, prompt_mask_BP, start_B1, response_ids_BT, response_mask_BT)

    def _forced(
        self,
        prompt_ids_BP: Tensor,
        prompt_mask_BP: Tensor,
        start_B1: Tensor,
        response_ids_BT: Tensor,
        response_mask_BT: Tensor,
    ) -> Rollouts:
        ids_BE, mask_BE = right_padded(prompt_ids_BP, prompt_mask_BP, self.lm.config.pad_token_id or 0)
        index_B = torch.arange(len(ids_BE), device=ids_BE.device)
        rollouts = Rollouts(
            prompt_ids_NP=start_B1,
            prompt_mask_NP=torch.ones_like(start_B1, dtype=torch.bool),
            response_ids_NT=response_ids_BT,
            response_mask_NT=response_mask_BT.bool(),
            sample_logprobs_NT=torch.full(response_ids_BT.shape, torch.nan, device=ids_BE.device),
            finish_N=torch.zeros_like(index_B),
            prompt_index_N=index_B,
            trunk_NSH=None,
        )
        return self._with_trunk(rollouts, ids_BE, mask_BE)

    def _whole_pairs(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> WholePass:
        """Logits and values at every position of given inputs of the decoder (its start token first)."""
        # A position predicts the token behind it; what the last one predicts is not looked at.
        after_BT, after_mask_BT = (torch.cat([x_BT[:, 1:], x_BT[:, :1]], dim=1) for x_BT in (ids_BT, mask_BT))
        with torch.no_grad():
            given = self._forced(prompt_ids_BP, prompt_mask_BP, ids_BT[:, :1], after_BT, after_mask_BT)
        hidden_BTH = self._response_hidden(given, self.top)
        with torch.no_grad(), self._reference():
            ref_hidden_BTH = self._response_hidden(given, self.reference_top)
            ref_logits_NV = self.reference_head(ref_hidden_BTH.flatten(0, 1))
        assert self.value_head is not None
        logits_NV, values_N = (part(hidden_BTH.flatten(0, 1)) for part in (self.head, self.value_head))
        return WholePass(*(x_N.unflatten(0, ids_BT.shape) for x_N in (logits_NV, ref_logits_NV, values_N)))


def _start_token_id(lm: PreTrainedModel) -> int:
    for config in (lm.generation_config, lm.config):
        token = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    raise ModelError(
        f"model.model_path: the configuration of {type(lm).__name__} has no decoder_start_token_id; set it (T5's is "
        "its pad token)"
    )
