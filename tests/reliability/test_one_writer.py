"""Two runs cannot write into one folder, and one that died does not keep others out."""

import os
import signal
import subprocess
import sys

import pytest

from solotune.errors import ConfigError
from solotune.runs.folder import RunFolder, read_lines
from tests.tiny import import_path

HOLDING = """
import pathlib, sys, time
from solotune.runs.folder import RunFolder
run = RunFolder(pathlib.Path(sys.argv[1]))
run.append(run.metrics, [{"round": 1}])
print("holding", flush=True)
time.sleep(100)
"""


@pytest.fixture
def other(tmp_path):
    environment = {**os.environ, "PYTHONPATH": import_path()}
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


@pytest.mark.parametrize("continued", [False, True])
def test_a_folder_that_is_written_to_is_refused_and_stays_as_it_is(other, tmp_path, continued):
    with pytest.raises(ConfigError, match=r"another run is writing into .*run.*--out"):
        RunFolder(tmp_path / "run", continued=continued)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == [{"round": 1}]


def test_a_killed_run_keeps_nobody_out(other, tmp_path):
    other.send_signal(signal.SIGKILL)
    other.wait()
    RunFolder(tmp_path / "run", continued=True).release()
    RunFolder(tmp_path / "run").release()
    assert read_lines(tmp_path / "run.1" / "metrics.jsonl") == [{"round": 1}]


def test_a_run_that_is_over_lets_the_next_one_in(tmp_path):
    RunFolder(tmp_path / "run").release()
    RunFolder(tmp_path / "run", continued=True).release()


def test_what_does_not_write_takes_no_lock(other, tmp_path):
    RunFolder(tmp_path / "run", writes=False).release()
