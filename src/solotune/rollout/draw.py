"""Drawing one token a row from a row of logits with one uniform number a row.

The draw inverts the cumulative distribution function on two levels: the vocabulary is cut into blocks, a uniform
number first falls into a block, then onto a token of it. That needs one pass over the vocabulary instead of a sort or
a vocabulary of random numbers, it is exact to fp64 where it matters (the sums over blocks), and a row's token depends
on that row's logits and number alone.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROWS_AT_ONCE_BYTES = 4 << 20
"""Rows are worked on in groups whose fp32 logits fit into a CPU's cache."""


class Draw(NamedTuple):
    """Tokens and their log-probabilities under the whole tempered softmax (before top-k and top-p), both (B,)."""

    tokens_B: Tensor
    logprobs_B: Tensor


def row_uniforms(seed: int, stream: int, row_ids: Iterable[int], steps: int) -> Tensor:
    """One uniform number in [0, 1) for every row and step, (B, steps), float64.

    A row's numbers are a function of `seed`, `stream` (training, evaluation, ...) and its own id alone (a counter-based
    generator: Philox, Salmon et al. 2011), so they depend neither on the batch it is sampled in nor on what was drawn
    before it, and there is no state to save.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=[seed % 2**64, stream], counter=[0, 0, row_id, 0])).random(steps)
        for row_id in row_ids
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, steps, dtype=torch.float64)


def draw(
    logits_BV: Tensor,
    uniforms_B: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    excluded_E: Tensor | None = None,
) -> Draw:
    """Draw one token a row.

    Args:
        logits_BV: any float dtype.
        uniforms_B: numbers in [0, 1), float64.
        temperature: divides the logits; positive.
        top_k: only the k most likely tokens can be drawn; 0 for all.
        top_p: only the fewest tokens whose probabilities sum to at least p can be drawn (Holtzman et al. 2020,
            arXiv:1904.09751), after top-k as in transformers; 1 for all.
        excluded_E: token ids that cannot be drawn now (EOS before min_new_tokens); they still count in the softmax.
    """
    if logits_BV.device.type != "cpu":
        return _draw_rows(logits_BV, uniforms_B, temperature, top_k, top_p, excluded_E)
    rows = max(1, ROWS_AT_ONCE_BYTES // (4 * logits_BV.shape[1]))
    parts = [
        _draw_rows(
            logits_BV[first : first + rows], uniforms_B[first : first + rows], temperature, top_k, top_p, excluded_E
        )
        for first in range(0, len(logits_BV), rows)
    ]
    return Draw(torch.cat([p.tokens_B for p in parts]), torch.cat([p.logprobs_B for p in parts]))


def greedy(logits_BV: Tensor, temperature: float = 1.0, excluded_E: Tensor | None = None) -> Draw:
    """The most likely token of every row that is not excluded, and its log-probability."""
    logits_BV = logits_BV.float() / temperature
    allowed_BV = logits_BV if excluded_E is None else logits_BV.index_fill(-1, excluded_E, -torch.inf)
    tokens_B = allowed_BV.argmax(-1)
    chosen_B = logits_BV.gather(-1, tokens_B[:, None]).squeeze(-1)
    return Draw(tokens_B, chosen_B - logits_BV.logsumexp(-1))


def _draw_rows(
    logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_k: int, top_p: float, excluded_E: Tensor | None
) -> Draw:
    scaled_BV = logits_BV.float() / temperature if temperature != 1.0 else logits_BV.float()
    weights_BV = (scaled_BV - scaled_BV.amax(-1, keepdim=True)).exp_()
    left_out_B: Tensor | float = 0.0
    if excluded_E is not None:
        left_out_B = weights_BV[:, excluded_E].sum(-1, dtype=torch.float64)
        weights_BV.index_fill_(1, excluded_E, 0.0)
    if top_k > 0 or top_p < 1.0:
        total_B = weights_BV.sum(-1, dtype=torch.float64)
        order_BV, ids_BV = _most_likely(weights_BV, total_B, top_k, top_p)
        picked_B = _invert(order_BV.double(), uniforms_B)
        tokens_B = ids_BV.gather(-1, picked_B[:, None]).squeeze(-1)
    else:
        tokens_B, total_B = _invert_two_levels(weights_BV, uniforms_B)
    chosen_B = weights_BV.gather(-1, tokens_B[:, None]).squeeze(-1)
    return Draw(tokens_B, (chosen_B.double() / (total_B + left_out_B)).log().float())


def _invert_two_levels(weights_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Token of each row, (B,), and the sum of its weights, (B,) float64."""
    vocabulary = weights_BV.shape[1]
    block = _block_size(vocabulary)
    padded = -vocabulary % block
    if padded:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, padded))
    weights_BKW = weights_BV.view(len(weights_BV), -1, block)
    sums_BK = weights_BKW.sum(-1).double()
    blocks_B = _invert(sums_BK, uniforms_B)
    cumulative_BK = sums_BK.cumsum(-1)
    total_B = cumulative_BK[:, -1]
    block_sum_B = sums_BK.gather(-1, blocks_B[:, None]).squeeze(-1)
    block_end_B = cumulative_BK.gather(-1, blocks_B[:, None]).squeeze(-1)
    rest_B = (uniforms_B * total_B - (block_end_B - block_sum_B)) / block_sum_B
    rows_B = torch.arange(len(weights_BV), device=weights_BV.device)
    inside_B = _invert(weights_BKW[rows_B, blocks_B].double(), rest_B.clamp(0.0, math.nextafter(1.0, 0.0)))
    return blocks_B * block + inside_B, total_B


def _invert(weights_BN: Tensor, uniforms_B: Tensor) -> Tensor:
    """Index whose slice of the cumulated weights holds the uniform number."""
    cumulative_BN = weights_BN.cumsum(-1)
    target_B1 = (uniforms_B.to(weights_BN.device) * cumulative_BN[:, -1])[:, None]
    index_B = torch.searchsorted(cumulative_BN, target_B1, right=True).squeeze(-1)
    # u * total can round up to total: then the last token that has any weight.
    last_B = (weights_BN > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(index_B, last_B)


def _most_likely(weights_BV: Tensor, total_B: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The weights that may be drawn, in falling order, zero where excluded, and their token ids."""
    if 0 < top_k < weights_BV.shape[1]:
        order_BN, ids_BN = weights_BV.topk(top_k, dim=-1)
        total_B = order_BN.sum(-1, dtype=torch.float64)
    else:
        order_BN, ids_BN = weights_BV.sort(dim=-1, descending=True)
    if top_p < 1.0:
        before_BN = order_BN.double().cumsum(-1) - order_BN.double()
        order_BN = order_BN.masked_fill(before_BN >= top_p * total_B[:, None], 0.0)
    return order_BN, ids_BN


@lru_cache
def _block_size(vocabulary: int) -> int:
    """The divisor of the vocabulary nearest to its square root, or that root where none is near (then it is padded)."""
    root = math.isqrt(vocabulary)
    divisors = [d for d in range(max(1, root // 8), root * 8 + 1) if vocabulary % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / max(root, 1)))) if divisors else max(root, 1)
