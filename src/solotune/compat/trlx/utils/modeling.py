"""trlX's model helpers, on this project's own functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from solotune.algorithms import whiten as _whiten
from solotune.algorithms.masks import masked_moments
from solotune.algorithms.rewards import RunningMoments
from solotune.models.adapters import select_trainable
from solotune.models.split import Decoder

__all__ = [
    "RunningMoments",
    "flatten_dict",
    "freeze_bottom_causal_layers",
    "freeze_bottom_seq2seq_layers",
    "get_tensor_stats",
    "hf_get_decoder",
    "hf_get_decoder_blocks",
    "hf_get_decoder_final_norm",
    "hf_get_hidden_size",
    "hf_get_lm_head",
    "hf_get_num_hidden_layers",
    "logprobs_of_labels",
    "make_head",
    "whiten",
]


def make_head(n_embd: int, out: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear(h, 2h), ReLU, Linear(2h, out)."""
    return nn.Sequential(nn.Linear(n_embd, 2 * n_embd, dtype=dtype), nn.ReLU(), nn.Linear(2 * n_embd, out, dtype=dtype))


def freeze_bottom_causal_layers(model: PreTrainedModel, num_layers_unfrozen: int = 0) -> None:
    """Leave only the last k blocks and the final norm trainable; 0 freezes everything, -1 nothing."""
    if num_layers_unfrozen == 0:
        model.requires_grad_(False)
    else:
        select_trainable(Decoder(model), num_layers_unfrozen)


def freeze_bottom_seq2seq_layers(model: PreTrainedModel, num_layers_unfrozen: int = 0) -> None:
    """The same of an encoder-decoder: the blocks are its decoder's; the encoder and the embeddings are frozen."""
    freeze_bottom_causal_layers(model, num_layers_unfrozen)


def hf_get_decoder(model: PreTrainedModel) -> nn.Module:
    """The module that holds the blocks."""
    return Decoder(model).module


def hf_get_decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks."""
    return Decoder(model).blocks


def hf_get_decoder_final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm after the last block."""
    return next(iter(Decoder(model).final_norms.values()))


def hf_get_lm_head(model: PreTrainedModel) -> nn.Module:
    """The layer that makes logits."""
    return cast(nn.Module, model.get_output_embeddings())


def hf_get_hidden_size(config: Any) -> int:
    """Width of the hidden states."""
    return int(config.get_text_config(decoder=True).hidden_size)


def hf_get_num_hidden_layers(config: Any) -> int:
    """Number of blocks."""
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def logprobs_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label: logits (B, T, V) and labels (B, T), already shifted, to (B, T)."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def whiten(xs: Tensor, shift_mean: bool = True, distributed: bool = True) -> Tensor:
    """Mean 0 and standard deviation 1 over all entries; without `shift_mean`, the mean stays."""
    everywhere = torch.ones_like(xs, dtype=torch.bool)
    whitened = _whiten(xs, everywhere)
    return whitened if shift_mean else whitened + masked_moments(xs, everywhere).mean.to(xs.dtype)


def get_tensor_stats(xs: Tensor, mask: Tensor, n: int | Tensor) -> dict[str, float]:
    """mean, min, max and std of the masked entries, of which there are n."""
    mean = (xs * mask).sum() / n
    inside = mask.bool()
    return {
        "mean": float(mean),
        "min": float(xs.masked_fill(~inside, torch.inf).min()),
        "max": float(xs.masked_fill(~inside, -torch.inf).max()),
        "std": float((((xs - mean) * mask).square().sum() / n).sqrt()),
    }


def flatten_dict(d: Mapping[str, Any], parent_key: str = "", sep: str = "/") -> dict[str, Any]:
    """Nested dicts as one, with joined names."""
    flat: dict[str, Any] = {}
    for key, value in d.items():
        name = f"{parent_key}{sep}{key}" if parent_key else key
        flat |= flatten_dict(value, name, sep) if isinstance(value, Mapping) else {name: value}
    return flat
