"""From a configuration to a `PolicyModel` and a tokenizer."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from solotune.data.assets import resolve
from solotune.errors import MissingExtraError, ModelError
from solotune.models.adapters import (
    check_block_count,
    lora_config,
    select_trainable,
    switch_off_dropout,
    to_trainable_dtype,
)
from solotune.models.critic import ValueBranch
from solotune.models.ilql import ILQLModel
from solotune.models.offline import OfflineModel
from solotune.models.policy import PolicyModel
from solotune.models.seq2seq import Seq2SeqPolicy
from solotune.models.seq2seq_offline import Seq2SeqILQLModel, Seq2SeqOfflineModel
from solotune.models.split import Decoder
from solotune.version import __version__

if TYPE_CHECKING:
    from solotune.config import ModelConfig, TokenizerConfig, TRLConfig

log = logging.getLogger("solotune")

ENCODER_DECODERS = ("bart", "mt5", "t5", "umt5")
"""Encoder-decoders whose resumed decoder is tested to give what their own forward gives."""


def build_policy(
    config: TRLConfig,
    device: torch.device | str = "cpu",
    meta: bool = False,
    meta_dtype: torch.dtype = torch.float32,
    tokens_C: Tensor | None = None,
) -> PolicyModel:
    """Load the model a configuration names, add its adapter, mark what is trained, and split it.

    Args:
        config: only `model`, `train.gradient_checkpointing` and, of the method, what it needs are read.
        device: where the weights go.
        meta: build the same modules without weights, on the meta device, the frozen ones in `meta_dtype`.
        tokens_C: for ILQL, the tokens that the data choose; default every one.
    Raises:
        ModelError: the model is not found, has no safetensors, has too few blocks, or the adapter does not fit.
    """
    model = config.model
    lm = _empty_model(model, meta_dtype) if meta else _load(model, dtype_of(model, device), device)
    decoder = Decoder(lm)
    check_block_count(model.num_layers_unfrozen, decoder)
    value_branch = _value_branch(config, decoder)
    adapter = lora_config(model.delta_kwargs, model.peft_config, model.num_layers_unfrozen, decoder)
    method = config.method
    backbone: Any = lm
    if adapter is None:
        if model.num_layers_unfrozen == 0 and method.HEADS != "q":  # its heads train all the same
            raise ModelError(
                "model.num_layers_unfrozen is 0 and there is no LoRA: nothing would train; allowed are -1, 1 or more "
                "blocks, or 0 with peft_config"
            )
        select_trainable(decoder, model.num_layers_unfrozen)
    else:
        lm.requires_grad_(False)
        # peft asks transformers for it under the old name; nothing a user could change
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # peft sets it right itself
        try:
            backbone = get_peft_model(lm, adapter)
        except ValueError as error:
            raise ModelError(f"model.peft_config does not fit {type(lm).__name__}: {error}") from error
    for module in [backbone, value_branch] if value_branch is not None else [backbone]:
        switch_off_dropout(module)
        to_trainable_dtype(module)
    if not any(p.requires_grad for p in backbone.parameters()) and (adapter is not None or method.HEADS != "q"):
        raise ModelError("nothing would train: the adapter touches no tensor of the model; see model.peft_config")
    two_qs, checkpointing = bool(getattr(config.method, "two_qs", True)), config.train.gradient_checkpointing
    if method.HEADS == "q":
        return (Seq2SeqILQLModel if model.is_seq2seq else ILQLModel)(backbone, two_qs, checkpointing, tokens_C)
    if not method.samples_itself:
        return (Seq2SeqOfflineModel if model.is_seq2seq else OfflineModel)(backbone, checkpointing)
    return (Seq2SeqPolicy if model.is_seq2seq else PolicyModel)(
        backbone,
        checkpointing,
        value_branch=value_branch,
        has_reference=method.HAS_REFERENCE,
        has_critic=method.HEADS == "value",
    )


def _value_branch(config: TRLConfig, decoder: Decoder) -> ValueBranch | None:
    n_blocks = getattr(config.method, "num_value_layers_unfrozen", 0)
    if n_blocks and config.model.is_seq2seq:
        raise ModelError(
            f"method.num_value_layers_unfrozen = {n_blocks}: an encoder-decoder's critic has no blocks of its own; "
            "allowed is 0 (it reads the policy)"
        )
    if n_blocks >= len(decoder.blocks):
        raise ModelError(
            f"method.num_value_layers_unfrozen = {n_blocks}, but {type(decoder.lm).__name__} has "
            f"{len(decoder.blocks)} blocks; allowed are 0 (the critic reads the policy) to {len(decoder.blocks) - 1}"
        )
    return ValueBranch(decoder, n_blocks) if n_blocks else None


def load_tokenizer(config: TokenizerConfig) -> Any:
    """The tokenizer, padding on the left. Without a pad token it pads with EOS: masks, not ids, say what is padding.

    Raises:
        ModelError: it is not found.
    """
    path = resolve(config.tokenizer_path)
    options = {"truncation_side": config.truncation_side, **config.tokenizer_extra_configs}
    options["trust_remote_code"] = _trusts_code(options, "tokenizer.tokenizer_extra_configs", config.tokenizer_path)
    options["padding_side"] = "left"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"tokenizer.tokenizer_path {config.tokenizer_path!r} cannot be loaded: {_first_line(error)}"
        ) from error
    if tokenizer.pad_token_id is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token
        if stand_in is None:
            raise ModelError(
                f"tokenizer.tokenizer_path {config.tokenizer_path!r} has no pad, EOS or unknown token to pad with; set "
                "one in tokenizer.tokenizer_extra_configs, such as pad_token: '<pad>'"
            )
        tokenizer.pad_token = stand_in
    return tokenizer


def dtype_of(model: ModelConfig, device: torch.device | str) -> torch.dtype | str:
    """What the frozen weights are kept in: bf16 on CUDA, fp32 on a CPU, or what `model_extra_configs.dtype` says.

    `bfloat16_if_native` is bf16 where the processor multiplies it in hardware: elsewhere it is emulated, far slower.
    """
    given = model.model_extra_configs.get("dtype", model.model_extra_configs.get("torch_dtype"))
    is_cuda = torch.device(device).type == "cuda"
    if given is None:
        return torch.bfloat16 if is_cuda else torch.float32
    if given == "bfloat16_if_native":
        return torch.bfloat16 if is_cuda or torch.cpu._is_avx512_bf16_supported() else torch.float32
    if isinstance(given, torch.dtype) or given == "auto":
        return given
    dtype = getattr(torch, str(given), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(
            f"model.model_extra_configs.dtype is {given!r}; allowed are float32, bfloat16, bfloat16_if_native, float16 "
            "and auto"
        )
    return dtype


def _load(model: ModelConfig, dtype: torch.dtype | str, device: torch.device | str) -> PreTrainedModel:
    given = model.model_path
    if isinstance(given, PreTrainedModel):
        auto_class(given.config, model.model_arch_type)
        return given.to(device)  # type: ignore[arg-type]
    options = {k: v for k, v in model.model_extra_configs.items() if k not in ("dtype", "torch_dtype")}
    options["trust_remote_code"] = _trusts_code(options, "model.model_extra_configs", given)
    if model.quantization is not None:
        options |= _quantized(model.quantization, dtype, device)
    if isinstance(given, PretrainedConfig):
        lm: Any = auto_class(given, model.model_arch_type).from_config(given, dtype=dtype, **options)
        return lm.to(device)
    path = resolve(given)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=options["trust_remote_code"])
        kind = auto_class(config, model.model_arch_type)
        lm = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
    except ModelError:  # a ValueError as well
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(_load_failure(given, error)) from error
    if model.quantization is None:
        return lm.to(torch.device(device))
    for module in lm.modules():  # in evaluation mode on a CPU they would take a kernel that has no gradient
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return lm  # bitsandbytes has placed it


def _trusts_code(extra_configs: dict[str, Any], section: str, path: Any) -> bool:
    """Whether Python files that come with a model may run, which is said where they may."""
    trusts_code = bool(extra_configs.get("trust_remote_code", False))
    if trusts_code:
        log.warning("%s.trust_remote_code is true: Python files in %r run with your rights", section, str(path))
    return trusts_code


def _quantized(quantization: str, dtype: torch.dtype | str, device: torch.device | str) -> dict[str, Any]:
    """What makes from_pretrained keep linear layers (not the LM head) in 4 or 8 bits, multiplied in `dtype`.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            f"model.quantization {quantization!r} needs bitsandbytes: pip install 'solotune[quant]'"
        )
    if quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        )
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}


def _load_failure(path: str, error: Exception) -> str:
    reason = _first_line(error)
    if "safetensors" in str(error) and "model_type" not in str(error):
        return (
            f"model.model_path {path!r} has no safetensors weights ({reason}); allowed are models in safetensors "
            "(pickled weights can run code when they are read): convert it once with save_pretrained()"
        )
    return (
        f"model.model_path {path!r} cannot be loaded: {reason}. Allowed are a folder with config.json and safetensors, "
        "or a model's name on the hub (HF_HUB_OFFLINE=1 allows only cached ones)"
    )


def _first_line(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "Python files come with it; trust_remote_code: true among its extra_configs lets them run with your rights"
        )
    return str(error).strip().split("\n")[0]


def _empty_model(model: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    given = model.model_path
    if isinstance(given, PreTrainedModel):
        config = given.config
    elif isinstance(given, PretrainedConfig):
        config = given
    elif model.architecture is not None:
        options = dict(model.architecture)
        model_type = options.pop("model_type")
        try:
            config = AutoConfig.for_model(model_type, **options)
        except ValueError as error:
            raise ModelError(
                f"model.architecture.model_type {model_type!r} is unknown: {_first_line(error)}"
            ) from error
    else:
        try:
            trusts_code = _trusts_code(model.model_extra_configs, "model.model_extra_configs", given)
            config = AutoConfig.from_pretrained(resolve(given), trust_remote_code=trusts_code)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.model_path {given!r}: no configuration found ({_first_line(error)}); give a folder with a "
                "config.json, a name on the hub, or a model.architecture mapping"
            ) from error
    with torch.device("meta"):
        return auto_class(config, model.model_arch_type).from_config(config, dtype=dtype)


def auto_class(config: PretrainedConfig, arch_type: str | None = None) -> Any:
    """The class that loads a model of this configuration: an encoder-decoder's, or a causal language model's.

    Raises:
        ModelError: it is not of the kind that `model.model_arch_type` says, or an encoder-decoder of another kind than
            those below.
    """
    found = "seq2seq" if config.is_encoder_decoder else "causal"
    if arch_type not in (None, found):
        kind = "an encoder-decoder" if config.is_encoder_decoder else "a causal language model"
        raise ModelError(
            f"model.model_arch_type is {arch_type!r}, but model.model_path is {kind} ({config.model_type}); set it to "
            f"{found!r}, or name another model"
        )
    if arch_type == "seq2seq" and config.model_type not in ENCODER_DECODERS:
        raise ModelError(
            f"model.model_path: encoder-decoders of the kind {config.model_type!r} are not supported; allowed are "
            f"{', '.join(ENCODER_DECODERS)} (T5 1.1 and Flan-T5 are of the kind t5)"
        )
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    import accelerate
    import peft

    return {
        "solotune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
    }
