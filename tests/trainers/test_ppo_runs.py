"""What a run of PPO leaves behind, and how another goes on from it."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch

import solotune
from solotune.runs.evaluation import Evaluation
from solotune.runs.folder import read_lines
from tests.tiny import tiny_ppo_config
from tests.trainers.test_ppo import PROMPTS, trainer_of, vowels


def run_tiny(folder, tmp_path, reward_fn=vowels, **sections):
    config = tiny_ppo_config(folder, **sections).evolve(train={"checkpoint_dir": str(tmp_path)})
    return solotune.train(reward_fn=reward_fn, prompts=PROMPTS.texts, config=config), tmp_path / "tiny"


def test_a_run_leaves_everything_it_promises(tiny_folder, tmp_path):
    trainer, run = run_tiny(tiny_folder, tmp_path)
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "samples.jsonl", "report.html", "summary.json", "adapter", "checkpoints",
    }  # fmt: skip
    rows = read_lines(run / "metrics.jsonl")
    assert [(row["round"], row["step"]) for row in rows] == [(1, 4), (2, 8)]
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    samples = read_lines(run / "samples.jsonl")
    assert {row["round"] for row in samples} == {0, 1, 2}
    summary = json.loads((run / "summary.json").read_text())
    promised = {
        "reward_before",
        "reward_after",
        "kl",
        "wall_seconds",
        "seconds_by_phase",
        "peak_memory_bytes",
        "rounds",
        "seed",
    }
    assert promised <= summary.keys()
    before = [row["reward"] for row in samples if row["round"] == 0]
    assert summary["reward_before"] == pytest.approx(sum(before) / len(before))
    assert summary["peak_memory_bytes"] > 50e6
    assert trainer.model is not None


def test_the_saved_recipe_runs_again_to_the_same_numbers(tiny_folder, tmp_path):
    from solotune.config import Recipe
    from solotune.runs.start import run_recipe

    (tmp_path / "reward.py").write_text("def reward_fn(outputs, **_):\n    return [len(set(o)) / 6 for o in outputs]\n")
    config = tiny_ppo_config(tiny_folder)
    recipe = Recipe.from_dict(
        {
            **config.to_dict(),
            "data": {"prompts": PROMPTS.texts},
            "reward": {"function": f"{tmp_path / 'reward.py'}:reward_fn"},
        }
    )
    run_recipe(recipe, tmp_path / "first")
    run_recipe(Recipe.load_yaml(tmp_path / "first" / "config.yaml"), tmp_path / "second")
    one, two = ((tmp_path / name / "samples.jsonl").read_text() for name in ("first", "second"))
    assert one == two


def test_an_existing_run_is_moved_aside(tiny_folder, tmp_path):
    for _ in range(3):
        run_tiny(tiny_folder, tmp_path, train={"total_steps": 4})
    assert {p.name for p in tmp_path.iterdir()} == {"tiny", "tiny.1", "tiny.2"}
    assert all((tmp_path / name / "summary.json").exists() for name in ("tiny", "tiny.1", "tiny.2"))


@pytest.mark.parametrize("kind", ["lora", "last two blocks", "everything"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tiny_folder, tmp_path, kind):
    model = {"lora": {}, "last two blocks": {"delta_kwargs": None}}.get(
        kind, {"delta_kwargs": None, "num_layers_unfrozen": -1}
    )
    method = {"target": 2.0, "init_kl_coef": 0.1, "scale_reward": "running"}
    scheduler = {"name": "cosine_annealing", "kwargs": {"T_max": 20, "eta_min": 1e-4}}
    whole, folder = run_tiny(
        tiny_folder, tmp_path / "whole", train={"epochs": 4}, model=model, method=method, scheduler=scheduler
    )

    class InterruptionError(Exception):
        pass

    calls = []

    def dies_in_round_three(outputs, **_):
        calls.append(1)
        if len(calls) == 6:  # evaluation, round 1, evaluation, round 2, evaluation, round 3
            raise InterruptionError
        return vowels(None, outputs)

    parts = tmp_path / "parts"
    sections = {"train": {"epochs": 4}, "model": model, "method": method, "scheduler": scheduler}
    with pytest.raises(solotune.errors.RewardError):
        run_tiny(tiny_folder, parts, dies_in_round_three, **sections)
    sections["train"] = {"epochs": 4, "resume_from_checkpoint": str(parts / "tiny")}
    resumed, resumed_folder = run_tiny(tiny_folder, parts, **sections)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert (folder / "samples.jsonl").read_text() == (resumed_folder / "samples.jsonl").read_text()
    for one, other in zip(
        read_lines(folder / "metrics.jsonl"), read_lines(resumed_folder / "metrics.jsonl"), strict=True
    ):
        timed = ("time/", "memory/", "rollout/tokens_per_second")
        assert {k: v for k, v in one.items() if not k.startswith(timed)} == {
            k: v for k, v in other.items() if not k.startswith(timed)
        }


def test_lines_of_lost_rounds_are_written_once(tiny_folder, tmp_path):
    """Resumed from the last but one checkpoint, as when the last one was lost: every round has one line."""
    _, folder = run_tiny(tiny_folder, tmp_path, train={"epochs": 3})
    before = (folder / "samples.jsonl").read_text()
    *_, newest = sorted((folder / "checkpoints").iterdir())
    shutil.rmtree(newest)
    _, again = run_tiny(tiny_folder, tmp_path, train={"epochs": 3, "resume_from_checkpoint": str(folder)})
    assert again == folder
    assert [row["round"] for row in read_lines(folder / "metrics.jsonl")] == [1, 2, 3]
    assert (folder / "samples.jsonl").read_text() == before


def test_loading_a_checkpoint_changes_no_file_of_the_run(tiny_folder, tmp_path):
    trainer, folder = run_tiny(tiny_folder, tmp_path, train={"epochs": 3})
    kept = {name: (folder / name).read_text() for name in ("metrics.jsonl", "samples.jsonl")}
    first = sorted((folder / "checkpoints").iterdir())[0]
    trainer.load(first)
    assert trainer.steps_done == int(first.name[5:])
    assert kept == {name: (folder / name).read_text() for name in kept}
    trainer.load(folder)
    assert trainer.rounds_done == 3
    with pytest.raises(solotune.errors.ConfigError, match="holds no checkpoint"):
        trainer.load(tmp_path / "nowhere")


def test_the_checkpoint_that_was_just_written_is_never_the_one_that_goes(tiny_folder, tmp_path):
    """In a folder that holds an earlier, longer run's."""
    trainer = trainer_of(tiny_folder)
    for step in (900, 1000):
        trainer.steps_done = step
        trainer.save(tmp_path)
    trainer.steps_done = 4
    trainer.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step_000004", "step_001000"}


def test_the_returned_trainers_model(tiny_folder, tmp_path):
    trainer, _ = run_tiny(tiny_folder, tmp_path, train={"total_steps": 4})
    inputs = trainer.tokenizer(["a film", "so"], return_tensors="pt", padding=True)
    assert trainer.generate(**inputs).shape == (2, 6 + 6)
    assert trainer.generate_eval(inputs["input_ids"], max_new_tokens=2).shape == (2, 8)
    assert trainer.model.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (2, 9)
    trainer.model.save_pretrained(str(tmp_path / "out"))
    assert (tmp_path / "out" / "value_head.safetensors").exists()
    assert trainer.model.base_model is trainer.model.backbone


@pytest.mark.parametrize(("save_best", "save_optimizer"), [(True, True), (False, False)])
def test_what_is_kept_is_what_was_asked_for(tiny_folder, tmp_path, save_best, save_optimizer):
    train = {"epochs": 1, "save_best": save_best, "save_optimizer": save_optimizer}
    _, folder = run_tiny(tiny_folder, tmp_path, train=train)
    assert (folder / "best").exists() == save_best
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert (checkpoint / "hf_model" / "adapter_model.safetensors").exists()
    assert (checkpoint / "tensors.safetensors").exists() == save_optimizer


def test_of_a_sweep_the_highest_reward_says_which_model_is_best(tiny_folder, monkeypatch):
    trainer = trainer_of(tiny_folder, method={"gen_kwargs": {"max_new_tokens": 6, "temperature": [1.0, 0.5, 0.7]}})
    trainer.steps_done = 4
    for rewards, best in (((0.1, 0.5, None), 0.5), ((0.4, 0.3, 0.2), 0.5), ((None, 0.1, 0.6), 0.6), ((None,) * 3, 0.6)):
        evaluations = iter(Evaluation(reward, None, [], {}) for reward in rewards)
        monkeypatch.setattr(trainer, "evaluate", lambda _, given=evaluations: next(given))
        assert trainer.evaluate_and_record().reward == rewards[0]
        assert trainer.best_reward == best


def test_many_prompts_get_a_file_of_their_own(tiny_folder, tmp_path):
    config = tiny_ppo_config(tiny_folder).evolve(train={"checkpoint_dir": str(tmp_path), "total_steps": 4})
    prompts = [{"prompt": f"film {n}", "n": n} for n in range(101)]
    solotune.train(reward_fn=vowels, prompts=prompts, eval_prompts=["a"], config=config)
    recipe = solotune.Recipe.load_yaml(tmp_path / "tiny" / "config.yaml")
    assert recipe.data.prompts == str(tmp_path / "tiny" / "prompts.jsonl")
    assert read_lines(tmp_path / "tiny" / "prompts.jsonl")[100] == {"prompt": "film 100", "n": 100}


@pytest.mark.parametrize(("lora", "name"), [(True, "adapter"), (False, "model")])
def test_what_is_saved_loads_without_solotune(tiny_folder, tmp_path, lora, name):
    trainer, run = run_tiny(tiny_folder, tmp_path, model={} if lora else {"delta_kwargs": None})
    ids = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        expected = trainer.model.lm(input_ids=ids).logits
    load = (
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tiny_folder)!r}), {str(run / name)!r})"
        if lora
        else f"AutoModelForCausalLM.from_pretrained({str(run / name)!r})"
    )
    code = (
        "import sys, torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = {load}.eval()\nassert AutoTokenizer.from_pretrained({str(run / name)!r})('x').input_ids\n"
        f"logits = model(input_ids=torch.tensor({ids.tolist()})).logits\n"
        f"torch.save(logits.detach(), {str(tmp_path / 'logits.pt')!r})\nassert 'solotune' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, atol=1e-5, rtol=1e-5)
