"""`PromptPipeline`; the pipelines of offline methods are not there yet."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from solotune.compat.shims import absent
from solotune.compat.trlx.pipeline import BasePipeline
from solotune.data.prompts import Prompts, encode

__all__ = [
    "DialogMessage",
    "DialogStore",
    "ILQLRolloutStorage",
    "ILQLSeq2SeqRolloutStorage",
    "PromptPipeline",
    "tokenize_dialogue",
]

_REASON = "offline methods (ILQL, SFT) are not there yet"
DialogMessage = absent("DialogMessage", _REASON)
DialogStore = absent("DialogStore", _REASON)
ILQLRolloutStorage = absent("ILQLRolloutStorage", _REASON)
ILQLSeq2SeqRolloutStorage = absent("ILQLSeq2SeqRolloutStorage", _REASON)
tokenize_dialogue = absent("tokenize_dialogue", _REASON)


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
        self.prompts = encode(given, tokenizer, max_prompt_length, add_special_tokens)

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
