"""Rejection-sampling fine-tuning: what is learned, what is left out, and what a run leaves behind."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional

import solotune
from solotune.config import Recipe, RFTConfig, describe_steps
from solotune.data.prompts import Prompts
from solotune.errors import ConfigError, RewardError
from solotune.runs.folder import read_lines
from solotune.runs.start import run_recipe
from solotune.trainers.order import even_batches
from solotune.trainers.rft import RFTTrainer
from tests.tiny import tiny_ppo_config

PROMPTS = Prompts(["a film", "another film, a longer one", "so"])
EARLY = {"max_new_tokens": 6, "eos_token_id": list(range(60))}  # rows of many lengths


def vowels(outputs, **_):
    return [sum(character in "aeiou" for character in output) / 6 for output in outputs]


def rft_config(folder, **sections):
    values = tiny_ppo_config(folder).to_dict()
    values["method"] = {
        "name": "RFTConfig", "n_generations_per_prompt": 8, "n_improve_steps": 2, "start_percentile": 0.4,
        "end_percentile": 0.8, "gen_kwargs": {"max_new_tokens": 6},
    }  # fmt: skip
    values["train"] |= {"epochs": 4, "eval_interval": 1, "checkpoint_interval": 1}
    return solotune.TRLConfig.from_dict(values).evolve(**sections)


def trainer_of(folder, reward_fn=vowels, prompts=PROMPTS, **sections):
    torch.manual_seed(0)
    return RFTTrainer(rft_config(folder, **sections), reward_fn, prompts, PROMPTS, accelerator=Accelerator(cpu=True))


def gradients(trainer, rollouts, rows):
    """The gradient of one step on the given rows, without taking it, and its loss."""
    loss = trainer._accumulate(rollouts, rows, trainer.micro_batch)
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.optimizer.zero_grad(set_to_none=True)
    return found, loss


def test_the_samples_of_a_prompt_are_a_group_and_there_is_no_critic(tiny_folder):
    trainer = trainer_of(tiny_folder)
    groups_PG = trainer.sample_rollouts().group_N.view(len(PROMPTS), -1)
    assert groups_PG.tolist() == [[prompt] * groups_PG.shape[1] for prompt in range(len(PROMPTS))]
    trainer.rounds_done = 1
    assert int(trainer.sample_rollouts().group_N[0]) == len(PROMPTS), "groups of two rounds are not mixed up"
    assert len(trainer.model.critic) == 0


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "last two blocks"])
def test_the_loss_is_that_of_the_response_tokens_alone(tiny_folder, lora):
    """Against the whole model, row by row and without padding: the prompt is not learned, the EOS is, once."""
    model = {} if lora else {"delta_kwargs": None}
    trainer = trainer_of(tiny_folder, model=model, method={"gen_kwargs": EARLY})
    rollouts = trainer.sample_rollouts()
    rows = torch.tensor([0, 3, 9, 17, 20])
    lengths = rollouts.response_mask_NT[rows].sum(-1)
    assert len(set(lengths.tolist())) > 2
    assert (rollouts.finish_N[rows] == 1).any()
    found, loss = gradients(trainer, rollouts, rows)
    nll = torch.zeros(())
    for row in rows.tolist():
        prompt = rollouts.prompt_ids_NP[row][rollouts.prompt_mask_NP[row]]
        ids = torch.cat([prompt, torch.tensor(rollouts.response_tokens(row))])
        logits = trainer.model.backbone(input_ids=ids[None]).logits[0]
        nll = nll + functional.cross_entropy(logits[len(prompt) - 1 : -1], ids[len(prompt) :], reduction="sum")
    (nll / lengths.sum()).backward()
    assert float(loss) == pytest.approx(float(nll.detach() / lengths.sum()), abs=1e-5)
    assert {name.split(".")[0] for name in found} == {"backbone"}, "no critic is trained"
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_gradient_does_not_depend_on_the_micro_batch(tiny_folder):
    found = []
    for size in (8, 2, 1):
        train = {"batch_size": 8, "minibatch_size": size}
        trainer = trainer_of(tiny_folder, train=train, method={"gen_kwargs": EARLY})
        found.append(gradients(trainer, trainer.sample_rollouts(), torch.arange(8))[0])
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_a_process_that_has_no_samples_left_takes_part_with_a_gradient_of_zero(tiny_folder):
    trainer = trainer_of(tiny_folder)
    rollouts = trainer.sample_rollouts()
    trainer.sum_over_processes = lambda x: x + 12  # the tokens of another process
    found, loss = gradients(trainer, rollouts, torch.zeros(0, dtype=torch.long))
    assert float(loss) == 0
    assert found.keys() == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for gradient in found.values())


def test_a_response_is_learned_once_however_often_it_was_sampled(tiny_folder):
    """Responses of one token, of few: most of them are duplicates."""
    method = {"n_generations_per_prompt": 64, "gen_kwargs": {"max_new_tokens": 1, "top_k": 4}}
    trainer = trainer_of(tiny_folder, method=method)
    rollouts = trainer.sample_rollouts()
    scores_N = rollouts.response_ids_NT[:, 0].double()
    keys = list(zip(rollouts.prompt_index_N.tolist(), map(tuple, rollouts.response_ids_NT.tolist()), strict=True))
    assert len(set(keys)) <= 12
    for selected in trainer.select(rollouts, scores_N):
        chosen = [keys[row] for row in selected.tolist()]
        assert len(chosen) == len(set(chosen))
        for prompt in range(3):
            best = max(key for key in keys if key[0] == prompt)
            assert best in chosen


def test_a_round_learns_from_the_better_samples_of_each_prompt(tiny_folder):
    trainer = trainer_of(tiny_folder)
    seen = []
    step = trainer.optimizer_step
    trainer.optimizer_step = lambda rollouts, rows: seen.append(rollouts.select(rows)) or step(rollouts, rows)
    metrics = trainer.train_round()
    scores = vowels([text for part in seen for text in trainer.sampled.texts(part).outputs])
    assert sum(scores) / len(scores) == pytest.approx(metrics["objective/selected_score"])
    assert metrics["objective/selected_score"] > metrics["objective/score"] + 0.5 * metrics["objective/score_std"]
    assert len(scores) == 2 * metrics["rollout/selected"]
    assert all(part.n_rollouts <= 4 for part in seen)


def test_rewards_that_are_all_equal_take_no_step_and_end_the_run_in_peace(tiny_folder, tmp_path):
    config = rft_config(tiny_folder, train={"checkpoint_dir": str(tmp_path)})
    trainer = solotune.train(reward_fn=lambda samples: [1.0] * len(samples), prompts=PROMPTS.texts, config=config)
    assert (trainer.steps_done, trainer.rounds_done) == (0, 2)
    rows = read_lines(tmp_path / "tiny" / "metrics.jsonl")
    assert [row["rollout/equal_prompts"] for row in rows] == [1.0, 1.0]
    assert [row["objective/loss"] for row in rows] == [None, None]
    assert (tmp_path / "tiny" / "report.html").exists()


def test_fewer_samples_than_a_batch_are_one_smaller_batch(tiny_folder):
    trainer = trainer_of(tiny_folder, train={"batch_size": 32}, method={"n_improve_steps": 1})
    rows = []
    step = trainer.optimizer_step
    trainer.optimizer_step = lambda rollouts, chosen: rows.append(chosen) or step(rollouts, chosen)
    trainer.train_round()
    assert trainer.steps_done == 1
    assert 3 <= len(rows[0]) < 24


@pytest.mark.parametrize(("n", "batches"), [(0, 0), (0, 2), (1, 3), (7, 3), (64, 2)])
def test_even_batches(n, batches):
    found = even_batches(n, batches, seed=3, epoch=5)
    assert len(found) == batches
    if batches:
        assert sorted(torch.cat(found).tolist()) == list(range(n))
        assert max(map(len, found)) - min(map(len, found)) <= 1
    assert all(torch.equal(a, b) for a, b in zip(found, even_batches(n, batches, seed=3, epoch=5), strict=True))


def test_dense_rewards_are_summed_and_metadata_reaches_the_function(tiny_folder):
    prompts = Prompts(PROMPTS.texts, {"wanted": ["a", "e", "o"]})

    def scalar(outputs, wanted):
        return [float(output.count(letter)) for output, letter in zip(outputs, wanted, strict=True)]

    def dense(outputs, wanted):
        return [[float(c == letter) for c in output] for output, letter in zip(outputs, wanted, strict=True)]

    one, other = (trainer_of(tiny_folder, function, prompts) for function in (scalar, dense))
    for trainer in (one, other):
        trainer.evaluate_and_record = lambda: None  # its prompts have no metadata
        trainer.train_round()
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert torch.equal(a, b)


def test_what_was_selected_becomes_more_likely_than_what_was_not_and_the_reference_stays(tiny_folder):
    trainer = trainer_of(tiny_folder, model={"delta_kwargs": None}, optimizer={"kwargs": {"lr": 3e-3}})
    before = {name: tensor.clone() for name, tensor in trainer.model.reference.state_dict().items()}
    rollouts = trainer.sample_rollouts()
    passes = trainer.select(rollouts, torch.tensor(vowels(trainer.sampled.texts(rollouts).outputs)))
    is_selected = torch.zeros(rollouts.n_rollouts, dtype=torch.bool)
    is_selected[torch.cat(passes)] = True
    logprobs = []
    for _ in range(2):
        with torch.no_grad():
            logprobs.append(trainer.policy("update", rollouts, 1.0).logprobs_bT.sum(-1))
        trainer.update(rollouts, passes)
    gain = logprobs[1] - logprobs[0]
    assert (gain[is_selected] > 0).all()
    assert gain[is_selected].mean() > gain[~is_selected].mean() + 0.5
    assert before
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.reference.state_dict().items())


def test_steps_and_passes_end_where_the_plan_says(tiny_folder):
    config = rft_config(tiny_folder, train={"epochs": 5})
    plan = describe_steps(config)
    assert (plan.rounds, plan.passes_per_round, [plan.passes_in(i) for i in range(3)]) == (3, 2, [2, 2, 1])
    assert "3 rounds of 8 samples a prompt, 2 passes" in plan.line
    trainer = trainer_of(tiny_folder, train={"epochs": 5})
    passes = []
    trainer.post_backward_callback = lambda: passes.append(trainer.rounds_done)
    trainer.learn()
    assert passes == [0, 0, 1, 1, 2]
    capped = trainer_of(tiny_folder, train={"total_steps": 3})
    capped.learn()
    assert capped.steps_done == 3


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"gen_kwargs": {"max_new_tokens": 6, "do_sample": False}}, "do_sample"),
        ({"n_generations_per_prompt": 1}, "at least 2"),
        ({"start_percentile": 0.9, "end_percentile": 0.5}, "end_percentile"),
    ],
)
def test_settings_that_could_learn_nothing_are_refused(tiny_folder, method, said):
    with pytest.raises(ConfigError, match=said):
        trainer_of(tiny_folder, method=method)


def run_tiny(folder, out, reward_fn=vowels, **sections):
    config = rft_config(folder, **sections).evolve(train={"checkpoint_dir": str(out)})
    return solotune.train(reward_fn=reward_fn, prompts=PROMPTS.texts, config=config), out / "tiny"


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "everything"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tiny_folder, tmp_path, lora):
    sections = {
        "train": {"epochs": 8},
        "model": {} if lora else {"delta_kwargs": None, "num_layers_unfrozen": -1},
        "scheduler": {"name": "cosine_annealing", "kwargs": {"T_max": 40, "eta_min": 1e-4}},
    }
    whole, folder = run_tiny(tiny_folder, tmp_path / "whole", **sections)
    calls = []

    def dies_in_round_three(outputs, **_):
        calls.append(1)
        if len(calls) == 6:  # evaluation, round 1, evaluation, round 2, evaluation, round 3
            raise KeyError
        return vowels(outputs)

    with pytest.raises(RewardError):
        run_tiny(tiny_folder, tmp_path / "parts", dies_in_round_three, **sections)
    sections["train"] = {"epochs": 8, "resume_from_checkpoint": str(tmp_path / "parts" / "tiny")}
    resumed, again = run_tiny(tiny_folder, tmp_path / "parts", **sections)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert (folder / "samples.jsonl").read_text() == (again / "samples.jsonl").read_text()
    timed = ("time/", "memory/", "rollout/tokens_per_second")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_lines(run / "metrics.jsonl")]
        for run in (folder, again)
    ]
    assert rows[0] == rows[1]
    other = {**sections, "method": {"n_generations_per_prompt": 4}}
    with pytest.raises(ConfigError, match="n_generations_per_prompt"):
        run_tiny(tiny_folder, tmp_path / "parts", **other)


def test_a_recipe_runs_and_the_saved_one_runs_again_to_the_same_numbers(tiny_folder, tmp_path):
    (tmp_path / "reward.py").write_text("def reward_fn(outputs, **_):\n    return [len(set(o)) / 6 for o in outputs]\n")
    values = rft_config(tiny_folder).to_dict()
    del values["train"]["trainer"]  # the method's name is enough
    values |= {"data": {"prompts": PROMPTS.texts}, "reward": {"function": f"{tmp_path / 'reward.py'}:reward_fn"}}
    run_recipe(Recipe.from_dict(values), tmp_path / "first")
    run_recipe(Recipe.load_yaml(tmp_path / "first" / "config.yaml"), tmp_path / "second")
    one, two = ((tmp_path / name / "samples.jsonl").read_text() for name in ("first", "second"))
    assert one == two
    first = tmp_path / "first"
    assert {p.name for p in first.iterdir()} >= {"metrics.jsonl", "report.html", "summary.json", "adapter", "best"}
    rows = read_lines(first / "metrics.jsonl")
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    summary = json.loads((first / "summary.json").read_text())
    assert summary["rounds"] == 2
    assert summary["kl"] > 0
    assert summary["steps"] == rows[-1]["step"]


def test_the_method_brings_its_trainer_and_another_methods_is_refused(tiny_folder, tmp_path):
    config = tiny_ppo_config(tiny_folder).evolve(
        train={"trainer": "AccelerateRFTTrainer", "checkpoint_dir": str(tmp_path)}
    )
    with pytest.raises(ConfigError, match=r"does not fit method\.name = 'PPOConfig'"):
        solotune.train(reward_fn=vowels, prompts=PROMPTS.texts, config=config)
    assert isinstance(rft_config(tiny_folder).method, RFTConfig)
