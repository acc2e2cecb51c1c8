"""A linear layer's cross-entropy in chunks is the ordinary one, gradients included."""

import pytest
import torch
from torch.nn import functional

from solotune.algorithms.cross_entropy import linear_cross_entropy
from solotune.algorithms.masks import ShapeError


@pytest.mark.parametrize("chunk", [1, 3, 100, None])
def test_it_is_the_ordinary_cross_entropy(chunk):
    inputs, weight, bias = (torch.randn(*shape).double().requires_grad_() for shape in ((7, 5), (11, 5), (11,)))
    targets, weights = torch.randint(0, 11, (7,)), torch.rand(7).double()
    weights[2] = 0.0
    expected = (weights * functional.cross_entropy(inputs @ weight.T + bias, targets, reduction="none")).sum()
    found = linear_cross_entropy(inputs, weight, bias, targets, weights, chunk)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(3.0 * expected, (inputs, weight, bias))
    for ours, theirs in zip(torch.autograd.grad(3.0 * found, (inputs, weight, bias)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("chunk", [16, None])
def test_in_bf16_the_products_alone_are_rounded(chunk):
    torch.manual_seed(0)
    inputs, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((64, 32), (50, 32), (50,)))
    targets, weights = torch.randint(0, 50, (64,)), torch.rand(64)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        loss = linear_cross_entropy(inputs, weight, bias, targets, weights, chunk, dtype)
        assert loss.dtype == torch.float32
        found.append((loss, *torch.autograd.grad(loss, (inputs, weight, bias))))
    for wide, narrow in zip(*found, strict=True):
        assert narrow.dtype == torch.float32
        assert 0 < (wide - narrow).norm() < 0.01 * wide.norm()


def test_large_logits_do_not_overflow_and_no_rows_are_nothing():
    weight, bias = torch.eye(3) * 1e4, torch.zeros(3)
    loss = linear_cross_entropy(torch.eye(3), weight, bias, torch.tensor([0, 1, 0]), torch.ones(3))
    assert float(loss) == pytest.approx(1e4)
    empty = linear_cross_entropy(torch.zeros(0, 3), weight, bias, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert float(empty) == 0.0


def test_frozen_parts_get_no_gradient():
    inputs, weight, bias = torch.randn(4, 3), torch.randn(6, 3).requires_grad_(), torch.zeros(6)
    loss = linear_cross_entropy(inputs, weight, bias, torch.zeros(4, dtype=torch.long), torch.ones(4))
    assert torch.autograd.grad(loss, weight)[0].abs().sum() > 0
    with pytest.raises(ShapeError, match="weights_N"):
        linear_cross_entropy(inputs, weight, bias, torch.zeros(4, dtype=torch.long), torch.ones(3))
