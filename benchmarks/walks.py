"""Shortest paths in a random directed graph: learned in seconds by a small model, with an optimum that is known.

A graph has 21 nodes, called by letters; "a" is the goal. Every ordered pair of two nodes is an edge with probability
0.1, but the goal has no edges out. A draw from which some node does not reach the goal within `MAX_LENGTH` nodes is
thrown away and the next one taken, so every seed gives a graph that connects. The data are 1,000 walks: from a random
start along random edges until the goal, or until the walk has `MAX_LENGTH` nodes.

The prompt is a start node, the response the nodes after it. A walk of n nodes that follows edges to the goal is
worth (L + 1 - n) / (L + 1 - m), with L = MAX_LENGTH and m the nodes of the shortest path from its start: 1 for a
shortest path, down to 1 / (L + 1 - m) for one that just arrives. Every other text is worth 0: one that takes an edge
which is not there, goes on behind the goal, never gets there, or is too long. The optimum is 1 from every start.

(The set-up is that of trlX's example `randomwalks`; the graph, its distribution and the reward are defined here.)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import string
import tempfile
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

N_NODES, N_WALKS, MAX_LENGTH, EDGE_PROBABILITY = 21, 1000, 10, 0.1
NODES = string.ascii_lowercase[:N_NODES]
GOAL = NODES[0]
PAD, BOS, EOS = N_NODES, N_NODES + 1, N_NODES + 2
OPTIMUM = 1.0
MAX_NEW_TOKENS = MAX_LENGTH - 1
"""Room for the nodes after the start; a walk that arrives earlier ends with EOS."""


@dataclass(frozen=True)
class Walks:
    """A graph and walks on it.

    Args:
        seed: what all of it was drawn from.
        edges: node -> the nodes that an edge leads to.
        shortest: node -> nodes of the shortest path from it to the goal, both included.
        walks: the data, `N_WALKS` texts.
    """

    seed: int
    edges: dict[str, str]
    shortest: dict[str, int]
    walks: list[str]

    @property
    def prompts(self) -> list[str]:
        """Every node but the goal."""
        return [node for node in NODES if node != GOAL]

    @property
    def pairs(self) -> list[list[str]]:
        """The data as prompt and output."""
        return [[walk[0], walk[1:]] for walk in self.walks]

    @property
    def rewards(self) -> list[float]:
        """What the data are worth."""
        return [self.optimality(walk) for walk in self.walks]

    @property
    def data_mean(self) -> float:
        """Mean reward of the data, every start counted alike."""
        by_start = {start: [r for w, r in zip(self.walks, self.rewards, strict=True) if w[0] == start]
                    for start in self.prompts}  # fmt: skip
        return float(np.mean([np.mean(values) for values in by_start.values() if values]))

    def optimality(self, walk: str) -> float:
        """Closeness of a text to the shortest path from its first node, 0 to 1."""
        if len(walk) > MAX_LENGTH or walk[:1] not in self.edges or walk[-1] != GOAL:
            return 0.0
        if any(after not in self.edges.get(node, "") for node, after in pairwise(walk)):
            return 0.0
        return (MAX_LENGTH + 1 - len(walk)) / (MAX_LENGTH + 1 - self.shortest[walk[0]])

    def reward_fn(self, samples: list[str], **_: Any) -> list[float]:
        return [self.optimality(sample) for sample in samples]

    def metric_fn(self, samples: list[str], **_: Any) -> dict[str, list[float]]:
        rewards = self.reward_fn(samples)
        return {
            "optimality": rewards,
            "arrived": [float(reward > 0) for reward in rewards],
            "shortest": [float(reward == 1) for reward in rewards],
        }


def make_walks(seed: int) -> Walks:
    """The graph and the data of a seed."""
    random = np.random.default_rng(seed)
    shortest: dict[str, int] = {}
    edges: dict[str, str] = {}
    while len(shortest) < N_NODES or max(shortest.values()) > MAX_LENGTH:
        is_edge = random.random((N_NODES, N_NODES)) < EDGE_PROBABILITY
        np.fill_diagonal(is_edge, False)
        is_edge[0] = False
        edges = {node: "".join(n for n, there in zip(NODES, row, strict=True) if there)
                 for node, row in zip(NODES, is_edge, strict=True)}  # fmt: skip
        shortest = _shortest(edges)
    walks = [_walk(edges, NODES[random.integers(1, N_NODES)], random) for _ in range(N_WALKS)]
    del edges[GOAL]
    return Walks(seed, edges, shortest, walks)


def _shortest(edges: dict[str, str]) -> dict[str, int]:
    """Nodes of the shortest path to the goal, for the nodes that reach it (breadth first, backwards)."""
    found, queue = {GOAL: 1}, deque(GOAL)
    while queue:
        reached = queue.popleft()
        for node in NODES:
            if reached in edges[node] and node not in found:
                found[node] = found[reached] + 1
                queue.append(node)
    return found


def _walk(edges: dict[str, str], start: str, random: np.random.Generator) -> str:
    walk = start
    while walk[-1] != GOAL and len(walk) < MAX_LENGTH:
        walk += edges[walk[-1]][random.integers(len(edges[walk[-1]]))]
    return walk


def walks_tokenizer() -> PreTrainedTokenizerFast:
    """A token a node, then <pad>, <bos>, <eos>; none of these is added to a text."""
    tokenizer = Tokenizer(models.BPE(vocab={node: index for index, node in enumerate(NODES)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def model_config(layers: int = 6, width: int = 144) -> GPT2Config:
    """A small GPT-2 for these tokens; `width` is a multiple of 24."""
    return GPT2Config(
        vocab_size=N_NODES + 3, n_layer=layers, n_embd=width, n_head=width // 24, n_positions=32,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def pretrained(
    data: Walks, steps: int = 800, layers: int = 6, width: int = 144, lr: float = 2e-3, cache: Path | None = None
) -> Path:
    """A folder with a model that was trained on the walks as text, each ended by EOS, and its tokenizer.

    Plain next-token prediction with AdamW in batches of 64 walks, at a learning rate that falls to 0; about a minute
    on a core. It has to know the edges: after 200 steps 16 to 28 % of the walks it samples take one that is not there,
    after 800 it is 3 to 6 %. What was trained is kept in `cache` (default a folder in the system's temporary one) under
    the seed, the settings and this file's content.
    """
    key = hashlib.sha256(f"{steps} {layers} {width} {lr}".encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    folder = (cache or Path(tempfile.gettempdir()) / "solotune-walks") / f"{data.seed}-{key}"
    if folder.exists():
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        model = GPT2LMHeadModel(model_config(layers, width))
        _train(model, data.walks, steps, lr)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=_made(folder.parent)))
    model.save_pretrained(aside)
    walks_tokenizer().save_pretrained(aside)
    try:
        os.replace(aside, folder)
    except OSError:  # another process was faster
        shutil.rmtree(aside)
    return folder


def _train(model: GPT2LMHeadModel, walks: list[str], steps: int, lr: float) -> None:
    rows = [[NODES.index(node) for node in walk] + [EOS] for walk in walks]
    ids_NT = torch.tensor([row + [PAD] * (MAX_LENGTH + 1 - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        ids_BT = ids_NT[torch.randint(len(ids_NT), (64,))]
        logits_BTV = model(input_ids=ids_BT).logits  # padding is on the right, where nothing before it looks
        nll = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), ignore_index=PAD)
        nll.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
