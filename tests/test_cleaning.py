"""Texts of models show what they hold and do nothing."""

import unicodedata

import pytest

from solotune.cleaning import one_line, visible


def test_nothing_that_acts_is_left_of_any_character():
    every = "".join(map(chr, range(0x110000)))
    left = {c for c in visible(every) if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"}}
    assert left == {"\n", "\t"}
    visible(every).encode("utf-8")  # no lone surrogates


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b31m", "\\x9b31m"),
        ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("a\r\x00\x7f", "a\\x0d\\x00\\x7f"),
        ("\ud800", "\\ud800"),
        ("tag \U000e0041", "tag \\U000e0041"),
    ],
)
def test_what_would_act_is_written_out(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize("text", ["naïve — “quoted”", "日本語", "می‌خواهم", "👩‍🚀 ❤️", "two\nlines\tand a tab"])
def test_ordinary_writing_is_left_alone(text):
    assert visible(text) == text


def test_one_line_has_no_newline():
    assert one_line("a\nb\tc") == "a↵b c"
