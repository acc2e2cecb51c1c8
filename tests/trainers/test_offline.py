"""SFT and ILQL: what has to be equal, what is resumed, what a run without a reward leaves behind, what is refused."""

import json
import math
import shutil
import signal

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from typer.testing import CliRunner

import solotune
from solotune.cli import app
from solotune.config.plans import plan_passes
from solotune.data.prompts import Prompts
from solotune.data.samples import load_samples
from solotune.errors import ConfigError, DataError
from solotune.runs.checkpoint import saved
from solotune.runs.folder import RunFolder, read_lines
from solotune.trainers.ilql import ILQLTrainer
from solotune.trainers.sft import SFTTrainer
from tests.tiny import EOS, PAD, tiny_offline_config

SAMPLES = [
    ["a film", " so good"], "a text of its own", ["x", "y", "z", "w"], ["another", " one, a longer one"],
    ["is it", " no"],
    ["the", " end"], "b", ["q", "an answer of some words"], ["r", ""],
]  # fmt: skip
REWARDS = [1.0, 0.0, 0.5, 2.0, -1.0, 0.3, 0.1, 0.7, 0.2]
BOTH = pytest.mark.parametrize("method", ["sft", "ilql"])


def trainer_of(folder, kind, **sections):
    config, accelerator = tiny_offline_config(folder, kind, **sections), Accelerator(cpu=True)
    prompts = Prompts(["a film", "is it"])
    torch.manual_seed(0)
    if kind == "sft":
        return SFTTrainer(config, SAMPLES, prompts, accelerator=accelerator)
    trainer = ILQLTrainer(config, SAMPLES, REWARDS, prompts, accelerator=accelerator)
    for parameter in trainer.model.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return trainer


def gradients(trainer, rows):
    """The gradient of one step, without taking it, and its losses."""
    captured = {}

    def keep():
        captured.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        return torch.tensor(0.0)

    trainer.stepper.step = keep
    return captured, trainer.optimizer_step(torch.tensor(rows))


@BOTH
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "padded"])
def test_the_gradient_depends_neither_on_the_micro_batch_nor_on_the_cache(tiny_folder, method, pack):
    found = []
    for size, cached in ((9, 4.0), (3, 4.0), (1, None), (9, 0.0)):
        train = {"batch_size": 9, "minibatch_size": size, "trunk_cache_gb": cached, "pack": pack}
        trainer = trainer_of(tiny_folder, method, train=train)
        trainer._fill_cache()
        assert (trainer._cache is None) == (cached is None)
        assert trainer._cache is None or trainer._cache.is_mapped == (cached == 0.0)
        found.append(gradients(trainer, [*range(9)]))
    for other, losses in found[1:]:
        torch.testing.assert_close(losses, found[0][1])
        for name, gradient in found[0][0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert any("layers.2" in name for name in found[0][0])


@BOTH
def test_every_pass_learns_from_every_sample_once_in_an_order_of_its_own(tiny_folder, method):
    trainer = trainer_of(tiny_folder, method)
    passes = [torch.cat([trainer.rows_at(3 * which + step) for step in range(3)]).tolist() for which in range(3)]
    assert all(sorted(rows) == [*range(9)] for rows in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[1] == torch.cat([trainer_of(tiny_folder, method).rows_at(step) for step in (3, 4, 5)]).tolist()


def test_rounds_end_at_intervals_passes_and_the_end(tiny_folder):
    for total, n, intervals in ((12, 9, (6, 4)), (11, 9, (5, 100)), (1, 9, (6, 4)), (30, 100, (7, 1000))):
        train = {"total_steps": total, "eval_interval": intervals[0], "checkpoint_interval": intervals[1]}
        plan = plan_passes(tiny_offline_config(tiny_folder, "sft", train=train).train, n)
        assert plan.rounds == sum(plan.ends_round(step) for step in range(1, plan.total_steps + 1))
    plan = plan_passes(tiny_offline_config(tiny_folder, "sft", train={"epochs": 2}).train, 9)
    assert (plan.total_steps, plan.steps_per_pass) == (6, 3)
    assert (
        plan.line
        == "9 samples, 3 optimizer steps a pass: 6 optimizer steps in all, 2 passes, ended by train.epochs = 2"
    )


def test_the_targets_move_after_every_so_many_steps_and_not_between(tiny_folder):
    trainer = trainer_of(tiny_folder, "ilql", method={"steps_for_target_q_sync": 3, "alpha": 0.5})
    target = trainer.model.heads.target_q_heads[0].outer.weight
    moved = []
    for step in range(7):
        before = target.clone()
        trainer.optimizer_step(trainer.rows_at(step))
        trainer.steps_done += 1
        trainer.after_step()
        moved.append(not torch.equal(before, target))
    assert moved == [False, False, True, False, False, True, False]


def test_the_reward_is_normalised_and_belongs_to_its_sample(tiny_folder):
    trainer = trainer_of(tiny_folder, "ilql")
    assert trainer.rewards_n.mean() == pytest.approx(0.0, abs=1e-6)
    assert trainer.rewards_n.argmax() == 3
    assert trainer.rewards_n.argmin() == 4


def test_equal_rewards_are_said_and_leave_no_nan(tiny_folder, caplog):
    config = tiny_offline_config(tiny_folder, "ilql")
    accelerator = Accelerator(cpu=True)
    trainer = ILQLTrainer(config, SAMPLES, [0.5] * 9, Prompts(["a"]), accelerator=accelerator)
    assert "all rewards are 0.5" in caplog.text
    assert all(math.isfinite(value) for value in trainer.train_round().values())


def run_tiny(folder, tmp_path, kind, **sections):
    config = tiny_offline_config(folder, kind, **sections)
    config = config.evolve(train={"checkpoint_dir": str(tmp_path)})
    rewards = REWARDS if kind == "ilql" else None
    torch.manual_seed(0)
    return solotune.train(samples=SAMPLES, rewards=rewards, eval_prompts=["a film", "is it"], config=config)


@BOTH
def test_a_resumed_run_is_the_same_to_the_last_bit(tiny_folder, tmp_path, method):
    """Adapter, heads, targets, optimizer, schedule, samples and numbers; the trunk is computed anew."""
    lora = {"delta_kwargs": {"delta_type": "lora", "modified_modules": "attention", "lora_r": 4}}
    run_tiny(tiny_folder, tmp_path / "whole", method, model=lora, train={"keep_checkpoints": 9})
    whole, again = tmp_path / "whole" / "tiny", tmp_path / "again" / "tiny"
    shutil.copytree(whole, again)
    for folder in saved(again / "checkpoints")[1:]:
        shutil.rmtree(folder)
    train = {"keep_checkpoints": 9, "resume_from_checkpoint": str(again)}
    run_tiny(tiny_folder, tmp_path / "again", method, model=lora, train=train)
    names = [path.name for path in saved(whole / "checkpoints")]
    assert names == ["step_000004", "step_000008", "step_000012"]
    for name in names:
        first, second = (load_file(run / "checkpoints" / name / "tensors.safetensors") for run in (whole, again))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    if method == "ilql":
        assert any("target_q_heads" in key for key in first)
    keep = ("objective", "value", "policy/grad", "policy/lr")
    lines = [
        [{k: v for k, v in row.items() if k.startswith(keep)} for row in read_lines(run / "metrics.jsonl")]
        for run in (whole, again)
    ]
    assert lines[0] == lines[1]
    samples = [[row["output"] for row in read_lines(run / "samples.jsonl")] for run in (whole, again)]
    assert samples[0] == samples[1]


@BOTH
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on_in_the_middle_of_the_round(tiny_folder, tmp_path, method):
    def trainer(name):
        given = trainer_of(tiny_folder, method, train={"eval_interval": 6, "checkpoint_interval": 6, "batch_size": 2})
        given.run = RunFolder(tmp_path / name, continued=True)
        return given

    whole, stopped, resumed = trainer("whole"), trainer("again"), trainer("nowhere")
    whole.learn()
    step = stopped.optimizer_step

    def signalled(rows):
        if stopped.steps_done == 7:
            signal.raise_signal(signal.SIGTERM)
        return step(rows)

    stopped.optimizer_step = signalled
    with pytest.raises(SystemExit) as ended:
        stopped.learn()
    assert (ended.value.code, stopped.steps_done) == (143, 8)
    resumed.run = stopped.run
    resumed.learn(stopped.run.checkpoints)
    for mine, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    lines = [
        [(row["step"], row["objective/loss"], row["policy/tokens"]) for row in read_lines(each.run.metrics)]
        for each in (whole, resumed)
    ]
    assert lines[0] == lines[1]


def test_other_samples_are_not_resumed(tiny_folder, tmp_path):
    run_tiny(tiny_folder, tmp_path, "sft")
    config = tiny_offline_config(tiny_folder, "sft", train={"resume_from_checkpoint": str(tmp_path / "tiny")})
    with pytest.raises(ConfigError, match=r"'samples': 9.*'samples': 4"):
        solotune.train(samples=SAMPLES[:4], config=config.evolve(train={"checkpoint_dir": str(tmp_path)}))


def test_ilql_is_not_resumed_with_other_tokens_of_the_same_number(tiny_folder, tmp_path):
    """Their rows of Q would be those of others."""
    trainer = run_tiny(tiny_folder, tmp_path, "ilql")
    others = [*SAMPLES[:6], "z", *SAMPLES[7:]]
    config = tiny_offline_config(tiny_folder, "ilql", train={"resume_from_checkpoint": str(tmp_path / "tiny")})
    config = config.evolve(train={"checkpoint_dir": str(tmp_path)})
    given = ILQLTrainer(config, others, REWARDS, Prompts(["a"]), accelerator=Accelerator(cpu=True))
    assert len(given.samples.chosen_tokens) == len(trainer.samples.chosen_tokens)
    with pytest.raises(ConfigError, match="tokens chosen"):
        solotune.train(samples=others, rewards=REWARDS, config=config)


@BOTH
def test_a_run_without_a_reward_says_what_it_knows(tiny_folder, tmp_path, method, capsys):
    run_tiny(tiny_folder, tmp_path, method)
    run, out = tmp_path / "tiny", capsys.readouterr().out
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 4, 6, 8, 9, 12]
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["reward_before"], summary["reward_after"], summary["kl"]) == (None, None, None)
    assert summary["tokens_per_second"] > 0
    page = (run / "report.html").read_text()
    assert ">Loss<" in page
    assert f"{rows[0]['objective/loss']:.3f} → {rows[-1]['objective/loss']:.3f}" in page
    assert ">Learning<" in page
    assert "KL to the reference" not in page
    assert ">Reward</dt>" not in page
    assert "NaN" not in page
    assert "None" not in page.split("Configuration")[0]
    assert "Before" in out
    assert not (run / "best").exists(), "nothing says which is best"
    recipe = solotune.Recipe.load_yaml(run / "config.yaml")
    assert recipe.reward is None
    assert len(recipe.data.samples) == len(SAMPLES)
    assert {p.name for p in run.iterdir() if p.name.startswith("trunk")} == set()


def test_with_a_reward_the_best_is_kept_and_the_page_has_both_curves(tiny_folder, tmp_path):
    config = tiny_offline_config(tiny_folder, "sft", train={"checkpoint_dir": str(tmp_path)})
    trainer = solotune.train(
        samples=SAMPLES,
        reward_fn=lambda outputs, **_: [float(len(output)) for output in outputs],
        metric_fn=lambda outputs, **_: {"vowels": [sum(c in "aeiou" for c in o) for o in outputs]},
        config=config,
    )
    run = tmp_path / "tiny"
    assert (run / "best" / "model.safetensors").exists()
    page = (run / "report.html").read_text()
    assert ">Loss<" in page
    assert ">Reward<" in page
    assert json.loads((run / "summary.json").read_text())["metrics"].keys() == {"vowels"}
    assert trainer.last_evaluation.reward is not None
    assert read_lines(run / "samples.jsonl")[0]["prompt"] == "", "the default prompt is the BOS"


def test_many_samples_go_to_a_file_beside_the_configuration(tiny_folder, tmp_path):
    config = tiny_offline_config(tiny_folder, "ilql", train={"total_steps": 1, "checkpoint_dir": str(tmp_path)})
    solotune.train(samples=SAMPLES * 12, rewards=REWARDS * 12, config=config)
    recipe = solotune.Recipe.load_yaml(tmp_path / "tiny" / "config.yaml")
    samples, rewards = load_samples(recipe.data)
    assert (samples, rewards) == (SAMPLES * 12, REWARDS * 12)
    assert all("output" in row for row in read_lines(tmp_path / "tiny" / "samples.jsonl"))


def test_a_sweep_over_beta_is_evaluated_at_each(tiny_folder, tmp_path):
    gen = {"max_new_tokens": 6, "beta": [0, 1, 100], "top_k": 5}
    run_tiny(tiny_folder, tmp_path, "ilql", method={"gen_kwargs": gen})
    settings = {row["setting"] for row in read_lines(tmp_path / "tiny" / "samples.jsonl")}
    assert settings == {"beta=0.0", "beta=1.0", "beta=100.0"}


def test_temperature_0_and_missing_arguments_are_trlxs(tiny_folder):
    trainer = trainer_of(tiny_folder, "ilql")
    settings = trainer.settings({"max_new_tokens": 4, "temperature": 0.0, "beta": 2})
    assert (settings.do_sample, settings.beta, settings.other) == (False, 2.0, {})
    given = solotune.ILQLConfig(gen_kwargs={})
    assert given.gen_kwargs == {"max_new_tokens": 32, "top_k": 20, "beta": 1.0, "temperature": 1.0}
    with pytest.raises(ConfigError, match=r"num_beams.*is not known to ILQL"):
        solotune.ILQLConfig(gen_kwargs={"num_beams": 2})


def test_generate_decodes_by_the_heads(tiny_folder):
    trainer = trainer_of(tiny_folder, "ilql")
    rows = trainer.model.heads.rows
    assert len(set(rows.of(torch.tensor(trainer.samples.chosen_tokens)).tolist())) == rows.n_rows - 1
    assert EOS in trainer.samples.chosen_tokens
    assert rows.n_sharing > 200
    best = trainer.samples.chosen_tokens[3]
    with torch.no_grad():
        for head in trainer.model.heads.target_q_heads:
            head.outer.bias[rows.of(torch.tensor(best))] += 1000.0
    ids = torch.tensor([[PAD, 5, 6], [7, 8, 9]])
    found = trainer.generate(ids, (ids != PAD).long(), beta=1.0, max_new_tokens=4)
    assert found.tolist() == [[*row, *[best] * 4] for row in ids.tolist()]
    assert trainer.generate_eval(ids, beta=0.0, temperature=0).shape[1] <= 3 + 6
    with pytest.raises(ConfigError, match="num_beams"):
        trainer.generate(ids, num_beams=2)


def test_ilql_with_every_block_frozen_trains_its_heads(tiny_folder, tmp_path):
    trainer = run_tiny(tiny_folder, tmp_path, "ilql", model={"num_layers_unfrozen": 0})
    trained = {name.partition(".")[0] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {"heads"}
    saved_heads = load_file(tmp_path / "tiny" / "model" / "ilql_heads.safetensors")
    assert {name.partition(".")[0] for name in saved_heads} == {"rows", "value_head", "q_heads", "target_q_heads"}


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"samples": SAMPLES, "rewards": [1.0]}, DataError, "1 rewards for 9 samples"),
        ({"samples": SAMPLES, "rewards": [math.nan] * 9}, DataError, "reward of sample 0 is nan"),
        ({"samples": [["a", "b", "c"]]}, DataError, "3 phrases"),
        ({"samples": ["a", ""]}, DataError, "sample 1 is empty"),
        ({"samples": []}, DataError, "no samples"),
        ({"rewards": [1.0]}, ConfigError, "rewards= without samples="),
        ({}, ConfigError, "neither reward_fn= nor samples="),
    ],
)
def test_bad_input_is_named_before_any_weights_are_read(tiny_folder, given, error, said):
    method = "ilql" if "rewards" in given else "sft"
    config = tiny_offline_config(tiny_folder, method, model={"model_path": "nowhere/at-all"})
    with pytest.raises(error, match=said):
        solotune.train(config=config, **given)


def test_a_config_of_another_method_is_an_error(tiny_folder):
    with pytest.raises(ConfigError, match=r"start from default_ilql_config\(\)"):
        solotune.train(samples=SAMPLES, rewards=REWARDS, config=solotune.default_ppo_config())
    with pytest.raises(ConfigError, match="ILQL learns from a reward of each sample"):
        solotune.train(samples=SAMPLES, config=tiny_offline_config(tiny_folder, "ilql"))
    with pytest.raises(ConfigError, match="needs samples="):
        solotune.train(reward_fn=len, config=tiny_offline_config(tiny_folder, "sft"))


def test_dataset_is_samples_and_rewards(tiny_folder, tmp_path, caplog):
    config = tiny_offline_config(tiny_folder, "ilql", train={"total_steps": 1, "checkpoint_dir": str(tmp_path)})
    trainer = solotune.train(dataset=(SAMPLES, REWARDS), config=config)
    assert "deprecated" in caplog.text
    assert isinstance(trainer, ILQLTrainer)


def test_recipes_of_given_samples(tiny_folder, tmp_path, monkeypatch):
    """A file with columns, rewards from one of them, a threshold; from the command line, and again by its config."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"p{i}", "answer": "yes" * i, "score": i} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for method, least in (("sft", 2.5), ("ilql", None)):
        values = tiny_offline_config(tiny_folder, method, train={"total_steps": 2}).to_dict()
        values["train"] |= {"trainer": "AcceleratePPOTrainer", "checkpoint_dir": "runs", "run_name": method}
        values["data"] = {
            "samples": "rows.jsonl", "prompt_column": "prompt", "output_column": "answer", "reward_column": "score",
            "least_reward": least, "eval_prompts": ["p1"],
        }  # fmt: skip
        (tmp_path / f"{method}.yaml").write_text(json.dumps(values))
        for recipe in (f"{method}.yaml", f"runs/{method}/config.yaml"):
            result = CliRunner().invoke(app, ["train", recipe])
            assert result.exit_code == 0, result.output
            assert f"{3 if least else 6} samples" in result.output.replace("\n", " "), result.output
    del values["data"]["samples"]
    with pytest.raises(ConfigError, match=r"data\.samples is missing"):
        solotune.Recipe.from_dict(values)
