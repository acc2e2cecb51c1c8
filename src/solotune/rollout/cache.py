"""A key/value cache with its memory taken once, whose rows can be dropped while sampling goes on."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values (B, heads, time, width) written into one buffer; transformers' own layer copies all of it a step.

    It keeps every position, also where a model only looks at a sliding window: the model's mask cuts the window.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self._capacity = capacity
        self._length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self._buffers is None:
            self._buffers = (self._empty(key_states), self._empty(value_states))
            self.is_initialized = True
        new_length = self._length + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : new_length] = states
        self._length = new_length
        self.keys, self.values = (buffer[:, :, :new_length] for buffer in self._buffers)
        return self.keys, self.values

    def _empty(self, states: Tensor) -> Tensor:
        return states.new_empty((*states.shape[:-2], self._capacity, states.shape[-1]))

    def get_seq_length(self) -> int:
        return self._length

    def keep_rows(self, rows: Tensor) -> None:
        """Drop every row of the batch but `rows`, (fewer,), ascending; in place, without a second buffer."""
        assert self._buffers is not None
        for buffer in self._buffers:
            for target, source in enumerate(rows.tolist()):
                if target != source:
                    buffer[target, :, : self._length] = buffer[source, :, : self._length]
        keys, values = (buffer[: len(rows)] for buffer in self._buffers)
        self._buffers = (keys, values)
        self.keys, self.values = keys[:, :, : self._length], values[:, :, : self._length]


class SamplingCache(Cache):
    """One `PreallocatedLayer` a block, for at most `capacity` positions."""

    def __init__(self, n_blocks: int, capacity: int):
        super().__init__(layers=[PreallocatedLayer(capacity) for _ in range(n_blocks)])

    def keep_rows(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.keep_rows(rows)  # type: ignore[union-attr]
