"""LoRA from trlX's two generations of settings: `delta_kwargs` (OpenDelta's names) and `peft_config`.

`delta_kwargs` puts LoRA on the last `num_layers_unfrozen` blocks, as trlX 0.4 to 0.6 did; `peft_config` is applied as
PEFT does. Both become a `peft.LoraConfig`, so that what is saved is a standard adapter.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_config
from torch import nn
from transformers.pytorch_utils import Conv1D

from solotune.errors import ModelError
from solotune.models.split import Decoder

log = logging.getLogger("solotune")

PRESETS = ("all", "attention", "mlp")

QKV_ONLY = {"gptj": ("q_proj", "k_proj", "v_proj"), "gpt_neox": ("query_key_value",)}
"""Architectures for which trlX's preset 'attention' leaves the output projection out."""


def lora_config(
    delta_kwargs: dict[str, Any] | None,
    peft_config: dict[str, Any] | PeftConfig | None,
    num_layers_unfrozen: int,
    decoder: Decoder,
) -> LoraConfig | None:
    """The adapter to add, or None where the model itself is trained.

    Raises:
        ModelError: a module name matches nothing, the adapter is not LoRA, or it would train biases (which PEFT does
            not switch off with the adapter, so that the reference would move).
    """
    if peft_config is not None:
        if num_layers_unfrozen != -1:
            log.info(
                "model.num_layers_unfrozen=%s is ignored: model.peft_config says what is trained", num_layers_unfrozen
            )
        return _from_peft(peft_config, _task_type(decoder))
    if delta_kwargs is None:
        return None
    options = dict(delta_kwargs)
    options.pop("delta_type", None)
    modules = options.pop("modified_modules", "all")
    n_blocks = len(decoder.blocks)
    k = n_blocks if num_layers_unfrozen == -1 else num_layers_unfrozen
    names, blocks = _module_names(modules, decoder), range(n_blocks - k, n_blocks)
    where: dict[str, Any] = {
        "target_modules": names,
        "layers_to_transform": list(blocks),
        "layers_pattern": decoder.list_name,
    }
    if decoder.lm.config.is_encoder_decoder:  # PEFT's own pattern would find the encoder's blocks too
        where = {"target_modules": _pattern(decoder.blocks_name, blocks, names)}
    return LoraConfig(
        task_type=_task_type(decoder),
        r=options.pop("lora_r", 8),
        lora_alpha=options.pop("lora_alpha", 16),
        lora_dropout=options.pop("lora_dropout", 0.0),
        **where,
        **options,
    )


def _task_type(decoder: Decoder) -> str:
    return "SEQ_2_SEQ_LM" if decoder.lm.config.is_encoder_decoder else "CAUSAL_LM"


def _pattern(blocks_name: str, blocks: Iterable[int], names: list[str]) -> str:
    """A regular expression for layers of some blocks; a name is a path within a block, or its end."""
    numbers, layers = ("|".join(map(re.escape, map(str, given))) for given in (blocks, names))
    return rf"{re.escape(blocks_name)}\.(?:{numbers})\.(?:.*\.)?(?:{layers})"


def _from_peft(peft_config: dict[str, Any] | PeftConfig, task_type: str) -> LoraConfig:
    if isinstance(peft_config, dict):
        options = {"task_type": task_type, "peft_type": "LORA", **peft_config}
        try:
            config = get_peft_config(options)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"model.peft_config={peft_config!r} is not a PEFT configuration: {error}") from error
    else:
        config = copy.deepcopy(peft_config)
    if not isinstance(config, LoraConfig):
        raise ModelError(f"model.peft_config: peft_type is {config.peft_type}; allowed is LORA")
    if config.task_type is not None and config.task_type != task_type:
        given = getattr(config.task_type, "value", config.task_type)
        raise ModelError(
            f"model.peft_config: task_type is {given!r}, but the model's is {task_type!r}; set that, or leave it out"
        )
    if config.bias != "none":
        raise ModelError(
            f"model.peft_config: bias is {config.bias!r}; allowed is 'none' (PEFT does not switch trained biases off "
            "with the adapter, so the reference model would move)"
        )
    return config


def linear_names(block: nn.Module) -> list[str]:
    """Paths, relative to a block, of the layers LoRA can be put on."""
    return [name for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def _module_names(modules: str | list[str], decoder: Decoder) -> list[str]:
    names = linear_names(decoder.blocks[-1])
    if isinstance(modules, str) and modules in PRESETS:
        in_attention = [name for name in names if "attn" in name.lower() or "attention" in name.lower()]
        if modules == "all":
            return names
        if modules == "mlp":
            return [name for name in names if name not in in_attention]
        only = QKV_ONLY.get(decoder.lm.config.model_type)
        return [name for name in in_attention if only is None or name.rpartition(".")[2] in only]
    wanted = [modules] if isinstance(modules, str) else list(modules)
    for name in wanted:
        if not any(known == name or known.endswith("." + name) for known in names):
            raise ModelError(
                f"model.delta_kwargs.modified_modules: {name!r} is no linear layer of a "
                f"{type(decoder.blocks[-1]).__name__}; allowed are {', '.join(PRESETS)}, or any of {', '.join(names)}"
            )
    return wanted


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability in the model to 0, LoRA's and attention's included.

    The probabilities and not `.eval()`, because gradient checkpointing is active in training mode only. The model's and
    the adapter's configurations keep theirs, so that what is saved is what was loaded.
    """
    lora_dropouts = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            if "lora_dropout" in name:
                lora_dropouts.add(module.p)
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "drop" in attribute and isinstance(value, float) and value > 0:
                setattr(module, attribute, 0.0)
    if lora_dropouts:
        log.info(
            "lora_dropout=%s is kept in the saved adapter's configuration and not applied: with dropout the first "
            "ratio of PPO is not 1",
            ", ".join(str(p) for p in sorted(lora_dropouts)),
        )


def select_trainable(decoder: Decoder, num_layers_unfrozen: int) -> None:
    """Without LoRA: train the last k blocks and the final norm (k > 0), or everything (k = -1).

    Raises:
        ModelError: the model has fewer blocks than k.
    """
    for parameter in decoder.lm.parameters():
        parameter.requires_grad_(num_layers_unfrozen == -1)
    if num_layers_unfrozen > 0:
        for module in [*decoder.blocks[-num_layers_unfrozen:], *decoder.final_norms.values()]:
            for parameter in module.parameters():
                parameter.requires_grad_(True)


def check_block_count(num_layers_unfrozen: int, decoder: Decoder) -> None:
    """Raise ModelError where more blocks are to be trained than the model has."""
    if num_layers_unfrozen > len(decoder.blocks):
        raise ModelError(
            f"model.num_layers_unfrozen is {num_layers_unfrozen}, but {type(decoder.lm).__name__} has "
            f"{len(decoder.blocks)} blocks; allowed are 1 to {len(decoder.blocks)}, or -1 for all"
        )


def to_trainable_dtype(model: nn.Module) -> None:
    """Trained tensors are kept in fp32, whatever the frozen ones are in."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
