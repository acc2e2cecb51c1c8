"""Which samples are good enough, whatever the rewards look like."""

from itertools import pairwise

import pytest
import torch

from solotune.algorithms.masks import ShapeError
from solotune.algorithms.rft import first_of_each, percentile_schedule, select

KINDS = {
    "real": lambda: torch.randn(6, 9),
    "whole numbers": lambda: torch.randint(0, 4, (6, 9)).float(),
    "zero or one": lambda: (torch.rand(6, 9) < 0.2).float(),
    "far from zero": lambda: 1e6 + torch.randn(6, 9).double(),
    "nearly all the best": lambda: (torch.rand(6, 9) < 0.9).float(),
    "some prompts solved, some hopeless": lambda: torch.cat([torch.ones(2, 9), torch.randn(3, 9), -torch.ones(2, 9)]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [0.0, 0.33, 0.7, 0.95, 1.0])
def test_the_best_is_selected_and_the_worst_never(kind, percentile):
    scores_PG = KINDS[kind]()
    mean = float(scores_PG.double().mean())
    chosen_PG = select(scores_PG, percentile, mean).is_selected_PG
    for scores, chosen in zip(scores_PG, chosen_PG, strict=True):
        if scores.min() == scores.max():
            assert chosen.tolist() == [bool(scores.min() > mean)] * len(scores)
            continue
        assert chosen[scores == scores.max()].all()
        assert not chosen[scores == scores.min()].any()
        assert scores[chosen].min() > scores[~chosen].max(), "whatever is better than a selected sample is selected"


def test_a_percentile_of_different_scores_keeps_that_share():
    scores_PG = torch.stack([torch.randperm(101) for _ in range(3)]).float()
    for percentile, kept in ((0.0, 100), (0.5, 51), (0.9, 11), (1.0, 1)):
        assert select(scores_PG, percentile, 50.0).is_selected_PG.sum(1).tolist() == [kept] * 3


def test_a_prompt_is_judged_by_its_own_samples_on_any_scale():
    scores_PG = torch.randn(5, 8).double()
    before = select(scores_PG, 0.7, 0.0)
    scale_P1, shift_P1 = (
        torch.tensor([[1e-6], [1.0], [50.0], [1e6], [2.0]]),
        torch.tensor([[0.0], [-9], [3], [1e5], [7]]),
    )
    after = select(scores_PG * scale_P1 + shift_P1, 0.7, 0.0)
    assert torch.equal(before.is_selected_PG, after.is_selected_PG)
    order = torch.randperm(8)
    assert torch.equal(select(scores_PG[:, order], 0.7, 0.0).is_selected_PG, before.is_selected_PG[:, order])
    assert torch.equal(select(scores_PG[1:2], 0.7, 0.0).is_selected_PG, before.is_selected_PG[1:2])


def test_a_higher_percentile_selects_from_what_a_lower_one_selected():
    scores_PG = torch.randint(0, 6, (20, 12)).float()
    chosen = [select(scores_PG, p, 2.5).is_selected_PG for p in percentile_schedule(0.3, 0.95, 5)]
    for low, high in pairwise(chosen):
        assert not (high & ~low).any()


def test_equal_scores_are_learned_where_they_are_above_the_mean_of_all_prompts():
    scores_PG = torch.tensor([[1.0, 1.0, 1.0], [0.2, 0.9, 0.1], [0.3, 0.3, 0.3]])
    chosen_PG = select(scores_PG, 0.7, float(scores_PG.mean())).is_selected_PG
    assert chosen_PG.tolist() == [[True] * 3, [False, True, False], [False] * 3]
    assert select(torch.tensor([[0.4], [0.6]]), 0.5, 0.5).is_selected_PG.tolist() == [[False], [True]]


@pytest.mark.parametrize("score", [0.0, 0.7, -0.1, 1 / 3, 1e12])
def test_where_all_scores_are_equal_nothing_is_learned(score):
    scores_PG = torch.full((3, 7), score, dtype=torch.float64)
    for mean in (float(scores_PG.mean()), float(scores_PG.sum()) / 21, sum(scores_PG.flatten().tolist()) / 21):
        assert not select(scores_PG, 0.5, mean).is_selected_PG.any()
    assert select(torch.zeros(0, 4), 0.5, score).is_selected_PG.shape == (0, 4)


def test_the_schedule_starts_and_ends_where_it_says():
    assert percentile_schedule(0.7, 0.95, 1) == [0.7]
    schedule = percentile_schedule(0.7, 0.95, 4)
    assert (schedule[0], schedule[-1]) == (0.7, pytest.approx(0.95))
    assert torch.tensor(schedule).diff().std() < 1e-6
    assert max(percentile_schedule(0.0, 1.0, 7)) <= 1.0


def test_first_of_each():
    assert first_of_each("abcabca") == [0, 1, 2]
    assert first_of_each([]) == []


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: select(torch.randn(4), 0.5, 0.0), ShapeError),
        (lambda: select(torch.zeros(4, 0), 0.5, 0.0), ShapeError),
        (lambda: select(torch.tensor([[1.0, torch.nan]]), 0.5, 0.0), ValueError),
        (lambda: select(torch.randn(2, 2), 1.5, 0.0), ValueError),
        (lambda: percentile_schedule(0.9, 0.5, 3), ValueError),
        (lambda: percentile_schedule(0.5, 0.9, 0), ValueError),
    ],
)
def test_what_makes_no_sense_is_refused(call, error):
    with pytest.raises(error):
        call()
