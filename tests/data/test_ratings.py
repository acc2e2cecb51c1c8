"""Feedback is read with its faults named, and no text is ever on both sides of a split."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solotune.data.ratings import Pairs, Ratings, load_feedback, split
from solotune.errors import DataError

DEFAULTS = {
    "text_column": "text",
    "rating_column": "rating",
    "low": -4.0,
    "high": 4.0,
    "chosen_column": "chosen",
    "rejected_column": "rejected",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=60), st.integers(1, 5), st.integers(0, 9))
def test_no_group_is_on_both_sides_and_no_row_is_lost(groups, holdout, seed):
    try:
        parts = split(groups, holdout, seed)
    except DataError:
        return
    assert len(parts.heldout) == holdout
    assert sorted(parts.train + parts.heldout) == list(range(len(groups)))
    assert not {groups[i] for i in parts.train} & {groups[i] for i in parts.heldout}


def test_the_split_is_the_seeds():
    groups = [str(i) for i in range(100)]
    assert split(groups, 20, 1) == split(groups, 20, 1)
    assert split(groups, 20, 1) != split(groups, 20, 2)


def test_a_holdout_that_leaves_nothing_is_an_error():
    with pytest.raises(DataError, match="cannot hold out 1000 of 3 rows"):
        split(["a", "b", "c"], 1000, 0)
    with pytest.raises(DataError, match="holdout"):
        split(["a", "b", "c"], 2, 0)


def test_texts_that_differ_in_case_and_punctuation_are_one_group():
    assert len(set(Ratings(["A film.", "a film", "a  film!", "a firm"], [0.0] * 4).groups())) == 2


def test_ratings_come_with_their_texts(tmp_path):
    source = write(tmp_path / "r.jsonl", [{"text": "good", "rating": 3}, {"text": "bad", "rating": "-2.5"}])
    assert load_feedback(source, "ratings", **DEFAULTS) == Ratings(["good", "bad"], [3.0, -2.5])


@pytest.mark.parametrize("rating", [4.5, "good", None, float("nan"), True])
def test_a_rating_outside_its_range_names_row_and_range(tmp_path, rating):
    source = write(tmp_path / "r.jsonl", [{"text": "a", "rating": 1}, {"text": "b", "rating": rating}])
    with pytest.raises(DataError, match=r"row 1.*'rating'.*-4 to 4.*rating_min"):
        load_feedback(source, "ratings", **DEFAULTS)


def test_missing_columns_and_empty_texts_are_named(tmp_path):
    with pytest.raises(DataError, match=r"row 0 has no column 'rating'; it has text, stars"):
        load_feedback(write(tmp_path / "a.jsonl", [{"text": "a", "stars": 1}]), "ratings", **DEFAULTS)
    with pytest.raises(DataError, match="row 0: column 'text'"):
        load_feedback(write(tmp_path / "b.jsonl", [{"text": " ", "rating": 1}]), "ratings", **DEFAULTS)
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        load_feedback(str(tmp_path / "c.jsonl"), "ratings", **DEFAULTS)
    with pytest.raises(DataError, match="no human feedback"):
        load_feedback("asset:minilm-l6", "ratings", **DEFAULTS)


def test_dialogues_are_split_by_what_they_share(tmp_path):
    shared = "\n\nHuman: hello?\n\nAssistant:"
    rows = [{"chosen": f"{shared} hi {i}", "rejected": f"{shared} ho {i}"} for i in range(3)]
    pairs = load_feedback(write(tmp_path / "hh.jsonl", rows), "pairs", **DEFAULTS)
    assert isinstance(pairs, Pairs)
    assert pairs.chosen[1] == f"{shared} hi 1"
    assert len(set(pairs.groups())) == 1
    assert shared.startswith(pairs.prompts[0])
    assert "hello" in pairs.prompts[0]


def test_a_prompt_is_put_before_both_answers_once(tmp_path):
    rows = [
        {"prompt": "Q: ", "chosen": "yes", "rejected": "no"},
        {"prompt": "Q: ", "chosen": "Q: yes", "rejected": "Q: no"},
    ]
    pairs = load_feedback(write(tmp_path / "p.jsonl", rows), "pairs", **DEFAULTS)
    assert isinstance(pairs, Pairs)
    assert pairs.chosen == ["Q: yes", "Q: yes"]
    assert pairs.rejected == ["Q: no", "Q: no"]


def test_pairs_of_equal_texts_say_nothing_and_are_left_out(tmp_path, caplog):
    rows = [{"chosen": "a", "rejected": "a"}, {"chosen": "b", "rejected": "a"}]
    with caplog.at_level("INFO"):
        pairs = load_feedback(write(tmp_path / "p.jsonl", rows), "pairs", **DEFAULTS)
    assert (pairs.chosen, pairs.rejected) == (["b"], ["a"])
    assert "1 rows left out" in caplog.text
    with pytest.raises(DataError, match=r"the same in every row"):
        load_feedback(write(tmp_path / "p.jsonl", rows[:1]), "pairs", **DEFAULTS)


def test_for_the_pairs_objective_ratings_stay_ratings(tmp_path):
    source = write(tmp_path / "r.jsonl", [{"text": "good", "rating": 3}])
    assert load_feedback(source, "pairs", **DEFAULTS) == Ratings(["good"], [3.0])
    with pytest.raises(DataError, match="no column 'chosen'"):
        load_feedback(write(tmp_path / "x.jsonl", [{"rejected": "a", "rating": 3}]), "pairs", **DEFAULTS)
