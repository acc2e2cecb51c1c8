"""Killed at any instant, resumed by the command that the run printed: the end is that of a run nothing happened to.

Ten instants; SOLOTUNE_KILLS=50 (`make soak`) tries 53.
"""

import json
import os
import random
import re
import shlex
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from solotune.runs.folder import read_lines
from tests.reliability.dying import LAST, solotune_command
from tests.tiny import tiny_ppo_config


@pytest.fixture(scope="module")
def recipe(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "reward.py").write_text("def vowels(outputs, **_):\n    return [o.count('a') / 6 for o in outputs]\n")
    values = (
        tiny_ppo_config(tiny_folder).evolve(train={"epochs": 6}, method={"target": 3.0, "init_kl_coef": 0.1}).to_dict()
    )
    values["data"] = {"prompts": ["a film", "another film"], "eval_repeats": 2}
    values["reward"] = {"function": f"{folder / 'reward.py'}:vowels"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = solotune_command("train", recipe, "--out", folder, logs=folder.with_suffix(".log"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stderr.splitlines()[-1]) == LAST
    return folder


def assert_equal(run, whole):
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    timed = ("time/", "memory/", "rollout/tokens_per_second")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_lines(folder / "metrics.jsonl")]
        for folder in (run, whole)
    ]
    assert rows[0] == rows[1]


def instants():
    draw = random.Random(7)
    chosen = [("disk", 9), ("step", 10), ("reward", 5)]
    for _ in range(int(os.environ.get("SOLOTUNE_KILLS", "7"))):
        where = draw.choice(sorted(LAST))
        chosen.append((where, draw.randint(1, LAST[where])))
    return chosen


@pytest.mark.parametrize(("where", "at"), instants())
def test_kill_and_resume(recipe, whole, tmp_path, where, at):
    run = tmp_path / "run"
    killed = solotune_command("train", recipe, "--out", run, logs=tmp_path / "log", where=where, at=at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    said = re.search(r"after an interruption: go on with: solotune (train .*)", killed.stdout)
    arguments = shlex.split(said[1]) if said else ["train", str(recipe), "--out", str(run)]
    resumed = solotune_command(*arguments, logs=tmp_path / "log")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_equal(run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_saves_first(recipe, whole, tmp_path, number):
    run = tmp_path / "run"
    stopped = solotune_command(
        "train", recipe, "--out", run, logs=tmp_path / "log", where="step", at=6, number=int(number)
    )
    assert stopped.returncode == 128 + number, stopped.stderr[-2000:]
    assert "stopped after 1 rounds and 6 steps; saved" in stopped.stdout  # in the middle of the second round's four
    assert len(read_lines(run / "metrics.jsonl")) == 1
    resumed = solotune_command("train", run / "config.yaml", "--resume", "--out", run, logs=tmp_path / "log")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_equal(run, whole)
