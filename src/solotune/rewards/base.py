"""The model that a reward model starts from, and the identity of a training."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from solotune.data.assets import resolve
from solotune.data.ratings import Pairs, Ratings
from solotune.errors import ModelError
from solotune.models.adapters import switch_off_dropout
from solotune.models.split import Decoder
from solotune.rewards.card import PACKAGES

if TYPE_CHECKING:
    from solotune.config import RewardTrainingConfig

_PROCEDURE = 2  # raise it when training changes in a way that gives another model


def fingerprint(cfg: "RewardTrainingConfig", feedback: Ratings | Pairs) -> str:
    """A hex digest of what a trained reward model depends on: settings, feedback, base model, library versions."""
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name != "output_dir"}
    base = Path(resolve(cfg.base))
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in base.iterdir()) if base.is_dir() else []
    if cfg.base.startswith("asset:"):
        files = []  # an asset is what it is called, wherever and whenever it was unpacked
    versions = {name: version(name) for name in PACKAGES}
    content = json.dumps([_PROCEDURE, settings, feedback, files, versions], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def load_base(
    name: str, device: torch.device, num_layers_unfrozen: int = -1
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder or causal LM in float32 with a new scalar head, without dropout, and its tokenizer with a pad token.

    Args:
        num_layers_unfrozen: only so many of the last blocks, and what lies above them, require gradients; -1: all.
    Raises:
        ModelError: it is not found, has no safetensors, has fewer blocks, or its architecture has no sequence
            classification.
    """
    path = resolve(name)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=1,
                id2label={0: "score"},
                label2id={"score": 0},
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
            )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"reward.training.base = {name!r} cannot be loaded: {reason} (it has to be an encoder or a causal language "
            "model with safetensors weights: a folder, a name on a model hub that can be reached, or asset:minilm-l6)"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"reward.training.base = {name!r}: its tokenizer has neither a pad nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders pool at the last token that is not padding
    switch_off_dropout(model)
    if num_layers_unfrozen != -1:
        _freeze_below(model, num_layers_unfrozen)
    return model.to(device), tokenizer


def _freeze_below(model: PreTrainedModel, n_blocks: int) -> None:
    decoder = Decoder(model)
    if n_blocks > len(decoder.blocks):
        raise ModelError(
            f"reward.training.num_layers_unfrozen = {n_blocks}: {type(model).__name__} has {len(decoder.blocks)} blocks"
        )
    trained = {id(p) for module in decoder.final_norms.values() for p in module.parameters()}
    trained |= {id(p) for block in decoder.blocks[-n_blocks:] for p in block.parameters()}
    is_above = False
    for name, parameter in model.named_parameters():
        if name.startswith(f"{decoder.blocks_name}."):
            is_above = True  # what is declared behind the blocks reads them: a pooler, the score
            parameter.requires_grad_(id(parameter) in trained)
        else:
            parameter.requires_grad_(is_above or id(parameter) in trained)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A new head is what is wanted here: no warning that it is new."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
