"""Tiny random models of every supported architecture and a byte tokenizer: no network, milliseconds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from solotune.config import TRLConfig

VOCABULARY = 259  # 256 bytes, <pad>, <bos>, <eos>
PAD, BOS, EOS = 256, 257, 258

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_LLAMA = {
    **_COMMON,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_GEMMA = {**_LLAMA, "head_dim": 8, "sliding_window": 6}
_GPT = {**_COMMON, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}

ARCHITECTURES: dict[str, dict] = {
    "opt": {
        **_COMMON,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
    },
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neo": {
        **_COMMON,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 6,
        "max_position_embeddings": 128,
    },
    "gpt_neox": {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    "bloom": {**_COMMON, "hidden_size": 32, "n_layer": 4, "n_head": 4},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 6},
    "qwen2": {**_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {**_LLAMA, "head_dim": 8},
    "phi": {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


def import_path() -> str:
    """PYTHONPATH for a process that imports what this one does."""
    return os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))


def tiny_config(architecture: str = "opt", **changes: object) -> PreTrainedConfig:
    return transformers.AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})


def tiny_lm(architecture: str = "opt", seed: int = 0, spread: float = 4.0, **changes: object) -> PreTrainedModel:
    """Random weights, wide enough that tokens differ clearly in probability."""
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes))
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return lm.eval()


def byte_tokenizer(pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """One token a byte, ids as in this module; no special tokens are added to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token=pad, padding_side="left"
    )


def save_tiny(folder: Path, architecture: str = "opt", **changes: object) -> Path:
    """A model and its tokenizer in one folder, as a hub would give them."""
    tiny_lm(architecture, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny_ppo_config(folder: Path, **sections: dict) -> TRLConfig:
    """A round in milliseconds: 8 rollouts of 6 tokens, 2 epochs in batches of 4, LoRA on the last two blocks."""
    from solotune.config import PPOConfig, default_ppo_config  # not at the top: benchmarks/gpu.py has no pydantic

    config = default_ppo_config().evolve(
        train={
            "seq_length": 32,
            "batch_size": 4,
            "epochs": 2,
            "total_steps": 1000,
            "eval_interval": 4,
            "checkpoint_interval": 4,
            "checkpoint_dir": str(folder.parent / "runs"),
            "run_name": "tiny",
            "seed": 7,
        },
        model={
            "model_path": str(folder),
            "num_layers_unfrozen": 2,
            "delta_kwargs": {"delta_type": "lora", "modified_modules": "attention", "lora_r": 4},
        },
        tokenizer={"tokenizer_path": str(folder)},
        optimizer={"kwargs": {"lr": 1e-2}},
        method={"num_rollouts": 8, "chunk_size": 8, "ppo_epochs": 2, "gen_kwargs": {"max_new_tokens": 6}},
    )
    assert isinstance(config.method, PPOConfig)
    return config.evolve(**sections) if sections else config


def tiny_offline_config(folder: Path, kind: str, **sections: dict) -> TRLConfig:
    """SFT or ILQL in milliseconds: the last two blocks, batches of 4, at most 12 steps."""
    from solotune.config import default_ilql_config, default_sft_config

    config = (default_sft_config() if kind == "sft" else default_ilql_config()).evolve(
        train={
            "seq_length": 32,
            "batch_size": 4,
            "epochs": 100,
            "total_steps": 12,
            "eval_interval": 6,
            "checkpoint_interval": 4,
            "checkpoint_dir": str(folder.parent / "runs"),
            "run_name": "tiny",
            "seed": 7,
        },
        model={"model_path": str(folder), "num_layers_unfrozen": 2},
        tokenizer={"tokenizer_path": str(folder)},
        optimizer={"kwargs": {"lr": 3e-3}},
        method={"gen_kwargs": {"max_new_tokens": 6}},
    )
    return config.evolve(**sections) if sections else config
