"""What is measured: the model shapes of the PPO benchmark and the work of one round.

Imports the standard library alone, so that every side's environment can read it.
"""

from dataclasses import dataclass, replace
from typing import Any

LORA_R = 8
LORA_ALPHA = 16
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
LORA_BLOCKS = 2  # the last two blocks carry the adapter
PPO_EPOCHS = 4
LEARNING_RATE = 1e-4
KL_COEF = 0.05


@dataclass(frozen=True)
class Shape:
    """An OPT decoder with random weights, and how much of it one round of PPO uses."""

    name: str
    blocks: int
    width: int
    heads: int
    ffn: int
    vocabulary: int
    rollouts: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    rounds: int  # measured rounds, unless --rounds says otherwise
    warmup_rounds: int

    @property
    def lora_blocks(self) -> list[int]:
        return list(range(self.blocks - LORA_BLOCKS, self.blocks))

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.new_tokens

    @property
    def updates_per_round(self) -> int:
        return PPO_EPOCHS * (self.rollouts // self.batch_size)

    def opt_config(self) -> dict[str, Any]:
        """Keyword arguments of `transformers.OPTConfig`."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "word_embed_proj_dim": self.width,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "ffn_dim": self.ffn,
            "max_position_embeddings": 2048,
        }

    def with_rollouts(self, rollouts: int) -> "Shape":
        """The same shape with another number of rollouts a round; the batch shrinks to it where it is larger."""
        batch_size = min(self.batch_size, rollouts)
        if rollouts < 1 or rollouts % batch_size:
            raise SystemExit(
                f"--rollouts {rollouts}: has to be a positive multiple of the batch of {self.batch_size}, "
                f"or smaller than it; try --rollouts {max(1, round(rollouts / batch_size)) * batch_size}"
            )
        return replace(self, rollouts=rollouts, batch_size=batch_size)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="tiny",
            blocks=4,
            width=32,
            heads=2,
            ffn=64,
            vocabulary=256,
            rollouts=8,
            prompt_tokens=8,
            new_tokens=6,
            batch_size=4,
            rounds=2,
            warmup_rounds=1,
        ),
        Shape(
            name="deep",
            blocks=24,
            width=512,
            heads=8,
            ffn=2048,
            vocabulary=8192,
            rollouts=128,
            prompt_tokens=8,
            new_tokens=40,
            batch_size=32,
            rounds=2,
            warmup_rounds=1,
        ),
        Shape(  # width, depth, vocabulary and round of the Gemma 3 270M recipe; its three feed-forward matrices as two
            name="gemma-270m",
            blocks=18,
            width=640,
            heads=10,
            ffn=3072,
            vocabulary=262144,
            rollouts=64,
            prompt_tokens=5,
            new_tokens=12,
            batch_size=16,
            rounds=2,
            warmup_rounds=1,
        ),
        Shape(
            name="opt-1.3b",
            blocks=24,
            width=2048,
            heads=32,
            ffn=8192,
            vocabulary=50272,
            rollouts=128,
            prompt_tokens=8,
            new_tokens=40,
            batch_size=32,
            rounds=1,
            warmup_rounds=0,
        ),
    )
}
