"""`PromptPipeline`, and the samples of offline methods as trlX kept them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from solotune.compat.shims import absent
from solotune.compat.trlx.pipeline import BasePipeline
from solotune.data.dialogues import Phrase, tokenize_dialogue
from solotune.data.prompts import Prompts, encode

__all__ = [
    "DialogMessage",
    "DialogStore",
    "ILQLRolloutStorage",
    "ILQLSeq2SeqRolloutStorage",
    "PromptPipeline",
    "tokenize_dialogue",
]

_STORE = "solotune.data.dialogues.encode_samples makes the samples, and trainers.ilql their rewards"
ILQLRolloutStorage = absent("ILQLRolloutStorage", _STORE)
ILQLSeq2SeqRolloutStorage = absent("ILQLSeq2SeqRolloutStorage", _STORE)
DialogMessage = Phrase
"""A phrase: `is_output` and `tokens`."""


class DialogStore(BasePipeline):
    """Tokenised dialogues with labels: -100 where nothing is to be learned."""

    def __init__(self, dialogs: list[list[DialogMessage]], tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.history = [
            {
                "input_ids": [token for phrase in dialog for token in phrase.tokens],
                "labels": [token if phrase.is_output else -100 for phrase in dialog for token in phrase.tokens],
            }
            for dialog in dialogs
        ]

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.history[index]
        return {**row, "attention_mask": [1] * len(row["input_ids"])}

    def __len__(self) -> int:
        return len(self.history)

    def create_loader(self, batch_size: int, shuffle: bool = False) -> DataLoader:
        """Batches of padded `input_ids`, `attention_mask` and `labels`."""
        pad = DataCollatorWithPadding(self.tokenizer)

        def collate(items: list[dict[str, list[int]]]) -> Any:
            batch = pad([{key: item[key] for key in ("input_ids", "attention_mask")} for item in items])
            width, on_left = batch["input_ids"].shape[1], self.tokenizer.padding_side == "left"
            rows = []
            for item in items:
                padding = [-100] * (width - len(item["labels"]))
                rows.append(padding + item["labels"] if on_left else item["labels"] + padding)
            batch["labels"] = torch.tensor(rows)
            return batch

        return DataLoader(self, batch_size, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]


class PromptPipeline(BasePipeline):
    """Encoded prompts: texts, or dicts with the key "prompt" whose other keys go along. The dicts are not changed.

    Raises:
        DataError: a prompt is empty, or longer than `max_prompt_length` (trlX cut it in silence).
    """

    def __init__(
        self, prompts: list[Any], max_prompt_length: int, tokenizer: Any, add_special_tokens: bool = False
    ) -> None:
        given = Prompts.from_list(list(prompts))
        self.tokenizer, self.metadata = tokenizer, given.metadata
        # trlX asked for special tokens for encoder-decoders alone, whose inputs end with an EOS.
        self.prompts = encode(given, tokenizer, max_prompt_length, add_special_tokens, goes_on=not add_special_tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.prompts[index]
        own = {name: values[index] for name, values in self.metadata.items()}
        return {"input_ids": ids, "attention_mask": [1] * len(ids), **own}

    def __len__(self) -> int:
        return len(self.prompts)

    def create_loader(
        self, batch_size: int, shuffle: bool = False, sampler: Any = None, drop_last: bool = False
    ) -> DataLoader:
        """Batches of left-padded `input_ids` and `attention_mask`, and lists of metadata."""
        pad = DataCollatorWithPadding(self.tokenizer)

        def collate(items: list[dict[str, Any]]) -> Any:
            batch = pad([{key: item[key] for key in ("input_ids", "attention_mask")} for item in items])
            for name in self.metadata:
                batch[name] = [item[name] for item in items]
            return batch

        return DataLoader(self, batch_size, shuffle=shuffle, sampler=sampler, drop_last=drop_last, collate_fn=collate)
