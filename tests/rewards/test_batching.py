"""Batches by length change speed, never a value or the order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from solotune.rewards.batching import by_length, logits

TEXTS = ["good", "the film is bad and dull", "a story", "it was a superb film with a plot that is great", "dire plot"]


@given(st.lists(st.integers(0, 40), max_size=40), st.integers(1, 100))
def test_every_text_is_in_one_batch_within_the_budget(lengths, budget):
    batches = list(by_length(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_logits_do_not_depend_on_the_batch(request, kind, batch_size):
    folder = request.getfixturevalue(kind)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    alone = [model.eval()(**tokenizer(text, return_tensors="pt")).logits[0, 0].item() for text in TEXTS]
    assert len(set(alone)) == len(alone)
    model.train()
    together = logits(model, tokenizer, TEXTS, 32, batch_size)
    assert together[:, 0].tolist() == pytest.approx(alone, abs=1e-5)
    assert model.training


def test_no_texts_and_an_empty_text(decoder):
    model = AutoModelForSequenceClassification.from_pretrained(decoder, num_labels=1, pad_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    assert logits(model, tokenizer, [], 32, 4).shape == (0, 1)
    assert torch.isfinite(logits(model, tokenizer, ["", "good"], 32, 4)).all()
