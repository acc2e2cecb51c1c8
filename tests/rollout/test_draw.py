"""One uniform number a row draws the token the distribution says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from solotune.rollout.draw import draw, greedy, row_uniforms


def frequencies(logits_V, n=40_000, **options):
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # a grid: frequencies are exact to 1/n
    tokens = draw(logits_V.expand(n, -1), uniforms, **options).tokens_B
    return torch.bincount(tokens, minlength=len(logits_V)).double() / n


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 101, 512, 1009, 5000])
def test_frequencies_are_the_softmax(vocabulary):
    logits = torch.randn(vocabulary) * 3
    for temperature in (1.0, 0.5, 2.0):
        expected = (logits.double() / temperature).softmax(-1)
        assert (frequencies(logits, temperature=temperature) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.5}, {"top_k": 5000}, {"top_p": 1e-6}]
)
def test_top_k_and_top_p_keep_what_transformers_keeps(options):
    logits = torch.randn(1, 301) * 2
    kept = TemperatureLogitsWarper(0.8)(None, logits)
    if "top_k" in options:
        kept = TopKLogitsWarper(options["top_k"])(None, kept)
    if "top_p" in options:
        kept = TopPLogitsWarper(options["top_p"])(None, kept)
    assert (frequencies(logits[0], temperature=0.8, **options) - kept[0].double().softmax(-1)).abs().max() < 1e-4


def test_the_logprob_is_that_of_the_whole_tempered_softmax():
    logits = torch.randn(50, 400) * 3
    for options in ({}, {"top_k": 7}, {"top_p": 0.4}, {"excluded_E": torch.tensor([1, 5])}):
        drawn = draw(logits, torch.rand(50, dtype=torch.float64), temperature=0.6, **options)
        expected = (logits / 0.6).log_softmax(-1).gather(-1, drawn.tokens_B[:, None])[:, 0]
        torch.testing.assert_close(drawn.logprobs_B, expected, atol=1e-5, rtol=0)


def test_excluded_tokens_are_never_drawn_and_the_others_keep_their_proportions():
    logits = torch.randn(64)
    excluded = torch.tensor([3, int(logits.argmax())])
    expected = logits.double().index_fill(0, excluded, -torch.inf).softmax(-1)
    assert (frequencies(logits, excluded_E=excluded) - expected).abs().max() < 1e-4
    assert greedy(logits[None], excluded_E=excluded).tokens_B.item() not in excluded.tolist()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([-80.0, -1.0, 0.0, 3.0, 60.0]), min_size=1, max_size=300),
    st.sampled_from([0.0, 1e-12, 0.5, 1 - 2**-53, 1 - 1e-9]),
)
def test_an_impossible_token_is_never_drawn_at_the_edges_of_the_unit_interval(logits, uniform):
    row = torch.tensor([logits])
    token = draw(row, torch.tensor([uniform], dtype=torch.float64)).tokens_B.item()
    assert 0 <= token < len(logits)
    assert (row - row.max()).exp()[0, token] > 0


def test_tokens_of_a_large_vocabulary_come_out_at_their_own_place():
    """fp32 sums over 262,144 tokens lose small probabilities; the blocks are summed in fp64."""
    logits = torch.full((262_144,), -3.0)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    wanted = torch.tensor([0, 511, 512, 131_071, 262_143])
    uniforms = cumulative[wanted] - 0.5 / 262_144
    assert draw(logits.expand(5, -1), uniforms).tokens_B.tolist() == wanted.tolist()


def test_a_rows_numbers_depend_on_seed_stream_and_row_alone():
    numbers = row_uniforms(5, 0, range(10), 8)
    assert torch.equal(row_uniforms(5, 0, [7, 3], 8), numbers[[7, 3]])
    assert torch.equal(row_uniforms(5, 0, [7], 3)[0], numbers[7, :3]), "a longer response starts alike"
    for other in (row_uniforms(6, 0, range(10), 8), row_uniforms(5, 1, range(10), 8), numbers.flip(0)):
        assert (other - numbers).abs().min() > 0
    assert len(numbers.unique()) == numbers.numel()
    assert numbers.min() >= 0
    assert numbers.max() < 1
