"""Attention's masks, made before a forward: given the mask of the padding alone, models read it on the host.

Shapes: B rows, b of a batch, S positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PARITY_TESTED = {
    "gemma2": "by layer",
    "gemma3_text": "by layer",
    "gpt2": "full",
    "gpt_neox": "full",
    "gptj": "full",
    "llama": "full",
    "mistral": "window",
    "opt": "full",
    "phi": "full",
    "qwen2": "by layer",
    "qwen3": "by layer",
}
"""Architectures whose fixed-shape steps give what their own forward gives, and how they take their masks: one for all
layers, one cut to a window, or one for each kind of layer. Not among them: GPT-Neo (its local layers count positions
from the end of the keys) and BLOOM (which reads its positions off a growing mask on the host)."""

MASK_STEP = 8
"""A mask's rows are this far apart, or a multiple of it: of others an attention kernel makes a copy, in every block."""


def takes_masks(config: Any) -> bool:
    """Whether a decoder takes ready-made masks: its parity is tested, and its attention is one that adds them (flash
    attention would take them for the mask of the padding)."""
    attention = getattr(config, "_attn_implementation", None)
    return config.model_type in PARITY_TESTED and attention in (None, "sdpa", "eager")


def layer_masks(config: Any, full: Tensor, windowed: Tensor) -> Any:
    """The masks of all layers as the architecture takes them."""
    kind = PARITY_TESTED[config.model_type]
    if kind == "by layer":
        return {"full_attention": full, "sliding_attention": windowed}
    return windowed if kind == "window" else full


def sequence_masks(config: Any, segments_BS: Tensor, dtype: torch.dtype) -> Any:
    """The masks of whole sequences, ready-made: given the mask of their padding, (B, S), models read it on the host.

    `segments_BS` is 0 on padding, and elsewhere 1, or which of the sequences packed into its row a token belongs to: no
    token looks at another sequence.
    """
    positions_S = torch.arange(segments_BS.shape[1], device=segments_BS.device)
    distance_SS = positions_S[:, None] - positions_S
    may_look_BSS = (distance_SS >= 0) & (segments_BS[:, :, None] == segments_BS[:, None, :])
    full = additive(may_look_BSS, dtype)
    window = getattr(config, "sliding_window", None)
    return layer_masks(config, full, full if window is None else additive(may_look_BSS & (distance_SS < window), dtype))


def additive(may_look: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, S) or (b, S, S) to what is added to scores, (b, 1, 1, S) or (b, 1, S, S); rows begin at multiples of
    `MASK_STEP`."""
    *rows, width = may_look.shape
    hidden = torch.zeros((*rows, rounded(width, MASK_STEP)), dtype=dtype, device=may_look.device)[..., :width]
    hidden.masked_fill_(~may_look, torch.finfo(dtype).min)
    return hidden[:, None, None] if hidden.ndim == 2 else hidden[:, None]


def rounded(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step
