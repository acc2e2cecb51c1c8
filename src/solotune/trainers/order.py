"""Which prompts a round samples and in which order it learns: functions of a seed and a position, with no state."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """Streams of random numbers under one seed (the second word of a Philox key)."""

    ROLLOUTS = 0
    EVALUATION = 1
    PROMPTS = 2
    MINIBATCHES = 3
    REWARDS = 4
    METRICS = 5


class PromptOrder:
    """An endless sequence of prompt indices: one shuffled pass over the data after another."""

    def __init__(self, n_prompts: int, seed: int):
        self._n, self._seed = n_prompts, seed
        self._pass, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        """Index of the prompt at a position counted from the start of training."""
        which, within = divmod(position, self._n)
        if which != self._pass:
            self._pass, self._order = which, _permutation(self._n, self._seed, Stream.PROMPTS, which)
        return int(self._order[within])


def minibatches(n_rows: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Row indices of the batches of a shuffled pass over a round's rollouts; `epoch` counts from the first round on."""
    order = torch.from_numpy(_permutation(n_rows, seed, Stream.MINIBATCHES, epoch))
    return list(order.split(batch_size))


def even_batches(n_rows: int, n_batches: int, seed: int, epoch: int) -> list[Tensor]:
    """Row indices of a shuffled pass in so many batches, whose sizes differ by one at most; some may be empty."""
    order = torch.from_numpy(_permutation(n_rows, seed, Stream.MINIBATCHES, epoch))
    return list(order.tensor_split(n_batches)) if n_batches else []


def _permutation(n: int, seed: int, stream: Stream, counter: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, int(stream)], counter=[0, 0, counter, 0]))
    return generator.permutation(n)
