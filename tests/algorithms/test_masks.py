import numpy as np
import pytest
import torch

from solotune.algorithms import ShapeError, masked_mean, masked_moments


def test_moments_are_those_of_the_selected_values(mask_BT):
    x_BT = torch.randn(5, 7)
    moments = masked_moments(x_BT.masked_fill(~mask_BT, torch.nan), mask_BT)
    selected = np.concatenate([row[:n].numpy().astype(np.float64) for row, n in zip(x_BT, mask_BT.sum(1), strict=True)])
    assert float(moments.n) == len(selected) == 16
    np.testing.assert_allclose(float(moments.mean), selected.mean(), rtol=1e-12)
    np.testing.assert_allclose(float(moments.var), selected.var(), rtol=1e-12)
    assert masked_mean(x_BT, mask_BT) == moments.mean


def test_a_large_common_offset_does_not_eat_the_variance():
    x = torch.tensor([1e6, 1e6 + 1, 1e6 + 2])
    assert float(masked_moments(x, torch.ones(3, dtype=torch.bool)).var) == pytest.approx(2 / 3, rel=1e-9)


def test_nothing_selected_is_zero_not_nan():
    moments = masked_moments(torch.full((2, 3), torch.nan), torch.zeros(2, 3, dtype=torch.bool))
    assert [float(value) for value in moments] == [0.0, 0.0, 0.0]


def test_an_integer_mask_is_refused_because_it_would_index():
    with pytest.raises(ShapeError, match=r"torch.int64.*bool"):
        masked_mean(torch.randn(2, 3), torch.ones(2, 3, dtype=torch.int64))


def test_differing_shapes_are_all_printed():
    with pytest.raises(ShapeError, match=r"x \(2, 3\), mask \(3, 2\)"):
        masked_mean(torch.randn(2, 3), torch.ones(3, 2, dtype=torch.bool))
