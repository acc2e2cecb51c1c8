"""The command line on a tiny model: train, resume, report, and what goes wrong."""

import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from solotune.cli import app
from solotune.runs.folder import read_lines
from tests.tiny import tiny_ppo_config


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    """A tiny recipe on disk, as a dict that a test may change and the function that writes it."""
    (tmp_path / "reward.py").write_text("def length(outputs, **_):\n    return [len(set(o)) / 6 for o in outputs]\n")
    values = tiny_ppo_config(tiny_folder).to_dict()
    values["train"]["checkpoint_dir"] = str(tmp_path / "runs")
    values["data"] = {"prompts": ["a film", "another film"], "eval_repeats": 2}
    values["reward"] = {"function": f"{tmp_path / 'reward.py'}:length"}

    def write():
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / "tiny.yaml")

    return values, write


def run(*arguments):
    result = CliRunner().invoke(app, arguments)
    said = re.sub(r"\s+", " ", result.output + (result.stderr if result.stderr_bytes else ""))
    return result.exit_code, said


def test_train_resume_and_report(recipe, tmp_path):
    _, write = recipe
    code, said = run("train", write(), "--set", "train.epochs=1")
    assert code == 0, said
    assert "1 round of 8 rollouts" in said
    folder = tmp_path / "runs" / "tiny"
    code, said = run("train", write(), "--set", "train.epochs=3", "--resume")
    assert code == 0, said
    assert [row["round"] for row in read_lines(folder / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((folder / "summary.json").read_text())["rounds"] == 3
    before = json.loads((folder / "summary.json").read_text())
    assert run("train", write(), "--set", "train.epochs=3", "--resume")[0] == 0, "a finished run is left as it is"
    after = json.loads((folder / "summary.json").read_text())
    assert (after["reward_before"], after["reward_after"]) == (before["reward_before"], before["reward_after"])
    (folder / "report.html").unlink()
    assert run("report", str(folder))[0] == 0
    assert (folder / "report.html").exists()


def test_resuming_nothing_starts_from_the_beginning(recipe):
    code, said = run("train", recipe[1](), "--set", "train.epochs=1", "--resume")
    assert code == 0, said


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("train", {"bach_size": 4}, "bach_size.*batch_size"),
        ("train", {"batch_size": "many"}, "train.batch_size.*many"),
        ("train", {"minibatch_size": 3}, "train.minibatch_size = 3.*divide"),
        ("train", {"seq_length": 8}, "prompt 0 has 6 tokens, but there is room for 2"),
        ("model", {"num_layers_unfrozen": 9}, "num_layers_unfrozen is 9.*4 blocks"),
        ("model", {"num_layers_unfrozen": 0, "delta_kwargs": None}, "nothing would train"),
        ("model", {"model_path": "no/such/model"}, "no/such/model"),
        ("data", {"prompts": []}, "no prompts"),
        ("data", {"prompts": ["a", "  "]}, "prompt 1 is empty"),
        ("reward", {"function": "nowhere.py:f"}, "nowhere.py"),
        ("model", {"model_extra_configs": {"token": "hf_x"}}, "secrets do not belong"),
        ("train", {"rollout_logging_dir": "logs"}, "rollout_logging_dir .logs. is no folder"),
        ("train", {"resume_from_checkpoint": "nowhere"}, "'nowhere' holds no checkpoint"),
        ("train", {"tracker": "comet_ml"}, "comet_ml"),
        ("method", {"target": 6.0, "init_kl_coef": 0.0}, "init_kl_coef = 0"),
        ("optimizer", {"kwargs": {"lr": 1e-3, "momentum": 0.9}}, "momentum"),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(recipe, section, change, message):
    values, write = recipe
    values[section] |= change
    code, said = run("train", write())
    assert code in (1, 2)
    assert re.search(message, said), said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"1 .*(8|4)"),
        ("return [float('nan')] * len(outputs)", "nan"),
        ("return ['good'] * len(outputs)", "good|str"),
        ("raise KeyError('mine')", "KeyError"),
    ],
)
def test_a_broken_reward_leaves_its_samples_in_a_file_that_the_message_names(recipe, tmp_path, body, message):
    _, write = recipe
    (tmp_path / "reward.py").write_text(f"def length(outputs, **_):\n    {body}\n")
    code, said = run("train", write())
    assert code == 1
    assert re.search(message, said), said
    file = tmp_path / "runs" / "tiny" / "reward_failure.jsonl"
    assert file.name in said
    assert [json.loads(line) for line in file.read_text().splitlines()]
