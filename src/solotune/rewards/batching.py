"""Texts to padded batches, and a model's logits for many texts.

Shape suffixes: B batch, T tokens of a batch's longest text, N all texts, L labels (1 for a score).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of each text with the tokenizer's special tokens, cut to `max_length`."""
    if not texts:  # which tokenizers do not take
        return []
    return tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B, T), padded on the right.

    A row of no tokens (an empty text under a tokenizer without special tokens) becomes one attended padding token.
    """
    width = max(1, *map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : max(1, len(row))] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's, or 0 where it has none (what is padded is masked)."""
    pad_id = tokenizer.pad_token_id
    return pad_id if isinstance(pad_id, int) else 0


def by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Batches of indices, shortest texts first, so that little is padding: at most `max_tokens` a batch, padding
    included, and at least one text."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * max(1, lengths[index]) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    batch_size: int,
) -> Tensor:
    """Logits (N, L) in float32 on the CPU, in the order of `texts`, read in batches by length.

    A batch has as many tokens as `batch_size` of the longest texts, so more texts where they are shorter.
    One pass in evaluation mode, whatever the model's mode, and one copy to the host.
    """
    rows = tokenize(texts, tokenizer, max_length)
    was_training = model.training
    model.eval()
    order: list[int] = []
    parts: list[Tensor] = []
    for batch in by_length([len(row) for row in rows], batch_size * max(map(len, rows), default=0)):
        order += batch
        parts.append(model(**pad([rows[i] for i in batch], pad_id_of(tokenizer), model.device)).logits.float())
    model.train(was_training)
    if not parts:
        return torch.empty(0, model.config.num_labels or 1)
    out_NL = torch.cat(parts)
    result_NL = torch.empty_like(out_NL)
    result_NL[torch.tensor(order, device=out_NL.device)] = out_NL
    return result_NL.cpu()
