"""Rewards from a text-classification model: the probability of a label, or a reward model's score."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from solotune.data.assets import resolve
from solotune.errors import ConfigError, ModelError
from solotune.models.products import use_fastest_products
from solotune.rewards.batching import logits
from solotune.rewards.card import CARD_FILE, read_card

Transform = Literal["none", "sigmoid"]
_LONGEST = 4096  # tokens; where neither tokenizer nor model names a limit


class TextReward:
    """A reward function made of a model with a classification head; call it like any other reward function.

    Args:
        column: which logit is meant.
        kind: what is returned of it: "probability" (among all labels, or of this one where labels do not exclude each
            other), "logit", or "sigmoid" of the logit.
        offset: added to the logit first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        column: int = 0,
        kind: Literal["probability", "logit", "sigmoid"] = "logit",
        batch_size: int = 32,
        offset: float = 0.0,
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.column, self.kind, self.batch_size, self.offset = column, kind, batch_size, offset
        self.max_length = length_limit(model, tokenizer)
        self.__name__ = f"classifier {model.name_or_path}"

    def __call__(self, samples: Sequence[str], **_: Any) -> list[float]:
        """One reward per sample; samples longer than the model can read are cut at the tokenizer's truncation side."""
        logits_BL = logits(self.model, self.tokenizer, samples, self.max_length, self.batch_size)
        return self._reward(logits_BL).tolist()

    def _reward(self, logits_BL: Tensor) -> Tensor:
        if self.kind == "probability":
            exclusive = self.model.config.problem_type != "multi_label_classification"
            probabilities_BL = logits_BL.softmax(-1) if exclusive else logits_BL.sigmoid()
            return probabilities_BL[:, self.column]
        score_B = logits_BL[:, self.column] + self.offset
        return score_B.sigmoid() if self.kind == "sigmoid" else score_B


def load_classifier(
    name: str,
    label: str,
    transform: Transform | None = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> TextReward:
    """A Hugging Face text-classification model as a reward: P(label), or its logit (`transform="none"`).

    A model with one output has a score instead of probabilities; it is taken as it is, or through a sigmoid.

    Raises:
        ConfigError: the model has no such label (its labels are listed).
        ModelError: the model is not found, has no safetensors, or no classification head.
    """
    model, tokenizer = _load(name, device, "reward.classifier")
    labels = {int(index): text for index, text in (model.config.id2label or {}).items()}
    column = _find_label(labels, label, name)
    if transform == "sigmoid":
        kind = "sigmoid"
    else:
        kind = "logit" if transform == "none" or model.config.num_labels == 1 else "probability"
    return TextReward(model, tokenizer, column, kind, batch_size)


def load_reward_model(
    folder: str | Path,
    transform: Transform | None = "sigmoid",
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> TextReward:
    """A reward model that `solotune reward` saved; its score, through a sigmoid unless `transform` is "none".

    Raises:
        ModelError: the folder does not hold one.
    """
    if not (Path(folder) / CARD_FILE).is_file():
        raise ModelError(
            f"reward.model = {str(folder)!r}: there is no {CARD_FILE} in it, so it is not a reward model that solotune "
            "trained; name any other text-classification model under reward.classifier, with reward.label"
        )
    model, tokenizer = _load(str(folder), device, "reward.model")
    kind = "logit" if transform == "none" else "sigmoid"
    return TextReward(model, tokenizer, 0, kind, batch_size, offset=read_card(folder)["offset"])


def length_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the model can read."""
    positions = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= 2  # their positions start after the padding index
    return min(tokenizer.model_max_length, positions, _LONGEST)


def _load(name: str, device: str | torch.device, setting: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    use_fastest_products(device)
    path = resolve(name)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{setting} = {name!r} cannot be loaded: {reason} (it has to be a text-classification model with "
            "safetensors weights: a folder, or a name on a model hub that can be reached)"
        ) from error
    if info["missing_keys"]:
        raise ModelError(
            f"{setting} = {name!r} is not a text-classification model: its weights lack "
            f"{', '.join(sorted(info['missing_keys'])[:4])}, which would be random"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # decoders pool at the last token that is not padding
    return model.to(torch.device(device)), tokenizer


def _find_label(labels: dict[int, str], wanted: str, name: str) -> int:
    exact = [index for index, text in labels.items() if text == wanted]
    found = exact or [index for index, text in labels.items() if text.casefold() == wanted.casefold()]
    if len(found) != 1:
        raise ConfigError(
            f"reward.label = {wanted!r}: {name!r} has no such label; its labels are {', '.join(labels.values())}"
        )
    return found[0]
