"""What sampling produces and what everything after it reads.

Shapes: N rollouts, P padded prompt length, T padded response length, S = P + T - 1 positions that are fed to the model
(the last sampled token never is), H hidden, E padded input length of an encoder.

An encoder-decoder's response begins where its decoder does: its "prompt" is the decoder's start token (P = 1), and what
it answers stands in the encoder's fields.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class FinishReason(IntEnum):
    """Why a response ended."""

    LENGTH = 0
    EOS = 1
    STOP_STRING = 2


class Rollouts(NamedTuple):
    """Sampled responses as token ids; text is decoded for the reward function only and never read back.

    Args:
        prompt_ids_NP: left-padded prompts, int64; of an encoder-decoder the decoder's start token.
        prompt_mask_NP: True on prompt tokens.
        response_ids_NT: right-padded responses, int64.
        response_mask_NT: True on sampled tokens, the first EOS included; a row is a run of True followed by False.
        sample_logprobs_NT: log-probability of each token when it was drawn, at the sampling temperature, float32.
        finish_N: `FinishReason` of each row, int64.
        prompt_index_N: which prompt of the data set a row answers, int64.
        trunk_NSH: what entered the lowest trained block, or None where the whole model is run from ids; it may lie in
            host memory while the rest is on the GPU.
        encoder_ids_NE: right-padded prompts of an encoder-decoder, int64.
        encoder_mask_NE: True on their tokens.
        encoder_hidden_NEH: the encoder's output, or None where the encoder is trained and run from ids.
        group_N: rows of one number answer the same prompt and are compared with each other, int64; None before a
            trainer's sampler has given them out.
    """

    prompt_ids_NP: Tensor
    prompt_mask_NP: Tensor
    response_ids_NT: Tensor
    response_mask_NT: Tensor
    sample_logprobs_NT: Tensor
    finish_N: Tensor
    prompt_index_N: Tensor
    trunk_NSH: Tensor | None
    encoder_ids_NE: Tensor | None = None
    encoder_mask_NE: Tensor | None = None
    encoder_hidden_NEH: Tensor | None = None
    group_N: Tensor | None = None

    @property
    def n_rollouts(self) -> int:
        return int(self.prompt_ids_NP.shape[0])

    @property
    def prompt_width(self) -> int:
        return int(self.prompt_ids_NP.shape[1])

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, mask (int64) and positions of the S tokens that are fed to the model, each (N, S)."""
        ids_NS = torch.cat([self.prompt_ids_NP, self.response_ids_NT[:, :-1]], dim=1)
        mask_NS = torch.cat([self.prompt_mask_NP, self.response_mask_NT[:, :-1]], dim=1).long()
        return ids_NS, mask_NS, positions_of(mask_NS)

    def select(self, rows: Tensor) -> Rollouts:
        """The given rows, (M,) indices, at the same padding and on the device of `rows`."""
        return self._make(None if field is None else _rows_of(field, rows) for field in self)

    def without(self, rows: list[int]) -> Rollouts:
        """The same with no response tokens in the given rows: nothing is learned from them, and nothing counts them."""
        if not rows:
            return self
        mask_NT = self.response_mask_NT.clone()
        mask_NT[rows] = False
        return self._replace(response_mask_NT=mask_NT)

    def with_trunk_on_host(self) -> Rollouts:
        """The same with the trunk in host memory."""
        return self._replace(trunk_NSH=None if self.trunk_NSH is None else self.trunk_NSH.cpu())

    def prompt_tokens(self, row: int) -> list[int]:
        """The token ids of the prompt that one row answers."""
        if self.encoder_ids_NE is not None and self.encoder_mask_NE is not None:
            return self.encoder_ids_NE[row][self.encoder_mask_NE[row]].tolist()
        return self.prompt_ids_NP[row][self.prompt_mask_NP[row]].tolist()

    def response_tokens(self, row: int) -> list[int]:
        """The sampled token ids of one row."""
        return self.response_ids_NT[row][self.response_mask_NT[row]].tolist()


def _rows_of(field: Tensor, rows: Tensor) -> Tensor:
    """`field[rows]` on the device of `rows`; from the host through page-locked memory. The host waits
    for `rows`, not for the copy."""
    if field.device == rows.device:
        return field[rows]
    picked = torch.empty((len(rows), *field.shape[1:]), dtype=field.dtype, pin_memory=rows.is_cuda)
    torch.index_select(field, 0, rows.to(field.device), out=picked)
    return picked.to(rows.device, non_blocking=True)


def positions_of(mask_BT: Tensor) -> Tensor:
    """Position of each token within its own row, 0 on padding."""
    return (mask_BT.long().cumsum(-1) - 1).clamp(min=0)


def concatenate(parts: list[Rollouts], pad_token_id: int) -> Rollouts:
    """Join rollouts that were sampled in parts, padded to the longest prompt and the longest response."""
    if len(parts) == 1:
        return parts[0]
    width_P = max(part.prompt_width for part in parts)
    width_T = max(part.response_ids_NT.shape[1] for part in parts)
    padded = [_pad(part, width_P - part.prompt_width, width_T, pad_token_id) for part in parts]
    if parts[0].encoder_ids_NE is not None:
        padded = _pad_encoders(padded, pad_token_id)
    columns = zip(*padded, strict=True)
    return Rollouts._make(None if column[0] is None else torch.cat(column) for column in columns)


def _pad(part: Rollouts, left: int, width_T: int, pad_token_id: int) -> Rollouts:
    right = width_T - part.response_ids_NT.shape[1]
    pad = torch.nn.functional.pad
    trunk = part.trunk_NSH
    return part._replace(
        prompt_ids_NP=pad(part.prompt_ids_NP, (left, 0), value=pad_token_id),
        prompt_mask_NP=pad(part.prompt_mask_NP, (left, 0)),
        response_ids_NT=pad(part.response_ids_NT, (0, right), value=pad_token_id),
        response_mask_NT=pad(part.response_mask_NT, (0, right)),
        sample_logprobs_NT=pad(part.sample_logprobs_NT, (0, right)),
        trunk_NSH=None if trunk is None else pad(trunk, (0, 0, left, right)),
    )


def _pad_encoders(parts: list[Rollouts], pad_token_id: int) -> list[Rollouts]:
    pad = torch.nn.functional.pad
    inputs = [(part.encoder_ids_NE, part.encoder_mask_NE, part.encoder_hidden_NEH) for part in parts]
    width_E = max(ids.shape[1] for ids, _, _ in inputs if ids is not None)
    padded = []
    for part, (ids, mask, hidden) in zip(parts, inputs, strict=True):
        assert ids is not None
        assert mask is not None
        right = width_E - ids.shape[1]
        padded.append(
            part._replace(
                encoder_ids_NE=pad(ids, (0, right), value=pad_token_id),
                encoder_mask_NE=pad(mask, (0, right)),
                encoder_hidden_NEH=None if hidden is None else pad(hidden, (0, 0, 0, right)),
            )
        )
    return padded
