"""Measures of a reward model: what they must be on cases that can be counted by hand."""

import pytest
import torch

from solotune.rewards.quality import brier_score, fit_logistic, pairwise_accuracy, sign_accuracy


def test_pairwise_accuracy_sees_the_order_alone():
    ratings = torch.randn(50)
    assert pairwise_accuracy(ratings.exp(), ratings) == 1
    assert pairwise_accuracy(-ratings, ratings) == 0
    assert pairwise_accuracy(torch.zeros(50), ratings) == 0.5
    # of the pairs (1,2), (1,3), (2,3) one is in the wrong order; the equal ratings 3 and 3 do not count
    assert pairwise_accuracy(torch.tensor([2.0, 1.0, 5.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 3.0])) == 4 / 5


def test_sign_accuracy_leaves_out_ratings_of_zero():
    assert sign_accuracy(torch.tensor([1.0, 1.0, -1.0, 0.0]), torch.tensor([3.0, 0.0, 2.0, 1.0])) == pytest.approx(
        1 / 3
    )


def test_brier_score_of_certainty_and_of_a_coin():
    outcome = torch.tensor([1.0, 0.0, 1.0])
    assert brier_score(outcome, outcome) == 0
    assert brier_score(1 - outcome, outcome) == 1
    assert brier_score(torch.full((3,), 0.5), outcome) == 0.25


def test_the_logistic_fit_finds_the_scale_and_offset_that_made_the_data():
    scores = torch.randn(200_000)
    positive = torch.rand(200_000) < torch.sigmoid(3.0 * scores - 1.5)
    scale, offset = fit_logistic(scores, positive)
    assert scale == pytest.approx(3.0, rel=0.03)
    assert offset == pytest.approx(-1.5, rel=0.03)


def test_the_logistic_fit_is_finite_where_the_data_are_separable():
    scale, offset = fit_logistic(torch.tensor([-2.0, -1.0, 1.0, 2.0]), torch.tensor([False, False, True, True]))
    assert 0 < scale < 100
    assert abs(offset) < 1e-3
