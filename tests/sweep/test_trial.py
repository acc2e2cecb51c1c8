"""Sweeps whose trials train: a script in trlX's style, and a recipe."""

import json
import re

import yaml
from typer.testing import CliRunner

from solotune.cli import app
from solotune.runs.folder import read_lines
from solotune.runs.tracking import VALUES_FILE
from tests.sweep.test_study import wait_for
from tests.tiny import tiny_ppo_config

# In the second round the first trial waits until its sweep has been killed.
SCRIPT = """
import os, time
import trlx
from trlx.data.default_configs import TRLConfig

calls = []

def reward_fn(outputs, **_):
    calls.append(len(outputs))
    end = time.time() + 60
    while len(calls) == 4 and not os.path.exists("killed") and time.time() < end:
        time.sleep(0.02)
    return [sum(map(ord, output)) / 1000 for output in outputs]

def main(hparams={}):
    config = TRLConfig.update(TRLConfig.load_yaml("base.yml").to_dict(), hparams)
    lengths = lambda outputs, **_: {"lengths": [len(output) for output in outputs]}
    trlx.train(reward_fn=reward_fn, metric_fn=lengths, prompts=["a film", "another film"] * 4, config=config)

if __name__ == "__main__":
    main()
"""


def test_a_script_that_trains_killed_in_the_middle(folder, tiny_folder):
    """The metric is the last evaluation's, the best trial's is the largest, and a trial goes on from its checkpoint."""
    tiny_ppo_config(tiny_folder, train={"epochs": 3, "checkpoint_dir": "ckpts"}).save_yaml(folder.path / "base.yml")
    folder.write(script=SCRIPT)
    tune = "tune_config: {mode: max, metric: reward/mean}\n"
    (folder.path / "easy.yml").write_text(tune + "optimizer.kwargs.lr: {strategy: grid, values: [1e-9, 1e-2, 3e-2]}\n")
    killed = folder.start("sweep", "--config", "easy.yml", "easy.py", "--out", "out")
    trials = folder.path / "out" / "trials"
    wait_for(lambda: any((trials / "000" / "run" / "checkpoints").glob("step_*")), 120)
    killed.kill()
    killed.communicate()
    (folder.path / "killed").touch()
    rows = folder.sweep()
    assert "resumed from" in (trials / "000" / "log.txt").read_text()
    for row in rows:
        run = folder.path / "out" / row.folder / "run"
        last = [s["reward"] for s in read_lines(run / "samples.jsonl") if s["step"] == 12]
        assert row.value == sum(last) / len(last)
        assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(4, 13, 4))
    best = json.loads((folder.path / "out" / "sweep.json").read_text())["best"]
    assert best["value"] == max(row.value for row in rows) > min(row.value for row in rows)
    told = {name for line in read_lines(trials / "001" / "values.jsonl") for name in line}
    assert {"reward/mean", "eval/reward", "metrics/lengths", "objective/score", "rollout_scores/mean"} <= told
    assert not (folder.path / "ckpts").exists(), "every trial has its own folder"


def test_a_recipe_and_metrics_by_round(folder, tiny_folder):
    recipe = tiny_ppo_config(tiny_folder, train={"epochs": 1}).to_dict()
    (folder.path / "reward.py").write_text("def vowels(outputs, **_):\n    return [o.count('a') for o in outputs]\n")
    recipe |= {"data": {"prompts": ["a film", "another film"]}, "reward": {"function": "reward.py:vowels"}}
    (folder.path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    sweep = "tune_config: {mode: min, metric: objective/kl, num_samples: 1}\n"
    parameter = "method.{}: {{strategy: loguniform, values: [0.01, 0.1]}}\n"
    (folder.path / "s.yml").write_text(sweep + parameter.format("init_kl_cof"))
    command = ["sweep", "--config", "s.yml", "tiny.yaml", "--out", "out", "--set", "train.seed=3"]
    wrong = CliRunner().invoke(app, command)
    assert wrong.exit_code == 2
    assert "did you mean init_kl_coef?" in wrong.stderr
    (folder.path / "s.yml").write_text(sweep + parameter.format("init_kl_coef"))
    right = CliRunner().invoke(app, command)
    said = right.stdout
    assert right.exit_code == 0, right.output
    run = folder.path / "out" / "trials" / "000" / "run"
    (trial,) = json.loads((folder.path / "out" / "sweep.json").read_text())["trials"]
    assert trial["value"] == read_lines(run / "metrics.jsonl")[-1]["objective/kl"]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["method"]["init_kl_coef"], saved["train"]["seed"]) == (trial["settings"]["method.init_kl_coef"], 3)
    (pasted,) = re.findall(r"solotune train .*", said)
    assert pasted.endswith(f"tiny.yaml --set train.seed=3 --set method.init_kl_coef={saved['method']['init_kl_coef']}")


def test_both_sides_mean_the_same_variable():
    from solotune.sweep import process

    assert process.VALUES_FILE == VALUES_FILE
