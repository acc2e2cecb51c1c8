"""Sampling responses token by token around a model's own forward, with a KV cache.

While a token is made, everything a PPO round needs of it is kept: its log-probability and what entered the lowest
trained block (the trunk's output), so that nothing below the top is run again for it.

Shapes: B rows, P padded prompt length, T response length, V vocabulary, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from solotune.rollout.cache import SamplingCache
from solotune.rollout.draw import Draw, draw, greedy
from solotune.rollout.records import FinishReason, Rollouts, positions_of
from solotune.rollout.settings import SamplingSettings

LOOK_EVERY = 4
"""Steps between two looks at which rows are finished: each look makes the host wait for the device."""

SHRINK_BELOW = 0.75
"""The batch shrinks when at most this share of its rows is still being sampled; dropping rows moves the cache."""

FindStop = Callable[[list[int]], bool]
"""Whether the tail of a row's response, as token ids, holds a stop string."""


@torch.no_grad()
def sample(
    decoder: nn.Module,
    head: Callable[[Tensor], Tensor],
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    prompt_index_B: Tensor,
    uniforms_BT: Tensor,
    settings: SamplingSettings,
    pad_token_id: int,
    take_trunk: Callable[[], Tensor] | None = None,
    find_stop: FindStop | None = None,
    cache: Any = None,
) -> Rollouts:
    """Sample one response a row.

    Args:
        decoder: ids to hidden states after the final norm, with a cache; the whole of it runs.
        head: hidden states (b, H) to logits (b, V).
        prompt_ids_BP: left-padded prompts.
        prompt_mask_BP: True on prompt tokens.
        prompt_index_B: which prompt each row answers, handed through.
        uniforms_BT: the rows' random numbers, see `draw.row_uniforms`.
        settings: how to draw and when to stop.
        pad_token_id: what stands behind a finished response.
        take_trunk: returns the trunk's output of the forward that just ran, (b, t, H); None keeps none.
        find_stop: see `FindStop`; needed with `settings.stop_strings`.
        cache: what the decoder keeps between steps, with a `keep_rows`; default a `SamplingCache`.
    """
    n_rows, width_P = prompt_ids_BP.shape
    device, steps = prompt_ids_BP.device, settings.max_new_tokens
    response_ids_BT = torch.full((n_rows, steps), pad_token_id, dtype=torch.long, device=device)
    logprobs_BT = torch.zeros(n_rows, steps, device=device)
    lengths_B = torch.full((n_rows,), steps, dtype=torch.long, device=device)
    finish_B = torch.full((n_rows,), int(FinishReason.LENGTH), dtype=torch.long, device=device)
    eos_E = torch.tensor(settings.eos_token_ids, dtype=torch.long, device=device)
    uniforms_BT = uniforms_BT.to(device)
    trunk_BSH: Tensor | None = None

    if cache is None:
        cache = SamplingCache(decoder.config.num_hidden_layers, width_P + steps - 1)  # type: ignore[union-attr,arg-type]
    forward = _Forward(decoder, head, cache)
    rows_b = torch.arange(n_rows, device=device)  # the rows that are still in the batch
    mask_bS = torch.ones(n_rows, width_P + steps, dtype=torch.long, device=device)
    mask_bS[:, :width_P] = prompt_mask_BP
    next_positions_b = prompt_mask_BP.sum(-1)
    logits_bV = forward(prompt_ids_BP, mask_bS[:, :width_P], positions_of(prompt_mask_BP))
    for step in range(steps):
        if take_trunk is not None:
            first, last = (0, width_P) if step == 0 else (width_P + step - 1, width_P + step)
            trunk_btH = take_trunk()
            if trunk_BSH is None:
                trunk_BSH = trunk_btH.new_zeros(n_rows, width_P + steps - 1, trunk_btH.shape[-1])
            trunk_BSH[rows_b, first:last] = trunk_btH
        drawn = choose(
            logits_bV, uniforms_BT[rows_b, step], settings, eos_E if step < settings.min_new_tokens else None
        )
        running_b = finish_B[rows_b] == FinishReason.LENGTH
        tokens_b = torch.where(running_b, drawn.tokens_B, pad_token_id)
        response_ids_BT[rows_b, step] = tokens_b
        logprobs_BT[rows_b, step] = torch.where(running_b, drawn.logprobs_B, 0.0)
        ended_b = running_b & torch.isin(tokens_b, eos_E)
        # torch.where and not a boolean index, for which the host would wait at every step
        finish_B[rows_b] = torch.where(ended_b, int(FinishReason.EOS), finish_B[rows_b])
        if find_stop is not None and settings.stop_strings:
            stopped_b = _find_stops(find_stop, response_ids_BT[rows_b, : step + 1], running_b & ~ended_b)
            finish_B[rows_b] = torch.where(stopped_b, int(FinishReason.STOP_STRING), finish_B[rows_b])
            ended_b = ended_b | stopped_b
        lengths_B[rows_b] = torch.where(ended_b, step + 1, lengths_B[rows_b])
        if step + 1 == steps:
            break
        if (step + 1) % LOOK_EVERY == 0:
            left_r = (finish_B[rows_b] == FinishReason.LENGTH).nonzero().squeeze(-1)
            if len(left_r) == 0:
                break
            if len(left_r) <= SHRINK_BELOW * len(rows_b):
                cache.keep_rows(left_r)
                rows_b, tokens_b, mask_bS = rows_b[left_r], tokens_b[left_r], mask_bS[left_r]
                next_positions_b = next_positions_b[left_r]
        logits_bV = forward(tokens_b[:, None], mask_bS[:, : width_P + step + 1], next_positions_b[:, None])
        next_positions_b = next_positions_b + 1

    width_T = int(lengths_B.max()) if n_rows else 0
    response_mask_BT = torch.arange(width_T, device=device) < lengths_B[:, None]
    return Rollouts(
        prompt_ids_NP=prompt_ids_BP,
        prompt_mask_NP=prompt_mask_BP.bool(),
        response_ids_NT=response_ids_BT[:, :width_T].contiguous(),
        response_mask_NT=response_mask_BT,
        sample_logprobs_NT=logprobs_BT[:, :width_T].contiguous(),
        finish_N=finish_B,
        prompt_index_N=prompt_index_B,
        trunk_NSH=None if trunk_BSH is None else trunk_BSH[:, : width_P + width_T - 1],
    )


class _Forward:
    """One step of the model: logits of the last position, (b, V)."""

    def __init__(self, decoder: nn.Module, head: Callable[[Tensor], Tensor], cache: Any):
        self._decoder, self._head, self._cache = decoder, head, cache
        self._takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters

    def __call__(self, ids_bt: Tensor, mask_bS: Tensor, positions_bt: Tensor) -> Tensor:
        positions = {"position_ids": positions_bt} if self._takes_positions else {}
        output = self._decoder(
            input_ids=ids_bt, attention_mask=mask_bS, past_key_values=self._cache, use_cache=True, **positions
        )
        # Contiguous: on a CPU torch multiplies a strided (b, 1, H) by copying the head's weights b times.
        return self._head(output.last_hidden_state[:, -1].contiguous())


def choose(logits_bV: Tensor, uniforms_b: Tensor, settings: SamplingSettings, excluded_E: Tensor | None) -> Draw:
    """The next token of each row, drawn or the most likely one, as the settings say."""
    if settings.do_sample:
        return draw(logits_bV, uniforms_b, settings.temperature, settings.top_k, settings.top_p, excluded_E)
    return greedy(logits_bV, settings.temperature, excluded_E)


def _find_stops(find_stop: FindStop, response_ids_bt: Tensor, candidates_b: Tensor) -> Tensor:
    found = [
        bool(candidate) and find_stop(ids)
        for ids, candidate in zip(response_ids_bt.tolist(), candidates_b.tolist(), strict=True)
    ]
    return torch.tensor(found, dtype=torch.bool, device=response_ids_bt.device)
