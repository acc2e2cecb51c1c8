"""A run's files survive odd texts, odd numbers and a crash."""

import json
import math

import pytest

from solotune.errors import ConfigError
from solotune.runs.folder import RunFolder, read_lines

ODD = "line\u2028separator, paragraph\u2029, next\x85line\r, tab\t"


def test_texts_with_other_line_separators_come_back(tmp_path):
    run = RunFolder(tmp_path / "run")
    rows = [{"round": i, "output": ODD * i} for i in range(4)]
    run.append(run.samples, rows)
    assert read_lines(run.samples) == rows


def test_a_last_line_that_was_cut_is_left_out(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.append(run.metrics, [{"round": 1}, {"round": 2}])
    whole = run.metrics.read_text()
    for length in range(len(whole)):
        run.metrics.write_text(whole[:length])
        assert [row["round"] for row in read_lines(run.metrics)] == [1, 2][: whole[:length].count("}")]


def test_numbers_that_json_has_no_name_for_become_null(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.append(run.metrics, [{"round": 1, "x": math.nan, "y": [math.inf, 1.0]}])
    assert json.loads(run.metrics.read_text(), parse_constant=lambda name: 1 / 0) == {
        "round": 1,
        "x": None,
        "y": [None, 1.0],
    }


def test_cutting_back_keeps_the_rounds_up_to_the_checkpoint(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.append(run.samples, [{"round": i, "output": ODD} for i in range(5)])
    run.cut_after(2)
    assert [row["round"] for row in read_lines(run.samples)] == [0, 1, 2]
    run.cut_after(-1)
    assert read_lines(run.samples) == []


def test_another_process_writes_nothing(tmp_path):
    run = RunFolder(tmp_path / "run", writes=False)
    run.append(run.metrics, [{"round": 1}])
    run.write_json("summary.json", {})
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_runs_is_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "keep.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds files that are no run's.*--out"):
        RunFolder(tmp_path / "notes")
    assert (tmp_path / "notes" / "keep.txt").read_text() == "mine"
