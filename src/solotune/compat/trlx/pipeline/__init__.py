"""Pipelines by name, and micro-batches."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset

from solotune.trainers.registry import register_pipeline as register_datapipeline

__all__ = ["BasePipeline", "MiniBatchIterator", "register_datapipeline"]

log = logging.getLogger("solotune")


class BasePipeline(Dataset):
    """Base of pipelines: a sequence of encoded prompts."""


class MiniBatchIterator:
    """Cuts each batch of a loader into at most `num_mb` micro-batches of `mb_size` rows, and yields them as a list.

    A batch is a mapping or a dataclass of sequences; the last micro-batches may be short, or missing.
    """

    def __init__(self, data_loader: Iterable[Any], mb_size: int, num_mb: int) -> None:
        self._batches, self._size, self._count = iter(data_loader), mb_size, num_mb

    def __iter__(self) -> Iterator[list[Any]]:
        return self

    def __next__(self) -> list[Any]:
        batch = next(self._batches)
        fields = batch if isinstance(batch, Mapping) else vars(batch)
        rows = len(next(iter(fields.values())))
        if rows < self._size * self._count:
            log.warning(
                "a batch of %d rows makes fewer or shorter micro-batches than %dx%d", rows, self._count, self._size
            )
        starts = range(0, min(rows, self._size * self._count), self._size)
        if not starts:
            raise StopIteration
        return [_rows(batch, fields, slice(start, start + self._size)) for start in starts]


def _rows(batch: Any, fields: Mapping[str, Any], rows: slice) -> Any:
    part = {name: values[rows] for name, values in fields.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **part)
    return type(batch)(part)  # type: ignore[call-arg]  # a dict, or transformers' BatchEncoding
