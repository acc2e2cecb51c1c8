"""Tiny random encoder-decoders over the byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import BOS, EOS, PAD, VOCABULARY, byte_tokenizer, tiny_ppo_config

if TYPE_CHECKING:
    from solotune.config import TRLConfig

_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "feed_forward_proj": "relu",
}
_GATED = {**_T5, "feed_forward_proj": "gated-gelu"}
KINDS: dict[str, tuple[str, dict]] = {
    "t5": ("t5", _T5),
    "t5 1.1": ("t5", {**_GATED, "tie_word_embeddings": False}),  # and a head of its own, below
    "mt5": ("mt5", _GATED),
    "umt5": ("umt5", _GATED),
    "bart": (
        "bart",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": None,
        },
    ),
}
"""Three decoder blocks above two of the encoder, so that no number can be taken for another."""


def tiny_seq2seq(kind: str = "t5", seed: int = 0, **changes: object) -> PreTrainedModel:
    """Random weights, wide enough that tokens differ clearly in probability and positions matter."""
    torch.manual_seed(seed)
    model_type, options = KINDS[kind]
    config = transformers.AutoConfig.for_model(model_type, **{**options, **changes})
    lm = AutoModelForSeq2SeqLM.from_config(config)
    if kind == "t5 1.1":  # transformers ties the two, unless a checkpoint holds both
        lm.lm_head.weight = torch.nn.Parameter(torch.randn(lm.lm_head.weight.shape) * 0.4)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_(0, 2.0)
            elif "shared" in name and kind != "bart":
                parameter.normal_(0, 2.0 if getattr(config, "scale_decoder_outputs", False) else 0.4)
            elif parameter.dim() > 1 and name != "lm_head.weight":
                parameter.mul_(4.0 if kind == "bart" else 1.5)
    return lm.eval()


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer, which here ends every text with EOS as T5's does."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    return tokenizer


def save_tiny_seq2seq(folder: Path, kind: str = "t5", **changes: object) -> Path:
    """A model and its tokenizer in one folder, as a hub would give them."""
    tiny_seq2seq(kind, **changes).save_pretrained(folder)
    ending_tokenizer().save_pretrained(folder)
    return folder


def tiny_seq2seq_config(folder: Path, **sections: dict) -> TRLConfig:
    """As `tiny_ppo_config`, for an encoder-decoder."""
    config = tiny_ppo_config(folder, model={"model_arch_type": "seq2seq"})
    return config.evolve(**sections) if sections else config
