"""Encoder-decoders that learn from given pairs: prompt to the encoder, output to the decoder.

What is frozen makes, of a sample, the encoder's output and what enters the decoder's lowest trained block. Both are
kept as one run of vectors, the encoder's first, so that a cache need not know of two.

Shapes: R rows of one sample each, E and S positions of encoder and decoder, L = E + S, M positions of all samples (both
kinds), N tokens to learn, H hidden; see `data.batches.Batch`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from solotune.data.batches import Batch
from solotune.models.ilql import ILQLModel
from solotune.models.offline import OfflineModel
from solotune.models.seq2seq import EncoderDecoder
from solotune.models.split import Encoded


class Seq2SeqOfflineModel(EncoderDecoder, OfflineModel):
    """An `OfflineModel` on an encoder-decoder."""

    @property
    def can_pack(self) -> bool:
        return False

    @torch.no_grad()
    def _trunk(self, batch: Batch) -> Tensor:
        """The encoder's output and what enters the lowest trained block, (M, H), sample by sample."""
        encoded = self._encoded_batch(batch)
        inputs: dict[str, Any] = {"encoder_hidden_states": encoded.hidden_BEH}
        inputs["encoder_attention_mask"] = encoded.mask_BE.long()
        trunk_RSH = self._entering(self._started(batch), {**inputs, "attention_mask": batch.segments_RS})
        both_RLH = torch.cat([encoded.hidden_BEH.to(trunk_RSH.dtype), trunk_RSH], dim=1)
        return both_RLH[self._held(batch)]

    def _hidden(self, batch: Batch, trunk_MH: Tensor | None) -> Tensor:
        if trunk_MH is None and self.start > 0:
            trunk_MH = self._trunk(batch)
        trunk_RSH = None
        if trunk_MH is None:
            encoded = self._encoded_batch(batch)
        else:
            held_RL = self._held(batch)
            both_RLH = trunk_MH.new_zeros((*held_RL.shape, trunk_MH.shape[-1]))
            both_RLH[held_RL] = trunk_MH
            _, mask_RE = self._prompts(batch)
            hidden_REH, trunk_RSH = both_RLH.split([mask_RE.shape[1], batch.ids_RS.shape[1]], dim=1)
            encoded = Encoded(hidden_REH, mask_RE)
        if self._checkpointing:
            self.top.train(torch.is_grad_enabled())
        hidden_RSH = self.top(trunk_RSH, self._started(batch), batch.segments_RS, batch.positions_RS, encoded)
        return hidden_RSH.flatten(0, 1)[batch.picks_N]

    def _encoded_batch(self, batch: Batch) -> Encoded:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_trains):
            return self._encode(self.lm, *self._prompts(batch))

    def _started(self, batch: Batch) -> Tensor:
        """The decoder's inputs, with its start token in the place that is left for it, (R, S)."""
        start_R1 = torch.full_like(batch.ids_RS[:, :1], self.start_token_id)
        return torch.cat([start_R1, batch.ids_RS[:, 1:]], dim=1)

    @staticmethod
    def _prompts(batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.encoder_ids_RE is not None
        assert batch.encoder_mask_RE is not None
        return batch.encoder_ids_RE, batch.encoder_mask_RE

    def _held(self, batch: Batch) -> Tensor:
        """True where a sample has a position of its encoder or its decoder, (R, L)."""
        return torch.cat([self._prompts(batch)[1], batch.segments_RS > 0], dim=1)


class Seq2SeqILQLModel(ILQLModel, Seq2SeqOfflineModel):
    """An `ILQLModel` on an encoder-decoder; its heads read the decoder's last hidden state."""
