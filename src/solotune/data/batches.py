"""Batches of given samples: padded on the right, several of them in one row where rows are packed.

Shapes: R rows, S positions of a row, M positions of all samples together, N tokens to learn, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from solotune.data.dialogues import Samples


class Batch(NamedTuple):
    """Samples as the model is fed with them: all their tokens but the last, from which nothing is predicted.

    Args:
        ids_RS: token ids, int64; 0 on padding.
        segments_RS: which sample of the row a position belongs to, from 1; 0 on padding.
        positions_RS: place of a token within its sample, int64; 0 on padding.
        slots_M: where in the flattened R x S the samples' positions are, one sample behind the other.
        picks_N: places, in the flattened R x S, from which a token to learn is predicted; sample by sample.
        targets_N: those tokens.
        last_N: True on the last token to learn of each sample.
        counts_N: False on the tokens of a row that only stands in for one a process does not have.
        sample_N: which of the batch's samples each belongs to.
        is_packed: whether a row holds several samples.
        encoder_ids_RE, encoder_mask_RE: an encoder-decoder's prompts, right-padded, and True on their tokens.
    """

    ids_RS: Tensor
    segments_RS: Tensor
    positions_RS: Tensor
    slots_M: Tensor
    picks_N: Tensor
    targets_N: Tensor
    last_N: Tensor
    counts_N: Tensor
    sample_N: Tensor
    is_packed: bool
    encoder_ids_RE: Tensor | None = None
    encoder_mask_RE: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._make(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self)

    def scattered(self, flat_MH: Tensor) -> Tensor:
        """What belongs to the samples' positions, one sample behind the other, at its place in the rows, (R, S, H);
        zero on padding."""
        rows_NH = flat_MH.new_zeros((self.ids_RS.numel(), flat_MH.shape[-1]))
        rows_NH[self.slots_M] = flat_MH
        return rows_NH.view(*self.ids_RS.shape, -1)

    def gathered(self, rows_RSH: Tensor) -> Tensor:
        """The inverse of `scattered`, (M, H)."""
        return rows_RSH.flatten(0, 1)[self.slots_M]


def collate(samples: Samples, chosen: Sequence[int], stands_in: Sequence[bool] = (), packs: bool = False) -> Batch:
    """A batch of the samples at `chosen`.

    Args:
        stands_in: of each, whether nothing is to be learned from it; default none.
        packs: put several samples into a row, which gets no longer than the longest sample.
    """
    stands_in = stands_in or [False] * len(chosen)
    lengths = [len(samples.ids[index]) - 1 for index in chosen]
    rows = _packed(lengths, max(lengths)) if packs else [[i] for i in range(len(chosen))]
    width = max(sum(lengths[i] for i in row) for row in rows)
    ids_RS = torch.zeros(len(rows), width, dtype=torch.long)
    segments_RS, positions_RS = torch.zeros_like(ids_RS), torch.zeros_like(ids_RS)
    places = [0] * len(chosen)
    for r, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row, start=1):
            end = start + lengths[i]
            ids_RS[r, start:end] = torch.tensor(samples.ids[chosen[i]][:-1])
            segments_RS[r, start:end] = segment
            positions_RS[r, start:end] = torch.arange(lengths[i])
            places[i] = r * width + start
            start = end
    picks, targets, last, counts, owners = [], [], [], [], []
    for i, index in enumerate(chosen):
        learned = samples.learned(index)
        picks += [places[i] + t - 1 for t, _ in learned]
        targets += [token for _, token in learned]
        last += [t == learned[-1][0] for t, _ in learned]
        counts += [not stands_in[i]] * len(learned)
        owners += [i] * len(learned)
    slots_M = torch.cat([torch.arange(place, place + n) for place, n in zip(places, lengths, strict=True)])
    return Batch(
        ids_RS, segments_RS, positions_RS, slots_M, torch.tensor(picks),
        torch.tensor(targets), torch.tensor(last), torch.tensor(counts), torch.tensor(owners),
        any(len(row) > 1 for row in rows), *_prompts(samples, chosen),
    )  # fmt: skip


def _prompts(samples: Samples, chosen: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    """What an encoder is given, right-padded, and its mask; None where the model has none."""
    if not samples.prompts:
        return None, None
    lengths_R = torch.tensor([len(samples.prompts[index]) for index in chosen])
    mask_RE = torch.arange(int(lengths_R.max())) < lengths_R[:, None]
    ids_RE = torch.zeros(mask_RE.shape, dtype=torch.long)
    ids_RE[mask_RE] = torch.tensor([token for index in chosen for token in samples.prompts[index]])
    return ids_RE, mask_RE


def _packed(lengths: list[int], width: int) -> list[list[int]]:
    """Indices in rows of at most `width` positions: the longest first, each into the first row it fits in."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(width)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows
