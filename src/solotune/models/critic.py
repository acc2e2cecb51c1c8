"""The critic: a small head on the policy's last hidden state, or on blocks of its own.

Shapes: N tokens, H hidden.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from solotune.models.split import Decoder

CRITIC_FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """V(s) from the last hidden state: Linear(h, 2h), ReLU, Linear(2h, 1) in fp32, the last layer zero at the start."""

    def __init__(self, hidden_size: int, device: torch.device | str | None = None):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size, device=device),
            nn.ReLU(),
            nn.Linear(2 * hidden_size, 1, device=device),
        )
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Values (N,) of hidden states (N, H)."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return self.layers(hidden_NH.float()).squeeze(-1)


class ValueBranch(nn.Module):
    """A trained copy of a decoder's last blocks and final norms, for a critic with layers of its own (trlX's
    `num_value_layers_unfrozen`).

    Args:
        decoder: whose blocks are copied, before an adapter is put on them.
        n_blocks: how many, at least 1 and less than all.
    """

    def __init__(self, decoder: Decoder, n_blocks: int):
        super().__init__()
        self.start = len(decoder.blocks) - n_blocks
        self.blocks = copy.deepcopy(nn.ModuleList(decoder.blocks[self.start :]))
        self.norms = nn.ModuleDict(copy.deepcopy(decoder.final_norms))
        self.requires_grad_(True)


def checkpoint_like(block: nn.Module, copies: nn.ModuleList) -> None:
    """Copies that were made before gradient checkpointing was switched on are recomputed as their originals are."""
    for copied in copies:
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if hasattr(block, name):
                setattr(copied, name, getattr(block, name))


def saved_branch_blocks(folder: Path) -> int:
    """Blocks of the value branch that `save_pretrained` wrote into a folder; 0 where it wrote none."""
    if not (folder / CRITIC_FILE).exists():
        return 0
    with safe_open(folder / CRITIC_FILE, "pt") as file:
        names = [name.split(".") for name in file.keys()]  # noqa: SIM118  no mapping
    return len({name[2] for name in names if name[:2] == ["value_branch", "blocks"]})
