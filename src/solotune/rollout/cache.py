"""Key/value caches with their memory taken once: one whose rows can be dropped while sampling goes on, and the layer of
one in which every step has the same shape."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer


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


class FixedLayer(CacheLayerMixin):
    """Keys and values of all positions of one block, (b, heads, S, width).

    A prompt is written from the start and returned alone; a step is written at `slot_1` and all positions are returned,
    of which the mask hides those that hold nothing yet.
    """

    is_sliding = False

    def __init__(self, n_rows: int, capacity: int, slot_1: Tensor):
        super().__init__()
        self._n_rows, self._capacity, self._slot_1 = n_rows, capacity, slot_1
        self.is_stepping = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, because a mask hides a number and not a NaN.
        self.keys, self.values = (
            states.new_zeros((self._n_rows, states.shape[1], self._capacity, states.shape[-1]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, width = key_states.shape[0], key_states.shape[-2]
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys[:rows], self.values[:rows]
        if self.is_stepping:
            keys.index_copy_(2, self._slot_1, key_states)
            values.index_copy_(2, self._slot_1, value_states)
            return keys, values
        keys[:, :, :width] = key_states
        values[:, :, :width] = value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # of a prompt; a step brings its own masks

    def get_max_length(self) -> int:
        return self._capacity

    get_max_cache_shape = get_max_length  # its name in transformers 5.17

    def move_rows(self, sources_b: Tensor) -> None:
        """Row i becomes what row `sources_b[i]` is."""
        for states in (self.keys, self.values):
            assert states is not None
            states[: len(sources_b)] = states[sources_b]
