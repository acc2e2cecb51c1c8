"""Strings and dialogues to tokens: what is learned, where they end, how they are cut, what is refused."""

import logging

import pytest

from solotune.data.batches import collate
from solotune.data.dialogues import Phrase, checked_rewards, encode_samples, tokenize_dialogue
from solotune.errors import DataError
from tests.tiny import BOS, EOS, byte_tokenizer


def ids(text):
    return tuple(byte_tokenizer()(text)["input_ids"])


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def learned(samples, index=0):
    """The tokens of a sample that the model is asked for."""
    return [t for t, out in zip(samples.ids[index], samples.is_output[index], strict=True) if out]


def test_a_string_is_an_output_after_the_bos_and_ends_in_one_eos(tokenizer):
    assert tokenize_dialogue("ab", tokenizer) == [Phrase(False, (BOS,)), Phrase(True, (*ids("ab"), EOS))]
    assert tokenize_dialogue("ab<eos>", tokenizer) == tokenize_dialogue("ab", tokenizer), "one EOS and not two"
    assert tokenize_dialogue("<bos>ab", tokenizer) == tokenize_dialogue("ab", tokenizer), "one BOS and not two"


def test_a_dialogue_alternates_and_its_last_output_alone_ends(tokenizer):
    found = tokenize_dialogue(["q", "a", "r", "b"], tokenizer)
    assert found == [
        Phrase(False, ids("q")), Phrase(True, ids("a")), Phrase(False, ids("r")), Phrase(True, (*ids("b"), EOS)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        ("right", [(False, "abc"), (True, "de")]),
        ("left", [(False, "c"), (True, "def")]),
    ],
)
def test_what_is_too_long_is_cut_on_one_side_and_what_is_cut_on_the_right_does_not_end(tokenizer, side, expected):
    tokenizer.truncation_side = side
    found = tokenize_dialogue(("abc", "def"), tokenizer, max_length=5)
    wanted = [Phrase(is_output, ids(text)) for is_output, text in expected]
    if side == "left":
        wanted[-1] = Phrase(True, (*ids("def"), EOS))
    assert found == wanted


def test_where_the_prompt_is_cut_away_a_bos_stands_before_the_output_within_the_length(tokenizer):
    tokenizer.truncation_side = "left"
    assert tokenize_dialogue(("abc", "defg"), tokenizer, max_length=4) == [
        Phrase(False, (BOS,)), Phrase(True, (*ids("fg"), EOS)),
    ]  # fmt: skip


def test_empty_phrases_are_left_out(tokenizer):
    assert tokenize_dialogue(["", "a"], tokenizer) == [Phrase(False, (BOS,)), Phrase(True, (*ids("a"), EOS))]
    assert tokenize_dialogue(["q", "", "r", ""], tokenizer) == [
        Phrase(False, ids("q")), Phrase(False, ids("r")), Phrase(True, (EOS,)),
    ]  # fmt: skip


def test_special_tokens_of_the_tokenizer_come_before_a_prompt_once():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    given = [("q", "a"), ("<bos>q", "a"), "a"]
    with_bos = encode_samples(given, tokenizer, 32)
    assert [row.count(BOS) for row in with_bos.ids] == [1, 1, 1]
    assert encode_samples([("q", "a")], tokenizer, 32, add_special_tokens=False).ids == [[*ids("qa"), EOS]]


def test_only_outputs_are_learned_each_token_from_the_one_before(tokenizer):
    samples = encode_samples([["q", "ab", "r", "c"], "x"], tokenizer, 32)
    assert learned(samples) == [*ids("abc"), EOS]
    batch = collate(samples, [0, 1])
    flat = batch.ids_RS.flatten()
    assert batch.targets_N.tolist() == [*ids("abc"), EOS, *ids("x"), EOS]
    assert flat[batch.picks_N].tolist() == [*ids("qarc"), BOS, *ids("x")]
    assert batch.last_N.tolist() == [False] * 3 + [True] + [False, True]
    assert batch.sample_N.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "there are no samples"),
        (["a", ""], "sample 1 is empty"),
        (["a", ["", ""]], "sample 1 is empty"),
        ([["a", "b", "c"]], r"sample 0 has 3 phrases.*even"),
        ([[]], "sample 0 has 0 phrases"),
        ([["a", None]], "sample 0 holds a NoneType"),
        ([3.5], "sample 0 is a float"),
        ([["abcdefghijk", "l"]], "none of 1 samples has an output token within train.seq_length = 8"),
    ],
)
def test_what_cannot_be_learned_from_is_named(tokenizer, samples, said):
    with pytest.raises(DataError, match=said):
        encode_samples(samples, tokenizer, 8)


def test_what_is_cut_and_what_is_left_out_is_said_once(tokenizer, caplog):
    with caplog.at_level(logging.INFO, logger="solotune"):
        samples = encode_samples([["q", "abcdefghijk"], ["abcdefghijk", "l"], "ok"], tokenizer, 8)
    assert samples.index == [0, 2]
    assert "2 of 3 samples have more than train.seq_length = 8 tokens and are cut on the right" in caplog.text
    assert "1 of 3 samples have no output token left" in caplog.text
    assert EOS not in samples.ids[0]


def test_a_tokenizer_without_bos_or_eos_is_said_and_still_learned_from(caplog):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert tokenize_dialogue("a", tokenizer)[0] == Phrase(False, (EOS,)), "the EOS stands in for the BOS"
    tokenizer.eos_token = None
    samples = encode_samples(["abc", ["q", "a"]], tokenizer, 8)
    assert "the tokenizer has no EOS" in caplog.text
    assert samples.ids == [list(ids("abc")), list(ids("qa"))]
    batch = collate(samples, [0])
    assert batch.targets_N.tolist() == list(ids("bc")), "the first token follows nothing"


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([1.0], "1 rewards for 2 samples"),
        ([1.0, float("nan")], "the reward of sample 1 is nan"),
        ([float("inf"), 0.0], "the reward of sample 0 is inf"),
        ([1.0, None], "the reward of sample 1 is None"),
        ([1.0, "2"], "the reward of sample 1 is '2'"),
    ],
)
def test_rewards_are_one_finite_number_a_sample(rewards, said):
    with pytest.raises(DataError, match=said):
        checked_rewards(rewards, 2)


def test_rewards_may_be_an_array_or_a_tensor():
    import numpy as np
    import torch

    for given in (np.array([1, 2]), torch.tensor([1.0, 2.0]), [np.float32(1), torch.tensor(2)], [True, 2]):
        assert checked_rewards(given, 2) == [1.0, 2.0]


def test_packed_rows_hold_every_sample_once_and_are_no_longer_than_the_longest(tokenizer):
    texts = ["a" * n for n in (30, 3, 9, 12, 8, 1, 22, 6)]
    samples = encode_samples(texts, tokenizer, 64)
    plain, packed = (collate(samples, range(len(texts)), packs=packs) for packs in (False, True))
    assert packed.is_packed
    assert packed.ids_RS.shape[1] == plain.ids_RS.shape[1]
    assert len(packed.ids_RS) == 4
    for name in ("ids_RS", "positions_RS"):
        flat = [getattr(batch, name).flatten()[batch.slots_M].tolist() for batch in (plain, packed)]
        assert flat[0] == flat[1], name
    for batch in (plain, packed):
        assert (batch.segments_RS.flatten()[batch.slots_M] > 0).all()
        assert int((batch.segments_RS > 0).sum()) == len(batch.slots_M) == len(set(batch.slots_M.tolist()))
    assert plain.targets_N.tolist() == packed.targets_N.tolist()
