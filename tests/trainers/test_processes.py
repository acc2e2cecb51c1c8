"""Two processes on the CPU take the steps of one, and resume as one does."""

import json
import os
import runpy
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from solotune.runs.folder import read_lines
from tests.forks import fork
from tests.tiny import import_path, save_tiny

SCRIPT = """
import sys, json
import solotune
from tests.tiny import tiny_ppo_config
from pathlib import Path

def reward(outputs, **_):
    return [sum(c in "aeiou" for c in o) / 6 for o in outputs]

folder, out, sections = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
config = tiny_ppo_config(folder, **sections).evolve(train={"checkpoint_dir": out, "run_name": "run"})
config.train.run_name = "run"
solotune.train(reward_fn=reward, prompts=["a film", "another film, a longer one", "so", "what"], config=config)
"""


def launch(processes, script, folder, out, sections):
    """Runs a script in processes that know of each other by what a launcher tells them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    forks = [
        fork(run_script, script, [folder, out, json.dumps(sections)], logs=script.with_name(f"{script.stem}-{rank}"),
             ACCELERATE_USE_CPU="true", RANK=str(rank), LOCAL_RANK=str(rank), **together)
        for rank in range(processes)
    ]  # fmt: skip
    for result in [one.ended() for one in forks]:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out / "run"


def run_script(script, arguments):
    sys.argv = [str(script), *map(str, arguments)]
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "run.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize("model", [{}, {"delta_kwargs": None}], ids=["lora", "last two blocks"])
def test_two_processes_take_the_step_of_one_with_twice_the_batch(tiny_folder, tmp_path, script, model):
    """Batch 4 on each of two processes, and 8 on one: the same rollouts, advantages, gradient and parameters."""
    gen = {"max_new_tokens": 6, "eos_token_id": list(range(60))}  # different numbers of tokens on each process
    common = {
        "model": model,
        "optimizer": {"kwargs": {"lr": 1.0, "eps": 1.0}},
        "method": {"gen_kwargs": gen, "ppo_epochs": 1},
    }
    runs = []
    for processes in (1, 2):
        n = 8 // processes
        sections = {**common, "train": {"batch_size": n, "epochs": 1}}
        sections["method"] = {**common["method"], "num_rollouts": n, "chunk_size": n}
        runs.append(launch(processes, script, tiny_folder, tmp_path / str(processes), sections))
    one, two = (load_file(next(run.glob("checkpoints/step_*/tensors.safetensors"))) for run in runs)
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-4, msg=name)
    first, second = (read_lines(run / "metrics.jsonl")[0] for run in runs)
    for key in (
        "objective/score",
        "objective/kl",
        "objective/entropy",
        "policy/loss",
        "value/loss",
        "rollout/response_tokens",
    ):
        assert second[key] == pytest.approx(first[key], abs=1e-5), key
    outputs = [[row["output"] for row in read_lines(run / "samples.jsonl") if row["round"] == 0] for run in runs]
    assert outputs[0] == outputs[1]


def test_rejection_sampling_on_two_processes_takes_the_step_of_one(tiny_folder, tmp_path, script):
    """Two processes share the prompts out: the same samples, and one step on the same selection together."""
    changed = script.with_name("rft.py")
    changed.write_text(
        SCRIPT.replace("from tests.tiny import tiny_ppo_config", "from tests.trainers.test_rft import rft_config")
        .replace("tiny_ppo_config", "rft_config")
        .replace(', "so", "what"]', ', "so"]')  # three prompts: shares of two and one
    )
    runs = []
    for processes in (1, 2):
        sections = {
            "train": {"batch_size": 32 // processes, "epochs": 2, "minibatch_size": 2},
            "optimizer": {"kwargs": {"lr": 1.0, "eps": 1.0}},
            "method": {"gen_kwargs": {"max_new_tokens": 6, "eos_token_id": list(range(60))}},
        }
        runs.append(launch(processes, changed, tiny_folder, tmp_path / str(processes), sections))
    one, two = (load_file(next(run.glob("checkpoints/step_*/tensors.safetensors"))) for run in runs)
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-4, msg=name)
    first, second = (read_lines(run / "metrics.jsonl")[0] for run in runs)
    assert first["step"] == second["step"] == 2
    for key in ("objective/score", "objective/selected_score", "objective/loss", "rollout/selected"):
        assert second[key] == pytest.approx(first[key], abs=1e-5), key


def test_processes_with_unequal_shares_of_the_evaluation_do_not_wait_for_each_other(tmp_path, script):
    """Three evaluation prompts on two processes, on a model that has buffers (rotary frequencies)."""
    folder = save_tiny(tmp_path / "llama", "llama")
    sections = {"train": {"epochs": 1, "minibatch_size": 1}, "method": {"chunk_size": 1}}
    changed = script.with_name("unequal.py")
    changed.write_text(SCRIPT.replace("config=config)", 'eval_prompts=["a", "bb", "ccc"], config=config)'))
    run = launch(2, changed, folder, tmp_path / "runs", sections)
    assert len(read_lines(run / "samples.jsonl")) == 2 * 3


def test_functions_of_a_script_are_called_on_the_first_process_with_all_samples(tiny_folder, tmp_path, script):
    """As in trlX, whose scripts give the other processes anything but a function; the shares are unequal."""
    changed = script.with_name("first.py")
    changed.write_text(
        SCRIPT.replace(
            "folder, out, sections",
            """
import os
sizes = []
def metric(outputs, wanted, **_):
    return {"together": float(len(outputs)), "wanted": wanted}
def first(outputs, wanted, **_):
    assert len(outputs) == len(wanted)
    sizes.append(len(outputs))
    return [float(n) for n in wanted]
if os.environ["RANK"] != "0":
    first = metric = True

folder, out, sections""",
        ).replace(
            'reward_fn=reward, prompts=["a film", "another film, a longer one", "so", "what"]',
            "reward_fn=first, metric_fn=metric, prompts=[{'prompt': p, 'wanted': i} for i, p in enumerate('abcd')], "
            "eval_prompts=[{'prompt': p, 'wanted': 10 * i} for i, p in enumerate('abc')]",
        )
        + "print('sizes', sizes)\n"
    )
    run = launch(2, changed, tiny_folder, tmp_path / "runs", {"train": {"epochs": 1}})
    samples = read_lines(run / "samples.jsonl")
    assert [sample["reward"] for sample in samples[:3]] == [0.0, 10.0, 20.0]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"] == {"together": 3.0, "wanted": 10.0}
    changed.write_text(changed.read_text().replace("return [float(n) for n in wanted]", "raise KeyError('mine')"))
    with pytest.raises(AssertionError, match="mine"):
        launch(2, changed, tiny_folder, tmp_path / "again", {"train": {"epochs": 1}})


def test_accelerate_launch_starts_two_processes_that_leave_one_set_of_files(tiny_folder, tmp_path, script):
    # Accelerate starts several processes on a CPU with its launcher for several GPUs, told that there are none.
    options = "--num_machines 1 --dynamo_backend no --mixed_precision no --main_process_port 0 --num_processes 2"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--multi_gpu", str(script)]
    environment = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": import_path()}
    result = subprocess.run(
        [*command, str(tiny_folder), str(tmp_path), json.dumps({"train": {"epochs": 2}})],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    run = tmp_path / "run"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert [row["round"] for row in read_lines(run / "metrics.jsonl")] == [1, 2]
    assert len(read_lines(run / "samples.jsonl")) == 3 * 4
    assert json.loads((run / "summary.json").read_text())["rounds"] == 2
    assert (run / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("model", [{}, {"delta_kwargs": None}], ids=["lora", "last two blocks"])
def test_two_processes_resume_to_the_same_bits(tiny_folder, tmp_path, script, model):
    """One round and one more after it is what two rounds are; the rewards draw random numbers on both processes."""
    changed = script.with_name("drawing.py")
    changed.write_text(
        SCRIPT.replace("for o in outputs]", "+ random.random() for o in outputs]").replace(
            "import sys", "import random, sys"
        )
    )
    common = {"model": model, "method": {"target": 1.0, "init_kl_coef": 0.1, "scale_reward": "running"}}
    whole = launch(2, changed, tiny_folder, tmp_path / "whole", {**common, "train": {"epochs": 2}})
    parts = launch(2, changed, tiny_folder, tmp_path / "parts", {**common, "train": {"epochs": 1}})
    assert [path.name for path in (parts / "checkpoints").glob("step_*")] == ["step_000004"]
    train = {"epochs": 2, "resume_from_checkpoint": str(parts)}
    launch(2, changed, tiny_folder, tmp_path / "parts", {**common, "train": train})
    one, other = (load_file(run / "checkpoints" / "step_000008" / "tensors.safetensors") for run in (whole, parts))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert (whole / "samples.jsonl").read_text() == (parts / "samples.jsonl").read_text()


OFFLINE = """
import sys, json
import solotune
from tests.tiny import tiny_offline_config
from pathlib import Path

folder, out, sections = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
kind = sections.pop("kind")
config = tiny_offline_config(folder, kind, **sections).evolve(train={"checkpoint_dir": out, "run_name": "run"})
samples = [["a film", " good"], ["b", " another, longer answer"], ["so", " no"], "a text", ["x", "y", "z", "w"],
           ["q", "r"], ["what", " is it"]]
rewards = [1.0, 0.0, 2.0, -1.0, 0.5, 0.1, 0.2] if kind == "ilql" else None
solotune.train(samples=samples, rewards=rewards, eval_prompts=["a", "bb", "ccc"], config=config)
"""


@pytest.mark.parametrize("kind", ["sft", "ilql"])
def test_two_processes_learn_from_given_samples_as_one_does(tiny_folder, tmp_path, script, kind):
    """Seven samples: a row of the second process only stands in; gradient, targets and losses are those of one."""
    changed = script.with_name(f"{kind}.py")
    changed.write_text(OFFLINE)
    runs = []
    for processes in (1, 2):
        train = {"batch_size": 8 // processes, "minibatch_size": 2, "total_steps": 2}
        sections = {"kind": kind, "train": train, "optimizer": {"kwargs": {"lr": 1.0, "eps": 1.0}}}
        if kind == "ilql":
            sections["method"] = {"steps_for_target_q_sync": 1, "alpha": 0.5}
        runs.append(launch(processes, changed, tiny_folder, tmp_path / str(processes), sections))
    one, two = (load_file(next(run.glob("checkpoints/step_*/tensors.safetensors"))) for run in runs)
    moved = [name for name in one if name.startswith("model.")]
    assert any("target_q_heads" in name for name in moved) == (kind == "ilql")
    for name in moved:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-4, msg=name)
    first, second = (read_lines(run / "metrics.jsonl") for run in runs)
    assert [row["step"] for row in second] == [row["step"] for row in first] == [1, 2]
    for one_row, two_row in zip(first, second, strict=True):
        assert two_row["objective/loss"] == pytest.approx(one_row["objective/loss"], abs=1e-5)
    outputs = [[row["output"] for row in read_lines(run / "samples.jsonl") if row["round"] == 0] for run in runs]
    assert outputs[0] == outputs[1]
