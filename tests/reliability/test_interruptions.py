"""Killed at any instant, resumed by the command that the run printed: the end is that of a run nothing happened to.

SOLOTUNE_KILLS=50 (`make soak`) tries as many instants as that.
"""

import os
import random
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from solotune.trainers.run_folder import read_lines
from tests.tiny import import_path, tiny_ppo_config

# The reward counts its calls, and so do steps and files that reach the disk; at the chosen one the process dies.
DYING = """
import os, signal, sys
import solotune.trainers.checkpoint as checkpoint
import solotune.trainers.ppo as ppo
import solotune.rewards.functions as functions
from solotune.cli import main

where, at, number = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
count = 0

def dying(function):
    def counted(*args, **kwargs):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)
    return counted

if where == "reward":
    import solotune.rewards.guard as guard
    guard.score = dying(guard.score)
elif where == "step":
    ppo.PPOTrainer.optimizer_step = dying(ppo.PPOTrainer.optimizer_step)
elif where == "sample":
    ppo.PPOTrainer.sample_rollouts = dying(ppo.PPOTrainer.sample_rollouts)
elif where == "disk":
    checkpoint._to_disk = dying(checkpoint._to_disk)
main()
"""
LAST = {"reward": 13, "step": 24, "sample": 6, "disk": 80}  # how often each happens in a whole run, at least


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


def start(*arguments, where="nowhere", at=0, number=9):
    command = [sys.executable, "-c", DYING, where, str(at), str(number), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": import_path(), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = start("train", recipe, "--out", folder)
    assert result.returncode == 0, result.stderr[-3000:]
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
    for _ in range(int(os.environ.get("SOLOTUNE_KILLS", "0"))):
        where = draw.choice(sorted(LAST))
        chosen.append((where, draw.randint(1, LAST[where])))
    return chosen


@pytest.mark.parametrize(("where", "at"), instants())
def test_kill_and_resume(recipe, whole, tmp_path, where, at):
    run = tmp_path / "run"
    killed = start("train", recipe, "--out", run, where=where, at=at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    said = re.search(r"after an interruption: go on with: solotune (train .*)", killed.stdout)
    arguments = shlex.split(said[1]) if said else ["train", str(recipe), "--out", str(run)]
    resumed = start(*arguments)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_equal(run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_saves_first(recipe, whole, tmp_path, number):
    run = tmp_path / "run"
    stopped = start("train", recipe, "--out", run, where="step", at=6, number=int(number))
    assert stopped.returncode == 128 + number, stopped.stderr[-2000:]
    assert "stopped after 1 rounds and 6 steps; saved" in stopped.stdout  # in the middle of the second round's four
    assert len(read_lines(run / "metrics.jsonl")) == 1
    resumed = start("train", run / "config.yaml", "--resume", "--out", run)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_equal(run, whole)
