"""The benchmark: one JSON object on stdout, the promised keys, times that add up, the same work on every side."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.tiny import save_tiny

REPOSITORY = Path(__file__).resolve().parent.parent
BENCHMARK = REPOSITORY / "benchmarks" / "ppo_round.py"
PEERS = Path(os.environ.get("SOLOTUNE_PEERS") or REPOSITORY / ".venv-peers")
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


@pytest.fixture
def solotune_round(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    return importlib.import_module("solotune_round")


def test_has_every_promised_key(result: dict) -> None:
    assert result.keys() >= PROMISED | {
        "seconds_per_full_update",
        "seconds_of_matrix_products",
        "matrix_products_by_phase",
    }
    assert result["seconds_by_phase"].keys() == PHASES


def test_phases_make_up_the_round(result: dict) -> None:
    phases = result["seconds_by_phase"].values()  # medians of two rounds are means, so they add up
    assert all(seconds > 0 for seconds in phases)
    assert 0.7 * result["seconds_per_round"] < sum(phases) <= result["seconds_per_round"]


def test_numbers_are_in_the_units_they_are_named_after(result: dict) -> None:
    tokens = 8 * 6  # tiny: 8 rollouts of 6 tokens
    updates = 4 * 2  # 4 epochs of 2 batches
    assert result["tokens_per_second"] * result["seconds_per_round"] == pytest.approx(tokens)
    assert result["seconds_per_update"] * updates == pytest.approx(result["seconds_by_phase"]["update"])
    assert 50e6 < result["peak_memory_bytes"] < 4e9  # torch alone is above the one, a tiny model below the other


@pytest.mark.skipif(not (PEERS / "trl").exists(), reason=f"no environment of TRL in {PEERS / 'trl'}")
def test_peer_reports_the_same_keys() -> None:
    finished = run("--shape", "tiny", "--rounds", "1", "--peer", "trl", "--json")
    assert finished.returncode == 0, finished.stderr
    both = json.loads(finished.stdout)
    assert both["peer"].keys() >= PROMISED
    assert both["peer"]["seconds_by_phase"].keys() == PHASES
    assert both["ratio"] == pytest.approx(both["peer"]["seconds_per_round"] / both["seconds_per_round"])


def test_full_update_learns_from_the_same_numbers_as_ours(solotune_round: ModuleType, tmp_path: Path) -> None:
    shape = importlib.import_module("shapes").SHAPES["tiny"]
    trainer = solotune_round.build_trainer(shape, "cpu", "float32", str(tmp_path))
    trainer.train_round()  # moves the adapter away from zero, where it would not be seen
    rollouts = trainer.sample_rollouts()
    assert rollouts.response_ids_NT.shape == (shape.rollouts, shape.new_tokens)
    assert rollouts.response_mask_NT.all()  # nothing ends early, whatever is drawn
    ours = trainer.policy("update", rollouts, 1.0)
    whole = solotune_round.WholeModel(trainer.model)("update", rollouts, 1.0)
    torch.testing.assert_close(whole.logprobs_bT, ours.logprobs_bT, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.values_bT, ours.values_bT, atol=1e-5, rtol=0)


def test_rollouts_that_do_not_divide_are_refused_with_a_number_that_works() -> None:
    finished = run("--shape", "tiny", "--rollouts", "7", "--json")
    assert finished.returncode != 0
    assert finished.stdout == ""
    assert "--rollouts 7" in finished.stderr
    assert "try --rollouts 8" in finished.stderr


def test_the_gpu_benchmark_on_a_cpu(tmp_path):
    """Every part of it, on tiny shapes; what it says of a GPU is not tested here."""
    out = tmp_path / "tiny.json"
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks" / "gpu.py"),
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--out",
        str(out),
    ]
    subprocess.run(
        [*command, "--model", str(save_tiny(tmp_path / "model"))], check=True, capture_output=True, timeout=200
    )
    result = json.loads(out.read_text())
    assert [name for name, part in result.items() if isinstance(part, dict) and "failed" in part] == []
    assert result["parity"]["all"] is True
    assert result["round"]["seconds_of_625_rounds"] == 625 * result["round"]["seconds_per_round"]
    assert set(result["decode"]) >= {"1", "4", "copy_bytes_per_second"}
    assert len(result["learn"]["reward_by_round"]) == 30
    assert 0 < result["round"]["largest_logprob_gap"] < 1e-4
    assert result["round"]["is_captured"] is False
    assert result["7b"]["peak_memory_bytes"] > 2**20


def test_a_part_that_fails_or_dies_leaves_the_others(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    in_a_process = importlib.import_module("gpu").in_a_process
    assert "ZeroDivisionError" in in_a_process(divmod, 1, 0)["failed"]
    assert in_a_process(os._exit, 3)["failed"] == "the process died (exit status 3)"
    assert in_a_process(dict, {"x": 1})["x"] == 1
