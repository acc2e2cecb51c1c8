"""What a frozen trunk makes of given samples, computed once and kept: in memory, or in a memory-mapped file.

Shapes: M positions of the samples, one behind the other, H hidden.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from solotune.data.batches import Batch, collate
from solotune.data.dialogues import Samples
from solotune.errors import ConfigError
from solotune.models.tree import format_bytes
from solotune.progress import Phase, phase_progress

log = logging.getLogger("solotune")


class TrunkCache:
    """The trunk's output at every position of the samples, in the precision it comes out in.

    Args:
        samples: all of them.
        own: the indices of those that are kept here (a process's share).
        hidden_size, dtype: of the trunk's output.
        most_bytes: what it may take of memory; a larger one goes to a file.
        folder: where that file lies, None for the system's temporary folder. It has no name once it is open, so that
            nothing is left of it however the run ends.
    Raises:
        ConfigError: the disk has no room for the file.
    """

    def __init__(
        self,
        samples: Samples,
        own: Iterable[int],
        hidden_size: int,
        dtype: torch.dtype,
        most_bytes: float,
        folder: Path | None = None,
    ):
        self._samples = samples
        # Neighbours in length, in an order that depends on the data alone: what is computed together then does not
        # depend on when it is computed, and a resumed run has the same bits.
        self._by_length = sorted(set(own), key=lambda index: (samples.positions(index), index))
        self._spans: dict[int, slice] = {}
        total = 0
        for index in self._by_length:
            length = samples.positions(index)
            self._spans[index] = slice(total, total + length)
            total += length
        size = total * hidden_size * dtype.itemsize
        self.is_mapped = size > most_bytes
        if self.is_mapped:
            folder = folder or Path(tempfile.gettempdir())
            log.info(
                "the trunk's activations of %d tokens (%s, more than train.trunk_cache_gb) are kept in a file in %s",
                total, format_bytes(size), folder,
            )  # fmt: skip
            self._flat_MH = _mapped(folder, size, dtype).view(total, hidden_size)
        else:
            self._flat_MH = torch.empty(total, hidden_size, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self._flat_MH.nbytes

    def fill(self, trunk_of: Callable[[Batch], Tensor], rows: int, shown: bool = False) -> None:
        """Compute all of it, so many samples at a time.

        Args:
            trunk_of: what the trunk makes of a batch's positions, (M, H).
            shown: say how far it is.
        """
        with phase_progress("frozen trunk", len(self._by_length), "samples", shown=shown) as phase:
            self._fill(trunk_of, rows, phase)

    def _fill(self, trunk_of: Callable[[Batch], Tensor], rows: int, phase: Phase) -> None:
        for first in range(0, len(self._by_length), rows):
            chosen = self._by_length[first : first + rows]
            start, end = self._spans[chosen[0]].start, self._spans[chosen[-1]].stop
            self._flat_MH[start:end] = trunk_of(collate(self._samples, chosen)).to(self._flat_MH.device)
            phase.advance(len(chosen))

    def of(self, chosen: Sequence[int]) -> Tensor:
        """The trunk's output of the samples at `chosen`, one behind the other, (M, H)."""
        return torch.cat([self._flat_MH[self._spans[index]] for index in chosen])


def _mapped(folder: Path, size: int, dtype: torch.dtype) -> Tensor:
    """A tensor in a file that has lost its name already; its room on the disk is taken at once."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="trunk-", dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):  # written past a full disk, a mapped file would kill the process
                os.posix_fallocate(descriptor, 0, size)
            return torch.from_file(name, shared=True, size=size // dtype.itemsize, dtype=dtype)
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):  # Windows keeps the name of an open file
                os.unlink(name)
    except OSError as error:
        raise ConfigError(
            f"the trunk's activations need {format_bytes(size)} in {str(folder)!r}: {error}; make room, raise "
            "train.trunk_cache_gb to keep them in memory, or set it to null to compute them anew in every pass"
        ) from error
