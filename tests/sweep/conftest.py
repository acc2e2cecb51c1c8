"""Scripts that a sweep calls: one that answers at once, and what starts the command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from solotune.sweep import study
from solotune.sweep.job import Sweep
from solotune.sweep.space import read_plan
from solotune.sweep.study import run_sweep
from tests.tiny import import_path

# Notes every call, then does what a test writes behind it.
SCRIPT = """
import json, os, time
def main(hparams={}):
    x = hparams["method.x"]
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps({"x": x, "pid": os.getpid(), "at": time.time(), "hparams": hparams}) + "\\n")
"""
QUADRATIC = '    return {"reward/mean": -((x - 2) ** 2)}\n'


class Folder:
    """A folder with a script and a sweep file, which may be swept here or in another process."""

    def __init__(self, path):
        self.path = path

    def write(self, body=QUADRATIC, values="[0, 4]", strategy="uniform", more="", script=None, **tune):
        (self.path / "easy.py").write_text(SCRIPT + body if script is None else script)
        settings = {"mode": "max", "metric": "reward/mean", "num_samples": 4, **tune}
        text = f"tune_config: {json.dumps(settings)}\nmethod.x: {{strategy: {strategy}, values: {values}}}\n{more}"
        (self.path / "easy.yml").write_text(text)

    def sweep(self, out="out", retry_failed=False, **options):
        """Rows of a sweep that runs in this process."""
        plan = read_plan(self.path / "easy.yml")
        return run_sweep(Sweep(plan, self.path / "easy.py", self.path / out, **options), retry_failed)

    def start(self, *arguments):
        """`solotune` with these arguments, in this folder."""
        environment = {**os.environ, "PYTHONPATH": import_path(), "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "solotune.cli", *arguments],
            cwd=self.path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def calls(self):
        path = self.path / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", import_path())
    return Folder(tmp_path)


class FakeChild:
    """A trial without a process: it reports one value of `answers(x)` a look, and has ended when there is no more."""

    answers = staticmethod(lambda x: [-((x - 2) ** 2)])
    log = "nowhere"

    def __init__(self, folder, target, hparams, accelerate_config=None):
        self.left, self.told, self.n_told = list(self.answers(hparams["method.x"])), [], 0

    def exit_code(self):
        if not self.left:
            return 0
        self.told.append((len(self.told) * 8, float(self.left.pop(0))))
        return None

    def reports(self, metric):
        return self.told

    def failure(self, metric):
        return None

    def end(self):
        pass


@pytest.fixture
def fake(folder, monkeypatch):
    """The same folder where trials are no processes: for what is searched, not for how it runs."""
    monkeypatch.setattr(study, "Child", FakeChild)
    monkeypatch.setattr(study, "SECONDS_BETWEEN_LOOKS", 0)
    return folder
