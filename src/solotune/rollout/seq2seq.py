"""Sampling from an encoder-decoder: the encoder runs once, its keys and values are kept for every token.

The loop is `rollout.sampler`'s own. What a row's tokens depend on beside each other (the encoder's output) lives in the
cache, so that it is dropped with the row.

Shapes: B rows, E padded input length of the encoder, t tokens fed at a time, H hidden.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from solotune.rollout.cache import SamplingCache


class Seq2SeqCache(EncoderDecoderCache):
    """Keys and values of the decoder's own tokens and of the encoder's, and the encoder's output, for rows that can be
    dropped.

    Args:
        n_blocks: blocks of the decoder.
        capacity: tokens that are fed to it at most.
        encoder_hidden_BEH: the encoder's output.
        encoder_mask_BE: True on its tokens.
    """

    def __init__(self, n_blocks: int, capacity: int, encoder_hidden_BEH: Tensor, encoder_mask_BE: Tensor):
        own, cross = (SamplingCache(n_blocks, width) for width in (capacity, encoder_hidden_BEH.shape[1]))
        super().__init__(own, cross)
        self._own, self._cross = own, cross
        self.encoder_hidden_bEH, self.encoder_mask_bE = encoder_hidden_BEH, encoder_mask_BE

    def keep_rows(self, rows: Tensor) -> None:
        """Drop every row but `rows`, (fewer,), ascending."""
        self._own.keep_rows(rows)
        self._cross.keep_rows(rows)
        self.encoder_hidden_bEH, self.encoder_mask_bE = self.encoder_hidden_bEH[rows], self.encoder_mask_bE[rows]


class ConditionedDecoder(nn.Module):
    """A decoder that looks up in its `Seq2SeqCache` what to attend to; for `rollout.sampler.sample`."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self._decoder = decoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Seq2SeqCache, use_cache: bool
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The decoder's own forward."""
        return self._decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=past_key_values.encoder_hidden_bEH,
            encoder_attention_mask=past_key_values.encoder_mask_bE.long(),
            past_key_values=past_key_values,
            use_cache=use_cache,
        )


def right_padded(ids_BE: Tensor, mask_BE: Tensor, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask with each row's tokens at its start: encoders with absolute positions count them from there."""
    lengths_B = mask_BE.sum(-1)
    order_BE = mask_BE.long().argsort(dim=-1, descending=True, stable=True)
    mask_BE = order_BE.new_ones(order_BE.shape).cumsum(-1) <= lengths_B[:, None]
    return ids_BE.gather(-1, order_BE).masked_fill(~mask_BE, pad_token_id), mask_BE
