"""The benchmark's contract: one JSON object on stdout, with the promised keys, and times that add up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "ppo_round.py"
PROMISED = {
    "shape",
    "device",
    "seconds_per_round",
    "seconds_by_phase",
    "seconds_per_update",
    "tokens_per_second",
    "peak_memory_bytes",
}
PHASES = {"sample", "score", "measure", "credit", "update"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def result() -> dict:
    finished = run("--shape", "tiny", "--rounds", "2", "--json")
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)  # fails when anything else stands on stdout


def test_has_every_promised_key(result: dict) -> None:
    assert PROMISED | {"seconds_per_full_update", "seconds_of_matrix_products"} <= result.keys()
    assert result["seconds_by_phase"].keys() == PHASES


def test_phases_make_up_the_round(result: dict) -> None:
    assert all(seconds > 0 for seconds in result["seconds_by_phase"].values())
    assert 0.5 * result["seconds_per_round"] < sum(result["seconds_by_phase"].values())
    assert sum(result["seconds_by_phase"].values()) < 1.5 * result["seconds_per_round"]


def test_numbers_are_in_the_units_they_are_named_after(result: dict) -> None:
    tokens = 8 * 6  # tiny: 8 rollouts of 6 tokens
    assert result["tokens_per_second"] * result["seconds_per_round"] == pytest.approx(tokens)
    updates = 16 // 2  # tiny: 4 epochs of 2 batches
    assert result["seconds_per_update"] * updates == pytest.approx(result["seconds_by_phase"]["update"], rel=0.5)
    assert 50e6 < result["peak_memory_bytes"] < 4e9  # torch alone is above the one, a tiny model below the other


def test_rollouts_that_do_not_divide_are_refused_with_a_number_that_works() -> None:
    finished = run("--shape", "tiny", "--rollouts", "7", "--json")
    assert finished.returncode != 0
    assert finished.stdout == ""
    assert "--rollouts 7" in finished.stderr
    assert "try --rollouts 8" in finished.stderr
