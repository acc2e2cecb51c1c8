"""YAML that gives back what it was given, merging that shares nothing, and the nearest known name."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solotune.config.values import nearest, shown
from solotune.config.yaml import merged, parse_yaml, to_yaml

names = st.text("abc_-.e019 #:é\n", min_size=1, max_size=6)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.from_regex(r"[-+]?[0-9]{1,2}\.?[0-9]?[eE][-+]?[0-9]{1,2}", fullmatch=True)
    | st.sampled_from(
        [
            "1e-4",
            "yes",
            "null",
            "none",
            "0x1F",
            "1_000",
            "2020-01-01",
            "12:30",
            "~",
            "<<",
            "=",
            "- a",
            "a\x85",
            "\u2028b",
            "\r\n",
        ]
    )
)
free_dicts = st.dictionaries(
    names,
    st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3)),
    max_size=4,
)


@settings(max_examples=80, deadline=None)
@given(free_dicts)
def test_yaml_gives_back_what_it_was_given(values):
    assert parse_yaml(to_yaml(values), "test") == values


@given(free_dicts, free_dicts)
def test_merging_changes_neither_side_and_later_values_win(base, changes):
    before = copy.deepcopy((base, changes))
    result = merged({"section": {"setting": base}}, {"section": {"setting": changes}})["section"]["setting"]
    assert (base, changes) == before
    assert set(result) == set(base) | set(changes)
    for key, value in changes.items():
        if not isinstance(value, dict):
            assert result[key] == value
    for key in base.keys() - changes.keys():
        assert result[key] == base[key]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("batchsize", "did you mean batch_size?"),
        ("BATCH_SIZE", "did you mean batch_size?"),
        ("lr", "did you mean kwargs.lr?"),
        ("lora_a", "did you mean lora_alpha?"),
        ("zzz", "known: batch_size, kwargs.lr, lora_alpha, lora_r"),
    ],
)
def test_the_nearest_name_is_offered(name, hint):
    assert nearest(name, ["lora_r", "lora_alpha", "batch_size", "kwargs.lr"]) == hint


def test_a_long_value_is_quoted_in_short():
    assert len(shown("x" * 5000)) <= 80
    assert len(shown(list(range(5000)))) <= 80
