"""The terminal's before/after table: what it shows, in which order, and that texts in it are inert."""

import io

import pytest
from rich.console import Console

from solotune.errors import DataError
from solotune.report.table import before_after_table


def record(prompt: str, output: str, reward) -> dict:
    return {"round": 0, "step": 0, "prompt": prompt, "output": output, "reward": reward, "finish": "length", "kl": 0.0}


def printed(table, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system="truecolor", no_color=False).print(table)
    return out.getvalue()


def test_markup_and_escapes_are_shown_not_obeyed():
    hostile = "[red]not red[/red] [link=file:///x]l[/link] \x1b[31mraw\x07 \u202eright"
    out = printed(
        before_after_table([record(hostile, hostile, 0.1)], [record(hostile, hostile, 0.9)], rows=1), width=400
    )
    assert out.count("[red]not red[/red] [link=file:///x]l[/link] \\x1b[31mraw\\x07 \\u202eright") == 3
    assert "\x1b[31mraw" not in out
    assert "\x07" not in out


def test_every_prompt_gets_a_row_before_one_gets_two():
    before = [record(prompt, f"{prompt}{i}", 0.5) for prompt in ("A", "B", "C") for i in range(4)]
    out = printed(before_after_table(before, before, rows=4))
    shown = [cell for cell in (f"{p}{i}" for p in "ABC" for i in range(4)) if cell in out]
    assert shown == ["A0", "A1", "B0", "C0"]


def test_means_are_over_all_samples_not_those_shown():
    before = [record("p", "x", reward) for reward in (0.0, 1.0, 0.5)]
    after = [record("p", "y", reward) for reward in (1.0, 1.0, None)]
    assert "Mean reward 0.500 before, 1.000 after (3 samples)" in printed(before_after_table(before, after, rows=1))


@pytest.mark.parametrize("after", [[], [record("other", "x", 1.0)]])
def test_evaluations_that_do_not_match_are_refused(after):
    with pytest.raises(DataError, match=f"1 samples before and {len(after)} after"):
        before_after_table([record("p", "x", 0.0)], after, rows=3)


def test_zero_rows_are_refused():
    with pytest.raises(DataError, match="at least 1 row, not 0"):
        before_after_table([], [], rows=0)
