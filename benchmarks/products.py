"""The bare matrix products of one round: what the arithmetic costs before anything is made of it.

A round that computes the trunk once cannot do without these: the products of sampling every token through all blocks
and the head, of measuring policy and reference in the top blocks, and of the updates in the top blocks, forward and
backward. Norms, activations, softmax, sampling, losses and the optimizer are left out, and so is recomputation.
Every block has weights of its own, so that they come from memory as the model's do. They are made by the library that
solotune would take here, MKL or oneDNN, and with copies of frozen weights where it would make them.

N is positions, H width, F the feed-forward width, V vocabulary, R the LoRA rank, and an attention operand is
(rows, heads, positions, head size).
"""

import contextlib
from typing import NamedTuple

import torch
from shapes import LORA_BLOCKS, LORA_R, Shape
from torch import Tensor
from torch.nn.functional import linear
from worker import RoundClock, Worker, arguments

from solotune.models.packed import PackedWeights, gains_by_packing
from solotune.models.products import use_fastest_products

OUTPUT_PROJECTION = 3  # its place among a block's four attention projections


class Block(NamedTuple):
    attention: list[Tensor]  # query, key, value, output: (H, H)
    lora: list[tuple[Tensor, Tensor]]  # the same four: (R, H), (H, R)
    up: Tensor  # (F, H)
    down: Tensor  # (H, F)


class Products:
    """Weights and operands of the shape's sizes; nothing is allocated for them while the clock runs."""

    def __init__(self, shape: Shape, device: str, dtype: str) -> None:
        def random(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=getattr(torch, dtype))

        h, f, r = shape.width, shape.ffn, LORA_R
        self._shape = shape
        self._clock = RoundClock(shape, device)
        self._blocks = [
            Block(
                attention=[random(h, h) for _ in range(4)],
                lora=[(random(r, h), random(h, r)) for _ in range(4)],
                up=random(f, h),
                down=random(h, f),
            )
            for _ in range(shape.blocks)
        ]
        self._head_VH = random(shape.vocabulary, h)
        self._critic = (random(2 * h, h), random(1, 2 * h))
        positions = max(shape.rollouts * shape.prompt_tokens, shape.batch_size * shape.length)
        self._x_NH = random(positions, h)
        self._x_NF = random(positions, f)
        self._packed = contextlib.nullcontext()
        if device == "cpu" and dtype == "float32" and gains_by_packing():
            frozen = [weight for block in reversed(self._blocks) for weight in (*block.attention, block.up, block.down)]
            self._packed = PackedWeights([self._head_VH, *frozen])
        self._heads = random(shape.rollouts, shape.heads, shape.length, h // shape.heads)

    @torch.no_grad()
    def play_round(self) -> dict:
        with self._packed:
            return self._play_round()

    def _play_round(self) -> dict:
        self._clock.start()
        with self._clock.phase("sample"):
            self._sample()
        with self._clock.phase("measure"):
            for _ in range(self._shape.rollouts // self._shape.batch_size):
                self._top_forward(lora=True)  # policy
                self._critic_forward()
                self._top_forward(lora=False)  # reference
        with self._clock.phase("update"):
            for _ in range(self._shape.updates_per_round):
                self._update()
        return self._clock.record()

    def _sample(self) -> None:
        shape = self._shape
        for context in range(shape.prompt_tokens, shape.length):
            queries = shape.prompt_tokens if context == shape.prompt_tokens else 1
            x_NH = self._x_NH[: shape.rollouts * queries]
            for i, block in enumerate(self._blocks):
                _block_forward(x_NH, block, lora=i >= shape.blocks - LORA_BLOCKS)
                _attention_forward(self._heads[:, :, :queries], self._heads[:, :, :context])
            linear(x_NH[: shape.rollouts], self._head_VH)

    def _update(self) -> None:
        logits_NV = self._top_forward(lora=True)
        self._critic_backward(self._critic_forward())
        self._top_backward(logits_NV)

    def _positions(self) -> int:
        """Positions the top runs on in a batch: the last token has nothing to predict."""
        return self._shape.batch_size * (self._shape.length - 1)

    def _responses(self) -> Tensor:
        """The head and the critic run on the positions that predict response tokens."""
        return self._x_NH[: self._shape.batch_size * self._shape.new_tokens]

    def _operand(self) -> Tensor:
        return self._heads[: self._shape.batch_size, :, : self._shape.length - 1]

    def _top_forward(self, lora: bool) -> Tensor:
        for block in self._blocks[-LORA_BLOCKS:]:
            _block_forward(self._x_NH[: self._positions()], block, lora)
            _attention_forward(self._operand(), self._operand())
        return linear(self._responses(), self._head_VH)

    def _top_backward(self, grad_NV: Tensor) -> None:
        """Gradients of the inputs through frozen weights, and of the adapters. Below the lowest block of the top no
        gradient is needed, so its query, key and value projections pass none on."""
        n = self._positions()
        grad_NH, grad_NF = self._x_NH[:n], self._x_NF[:n]
        grad_NR = self._x_NH[:n, :LORA_R]
        torch.matmul(grad_NV, self._head_VH)
        for depth, block in enumerate(self._blocks[-LORA_BLOCKS:]):
            torch.matmul(grad_NH, block.down)
            torch.matmul(grad_NF, block.up)
            _attention_backward(self._operand())
            for i, (weight_HH, (a_RH, b_HR)) in enumerate(zip(block.attention, block.lora, strict=True)):
                torch.matmul(grad_NH.T, grad_NR)  # of b_HR
                torch.matmul(grad_NH, b_HR)
                torch.matmul(grad_NR.T, grad_NH)  # of a_RH
                if depth > 0 or i == OUTPUT_PROJECTION:
                    torch.matmul(grad_NH, weight_HH)
                    torch.matmul(grad_NR, a_RH)

    def _critic_forward(self) -> Tensor:
        wide, narrow = self._critic
        hidden_N2H = linear(self._responses(), wide)
        linear(hidden_N2H, narrow)
        return hidden_N2H

    def _critic_backward(self, hidden_N2H: Tensor) -> None:
        wide, narrow = self._critic
        x_NH = self._responses()
        grad_N1 = x_NH[:, :1]
        torch.matmul(grad_N1.T, hidden_N2H)
        torch.matmul(grad_N1, narrow)
        torch.matmul(hidden_N2H.T, x_NH)
        torch.matmul(hidden_N2H, wide)


def _block_forward(x_NH: Tensor, block: Block, lora: bool) -> None:
    for weight_HH, (a_RH, b_HR) in zip(block.attention, block.lora, strict=True):
        linear(x_NH, weight_HH)
        if lora:
            linear(linear(x_NH, a_RH), b_HR)
    linear(linear(x_NH, block.up), block.down)


def _attention_forward(queries: Tensor, keys: Tensor) -> None:
    scores = queries @ keys.transpose(-1, -2)
    torch.matmul(scores, keys)  # the values are as large as the keys


def _attention_backward(heads: Tensor) -> None:
    grad_scores = heads @ heads.transpose(-1, -2)
    torch.matmul(grad_scores.transpose(-1, -2), heads)  # of the values
    torch.matmul(grad_scores, heads)  # of the queries
    torch.matmul(grad_scores.transpose(-1, -2), heads)  # of the keys


def main() -> None:
    worker = Worker()
    shape, device, dtype = arguments(__doc__ or "")
    use_fastest_products(device)
    products = Products(shape, device, dtype)
    worker.answer(
        {"name": "matrix products", "threads": torch.get_num_threads(), "versions": {"torch": torch.__version__}}
    )
    worker.serve({"round": products.play_round})


if __name__ == "__main__":
    main()
