"""What is said while something takes long: lines in a file, bars on a terminal, nothing of other libraries."""

import contextlib
import io
import re
import sys
import warnings

import pytest
import transformers
from huggingface_hub.utils import are_progress_bars_disabled
from rich.console import Console
from rich.table import Table

from solotune import progress
from solotune.progress import duration, phase_progress, say, show, tracked
from solotune.quiet import quiet_datasets, quiet_libraries
from solotune.runs.console import Rounds, round_progress, show_logs


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr("solotune.progress.time", clock)
    monkeypatch.setattr("solotune.runs.console.time", clock)
    return clock


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 100 columns; what was written to it."""
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(force_terminal=True, file=out, width=100))
    return out


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "0 s"), (31.4, "31 s"), (59.7, "1 min 0 s"), (252, "4 min 12 s"), (3900, "1 h 5 min"), (180000, "2 d 2 h")],
)
def test_durations_have_two_parts_at_most(seconds, said):
    assert duration(seconds) == said


def test_a_phase_tells_about_every_ten_seconds_and_what_is_left_shrinks(clock, capsys):
    for _ in tracked(range(300), "reward model"):
        clock.now += 0.5
    first, *between, last = capsys.readouterr().out.splitlines()
    assert first == "reward model: 300 steps"
    assert last == "reward model: 300 steps in 2 min 30 s"
    assert 10 <= len(between) <= 15
    done, left = zip(
        *(re.fullmatch(r"reward model: (\d+) of 300 steps, (.*) left", x).groups() for x in between), strict=True
    )
    assert [int(n) for n in done] == sorted({int(n) for n in done})
    seconds = [sum(int(n) * {"min": 60, "s": 1}[unit] for n, unit in re.findall(r"(\d+) (min|s)", x)) for x in left]
    assert seconds == sorted(set(seconds), reverse=True)


@pytest.mark.parametrize(("seconds", "n_lines"), [(3, 1), (11, 2)])
def test_a_phase_of_unknown_length_says_how_long_it_took_if_that_was_long(clock, capsys, seconds, n_lines):
    with phase_progress("converting"):
        clock.now += seconds
    assert capsys.readouterr().out.splitlines() == ["converting", "converting: 11 s"][:n_lines]


def test_a_phase_that_was_short_before_begins_without_a_line_and_one_that_fails_ends_without_one(clock, capsys):
    with phase_progress("evaluating", expected=0.1):
        clock.now += 0.1
    with contextlib.suppress(ValueError), phase_progress("converting", expected=0.1):
        clock.now += 100
        raise ValueError
    with phase_progress("loading", shown=False) as phase:
        clock.now += 100
        phase.doing("this")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "told"), [(6.0, 40), (0.5, 3)])
def test_rounds_are_told_each_where_they_are_long_and_the_last_one_always(clock, capsys, seconds, told):
    with round_progress(40, 0, shown=True) as rounds:
        for index in range(40):
            rounds.doing("sampling")
            clock.now += seconds
            rounds.end_round({"objective/score": index / 40, "objective/kl": 1.83})
    lines = [line for line in capsys.readouterr().out.splitlines() if "score" in line]
    assert abs(len(lines) - told) <= 1
    assert lines[0].startswith("round ")
    assert lines[-1] == f"round 40 of 40: score 0.975, KL 1.83, {duration(seconds, 1)} a round"
    assert all(re.search(r"KL 1\.83, .* a round, .* left$", line) for line in lines[:-1])


def test_an_evaluation_is_no_part_of_a_rounds_time_but_of_what_is_left(clock):
    rounds = Rounds(10, done=4, after=30.0)
    for _ in range(2):
        clock.now += 20
        rounds.end_round({})
    clock.now += 500
    rounds.evaluated(500.0)
    rounds.end_round({})
    assert rounds.left == pytest.approx(40 / 3 * 3 + 500)


def test_steps_say_what_is_left_of_a_long_round(clock, capsys):
    with round_progress(1, 0, shown=True) as rounds:
        for step in range(1, 101):
            clock.now += 1
            rounds.step(step, 100)
        rounds.end_round({"objective/loss": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert "round 1 of 1: step 20 of 100, 1 min 20 s left" in lines
    assert lines[-1] == "round 1 of 1: loss 0.500, 1 min 40 s a round"


def test_lines_in_a_file_are_neither_padded_nor_wrapped_nor_do_they_steer(capsys):
    show_logs()
    say("x " * 300 + "\x1b[31m" + "[red]")
    table = Table("a", "b", title="t")
    table.add_row("1", "2")
    show(table)
    long, *rest = capsys.readouterr().out.splitlines()
    assert long == "x " * 300 + "\\x1b[31m[red]"
    assert all(line == line.rstrip() and len(line) <= progress.FILE_WIDTH for line in rest)
    assert "│ 1 │ 2 │" in rest


def test_a_terminal_has_bars_one_below_the_other_and_keeps_what_was_long(clock, terminal):
    with round_progress(40, 0, shown=True) as rounds:
        clock.now += 9
        rounds.end_round({"objective/score": 0.5})
        with phase_progress("evaluating") as phase:
            phase.doing("measuring")
            progress._bars.refresh()
            drawn = terminal.getvalue()
            clock.now += 20
    assert re.search(r"rounds.*━.*1/40.*score 0\.500.*left", drawn)
    assert re.search(r"evaluating.*━.*measuring", drawn)
    kept = terminal.getvalue()[len(drawn) :]
    assert "evaluating: 20 s\n" in kept
    assert "round 1 of 40: score 0.500" in kept
    assert progress._bars is None


def test_a_dumb_terminal_has_lines(clock, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with phase_progress("loading"):
        pass
    assert terminal.getvalue() == "loading\n"


@pytest.mark.parametrize("shown", [True, False])
def test_other_libraries_are_quiet_for_a_while_and_then_as_before(shown):
    logging = transformers.utils.logging
    state = lambda: (logging.is_progress_bar_enabled(), logging.get_verbosity(), are_progress_bars_disabled())  # noqa: E731
    conftest = state()
    try:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        logging.set_verbosity_info()
        before = state()
        with contextlib.suppress(ValueError), warnings.catch_warnings(), quiet_libraries():
            warnings.simplefilter("error")
            assert state() == (False, logging.ERROR, True)
            raise ValueError
        assert state() == before
    finally:
        (logging.enable_progress_bar if conftest[0] else logging.disable_progress_bar)()
        logging.set_verbosity(conftest[1])


def test_datasets_are_quiet_while_they_are_read():
    import datasets

    before = datasets.utils.are_progress_bars_disabled()
    with quiet_datasets():
        assert datasets.utils.are_progress_bars_disabled()
    assert datasets.utils.are_progress_bars_disabled() == before


def test_the_mechanism_imports_no_heavy_library():
    import subprocess

    code = "import sys; import solotune.progress; print({'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
