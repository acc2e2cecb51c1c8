"""A round of PPO: what has to be equal, what has to move, what a run leaves behind."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
import torch
from accelerate import Accelerator

import solotune
from solotune.algorithms.ppo import ppo_loss
from solotune.config import PPOConfig, register_method
from solotune.data.prompts import Prompts
from solotune.trainers.ppo import PPOTrainer
from solotune.trainers.run_folder import read_lines
from tests.tiny import EOS, PAD, byte_tokenizer, save_tiny, tiny_lm, tiny_ppo_config
from tests.waiting import reads_of

PROMPTS = Prompts(["a film", "another film, a longer one", "so", "a film"])


def vowels(samples, outputs, **_):
    return [sum(character in "aeiou" for character in output) / 6 for output in outputs]


def trainer_of(folder, reward_fn=vowels, **sections) -> PPOTrainer:
    config = tiny_ppo_config(folder, **sections)
    return PPOTrainer(config, reward_fn, PROMPTS, PROMPTS, accelerator=Accelerator(cpu=True))


def prepared(trainer, noise=0.3):
    """A round's rollouts of a policy that has moved away from its reference, with what credit gives them."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name or "value_head.layers.2" in name:
                parameter.normal_(0, noise)
    rollouts = trainer.sample_rollouts()
    scores = torch.tensor(vowels(*[trainer.sampled.texts(rollouts)[i] for i in (0, 2)]))
    measured = trainer.measure(rollouts)
    return rollouts, measured, trainer.credit(rollouts, scores, measured)


def gradients(trainer, rollouts, measured, credit):
    """The gradient of one step on all rows, without taking it."""
    captured = {}
    step, clip = trainer.optimizer.step, trainer.accelerator.clip_grad_norm_

    def keep(*args, **kwargs):
        captured.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.optimizer.step = keep
    trainer.accelerator.clip_grad_norm_ = lambda parameters, limit: torch.tensor(0.0)
    try:
        trainer.optimizer_step(rollouts, measured, credit, torch.arange(rollouts.n_rollouts))
    finally:
        trainer.optimizer.step, trainer.accelerator.clip_grad_norm_ = step, clip
    return captured


def test_the_first_minibatch_has_ratio_one_and_no_kl(tiny_folder):
    trainer = trainer_of(tiny_folder)
    rollouts, measured, credit = prepared(trainer)
    first = trainer.optimizer_step(rollouts, measured, credit, torch.arange(4))
    _, _, approx_kl, clipfrac, _, ratio, _ = first.tolist()
    assert (approx_kl, clipfrac) == (0.0, 0.0)
    assert ratio == pytest.approx(1.0, abs=1e-6)  # a mean of exact ones
    second = trainer.optimizer_step(rollouts, measured, credit, torch.arange(4))
    assert second[2] > 0, "after a step the policy has moved"


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "last two blocks"])
def test_what_an_update_does_on_a_gpu_is_the_same_and_reads_no_number(tiny_folder, lora, monkeypatch):
    """The host would wait for the device in every step. Its ways are gone here, on a CPU that says it is one."""
    changed = []
    for says_cuda in (False, True):
        torch.manual_seed(0)
        gen = {"max_new_tokens": 6, "eos_token_id": list(range(100))}  # rows of many lengths
        sections = {"train": {"minibatch_size": 2}, "model": {} if lora else {"delta_kwargs": None}}
        kwargs = {"lr": 1e-2, "eps": 1.0}  # without which a gradient of 1e-9 takes a whole step
        trainer = trainer_of(tiny_folder, method={"gen_kwargs": gen}, optimizer={"kwargs": kwargs}, **sections)
        assert trainer.optimizer.optimizer.defaults["fused"]
        given = prepared(trainer)
        with monkeypatch.context() as patch:
            if says_cuda:
                patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
            totals = []
            found = reads_of(lambda t=trainer, g=given, all=totals: all.append(t.optimizer_step(*g, torch.arange(4))))
        assert bool(found) != says_cuda
        changed.append([*totals, *(p.detach() for p in trainer.parameters)])
    for there, here in zip(*changed, strict=True):
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "last two blocks"])
def test_the_gradient_does_not_depend_on_the_micro_batch(tiny_folder, lora):
    model = {} if lora else {"delta_kwargs": None}
    found = []
    for size in (8, 2, 1):
        torch.manual_seed(0)
        gen = {"max_new_tokens": 6, "eos_token_id": list(range(100))}  # rows of many lengths
        trainer = trainer_of(
            tiny_folder, train={"batch_size": 8, "minibatch_size": size}, model=model, method={"gen_kwargs": gen}
        )
        rollouts, measured, credit = prepared(trainer)
        assert len(set(rollouts.response_mask_NT.sum(-1).tolist())) > 2
        found.append(gradients(trainer, rollouts, measured, credit))
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_advantages_are_white_over_response_tokens_and_zero_elsewhere(tiny_folder):
    trainer = trainer_of(tiny_folder, method={"gen_kwargs": {"max_new_tokens": 6, "eos_token_id": list(range(100))}})
    rollouts, _, credit = prepared(trainer)
    mask = rollouts.response_mask_NT
    assert credit.advantages_NT[mask].mean().abs() < 1e-5
    assert credit.advantages_NT[mask].std(correction=0) == pytest.approx(1.0, abs=1e-3)
    assert not credit.advantages_NT[~mask].any()


def test_the_score_sits_on_the_last_real_token(tiny_folder):
    trainer = trainer_of(
        tiny_folder, method={"init_kl_coef": 0.0, "gen_kwargs": {"max_new_tokens": 6, "eos_token_id": list(range(100))}}
    )
    rollouts = trainer.sample_rollouts()
    scores = torch.arange(1.0, 9.0)
    rewards = trainer.credit(rollouts, scores, trainer.measure(rollouts)).rewards_NT
    for row, length in enumerate(rollouts.response_mask_NT.sum(-1).tolist()):
        assert rewards[row, length - 1] == scores[row]
        assert rewards[row].abs().sum() == scores[row]


def test_kl_is_the_sum_over_response_tokens_and_the_controller_sees_its_mean(tiny_folder):
    seen = []
    trainer = trainer_of(tiny_folder, method={"target": 6.0})
    trainer.kl_controller.update = lambda kl, n: seen.append((kl, n))
    metrics = trainer.train_round()
    assert seen == [(metrics["objective/kl"], 8)]
    _, measured, credit = prepared(trainer)
    expected = (measured.logprobs_bT - measured.ref_logprobs_bT).sum(-1).mean()
    assert credit.kl_NT.sum(-1).mean() == pytest.approx(expected.item(), abs=1e-5)


def test_logprobs_are_taken_at_the_sampling_temperature(tiny_folder):
    gaps = {}
    for temperature in (0.5, 1.0, 2.0):
        gen = {"max_new_tokens": 6, "temperature": temperature}
        gaps[temperature] = trainer_of(tiny_folder, method={"gen_kwargs": gen}).train_round()["rollout/logprob_gap"]
    assert max(gaps.values()) < 1e-5


def test_top_k_is_said_to_bias_the_ratio(tiny_folder, capsys):
    trainer_of(tiny_folder, method={"gen_kwargs": {"max_new_tokens": 6, "top_k": 5}})
    assert "ratio is biased" in capsys.readouterr().out.replace("\n", " ")


def test_same_seed_same_metrics_and_another_seed_others(tiny_folder):
    def run(seed):
        trainer = trainer_of(tiny_folder, train={"seed": seed})
        torch.manual_seed(seed * 1000)  # what happens to the global generator does not matter
        rounds = [trainer.train_round() for _ in range(2)]
        return [{k: v for k, v in m.items() if not k.startswith(("time", "memory", "rollout/tokens"))} for m in rounds]

    torch.manual_seed(0)
    first = run(3)
    torch.manual_seed(0)
    assert run(3) == first
    torch.manual_seed(0)
    assert run(4) != first


def test_a_reward_for_ascii_brings_ascii(tiny_folder):
    config = tiny_ppo_config(
        tiny_folder,
        train={"batch_size": 16, "epochs": 100},
        optimizer={"kwargs": {"lr": 1e-2}},
        method={"num_rollouts": 64, "chunk_size": 64, "init_kl_coef": 0.0},
        model={"delta_kwargs": None},
    )
    config.model.model_path = tiny_lm("gpt2", spread=10.0)
    trainer = PPOTrainer(
        config,
        lambda outputs, **_: [sum(character.isascii() for character in output) / 6 for output in outputs],
        PROMPTS,
        PROMPTS,
        accelerator=Accelerator(cpu=True),
    )
    scores = [trainer.train_round()["objective/score"] for _ in range(12)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.2, scores


def test_dense_rewards_are_one_a_token(tiny_folder):
    def dense(outputs, **_):
        return [[0.5] * min(3, len(output)) for output in outputs]

    trainer = trainer_of(tiny_folder, dense, method={"init_kl_coef": 0.0})
    rollouts = trainer.sample_rollouts()
    scores = trainer._as_tensor(trainer.score(trainer.sampled.texts(rollouts)), rollouts)
    rewards = trainer.credit(rollouts, scores, trainer.measure(rollouts)).rewards_NT
    for row, output in enumerate(trainer.sampled.texts(rollouts).outputs):
        n = min(3, len(output))
        assert rewards[row].tolist() == [0.5] * n + [0.0] * (rewards.shape[1] - n)


def test_dense_rewards_for_more_tokens_than_were_sampled_end_on_the_last_one(tiny_folder, caplog):
    """A text that is encoded anew can have more tokens; nothing of its reward is lost, and it is said once."""
    trainer = trainer_of(tiny_folder)
    rollouts = trainer.sample_rollouts()
    given = [[float(i) for i in range(9)]] + [[1.0]] * 7
    with caplog.at_level("WARNING"):
        dense = trainer._as_tensor(given, rollouts)
        trainer._as_tensor(given, rollouts)
    length = int(rollouts.response_mask_NT[0].sum())
    assert length < 9
    assert dense[0, : length - 1].tolist() == given[0][: length - 1]
    assert float(dense[0, length - 1]) == sum(given[0][length - 1 :])
    assert dense[1].tolist() == [1.0] + [0.0] * (dense.shape[1] - 1)
    assert caplog.text.count("for 1 of 8 samples") == 1


def test_only_the_plan_is_run(tiny_folder):
    trainer = trainer_of(tiny_folder, train={"total_steps": 6})
    trainer.learn()
    assert (trainer.steps_done, trainer.rounds_done) == (6, 2), "4 steps, and 2 of the second round's 4"


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
    from solotune.trainers.run import run_recipe

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


def test_a_pass_that_does_not_fit_is_repeated_in_smaller_ones_to_the_same_result(tiny_folder, caplog):
    """Two rows fit: measuring and every step of the update run out of memory with four, in the middle of a pass."""
    found = []
    for limit in (None, 2):
        torch.manual_seed(0)
        trainer = trainer_of(tiny_folder, train={"batch_size": 4})
        whole = trainer.policy

        def tight(task, rollouts, *args, whole=whole, limit=limit, **kwargs):
            result = whole(task, rollouts, *args, **kwargs)
            if limit is not None and task in ("measure", "update") and rollouts.n_rollouts > limit:
                result.logprobs_bT.sum().backward() if task == "update" else None  # a gradient is there already
                raise torch.OutOfMemoryError("no room")
            return result

        trainer.policy = tight
        with caplog.at_level("WARNING"):
            trainer.train_round()
        found.append([p.detach().clone() for p in trainer.parameters])
        assert trainer.micro_batch == (4 if limit is None else 2)
    assert caplog.text.count("repeated with 2 rows at a time") == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)  # Adam steps of 0.01 on gradients near zero


def test_one_row_that_does_not_fit_is_the_end(tiny_folder):
    trainer = trainer_of(tiny_folder)

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        trainer.in_memory(full)
    assert trainer.micro_batch == 1


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


def test_many_prompts_get_a_file_of_their_own(tiny_folder, tmp_path):
    config = tiny_ppo_config(tiny_folder).evolve(train={"checkpoint_dir": str(tmp_path), "total_steps": 4})
    prompts = [{"prompt": f"film {n}", "n": n} for n in range(101)]
    solotune.train(reward_fn=vowels, prompts=prompts, eval_prompts=["a"], config=config)
    recipe = solotune.Recipe.load_yaml(tmp_path / "tiny" / "config.yaml")
    assert recipe.data.prompts == str(tmp_path / "tiny" / "prompts.jsonl")
    assert read_lines(tmp_path / "tiny" / "prompts.jsonl")[100] == {"prompt": "film 100", "n": 100}


def test_a_loss_of_ones_own_is_weighed_by_its_tokens(tiny_folder):
    """An override that calls PPO's own loss takes the same step, however the batch is cut."""

    @register_method
    @dataclass
    class OwnPPOConfig(PPOConfig):
        def loss(self, *args, **kwargs):
            return super().loss(*args, **kwargs)

    found = []
    for cls in (PPOConfig, OwnPPOConfig):
        torch.manual_seed(0)
        trainer = trainer_of(
            tiny_folder, train={"minibatch_size": 1}, method={"gen_kwargs": {"eos_token_id": list(range(60))}}
        )
        trainer.method = cls(**{f.name: getattr(trainer.method, f.name) for f in fields(cls) if f.name != "name"})
        rollouts, measured, credit = prepared(trainer)
        assert len(set(rollouts.response_mask_NT.sum(-1).tolist())) > 1, "rows of different lengths"
        found.append(gradients(trainer, rollouts, measured, credit))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


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


def test_a_tokenizer_without_a_pad_token_changes_nothing(tiny_folder, tmp_path):
    folder = save_tiny(tmp_path / "no-pad")
    byte_tokenizer(pad=None).save_pretrained(folder)
    ours, theirs = (trainer_of(f, method={"gen_kwargs": {"max_new_tokens": 6}}) for f in (tiny_folder, folder))
    assert (ours.tokenizer.pad_token_id, theirs.tokenizer.pad_token_id) == (PAD, EOS)
    one, other = ours.sample_rollouts(), theirs.sample_rollouts()
    assert [one.response_tokens(row) for row in range(8)] == [other.response_tokens(row) for row in range(8)]
    torch.testing.assert_close(ours.measure(one).logprobs_bT, theirs.measure(other).logprobs_bT)


def test_stop_sequences_end_responses_and_are_cut_off(tiny_folder):
    method = {"num_rollouts": 64, "gen_kwargs": {"max_new_tokens": 20}}
    config = tiny_ppo_config(tiny_folder, method=method, train={"seq_length": 64})
    stops = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    trainer = PPOTrainer(config, vowels, PROMPTS, PROMPTS, stop_sequences=stops, accelerator=Accelerator(cpu=True))
    rollouts = trainer.sample_rollouts()
    texts = trainer.sampled.texts(rollouts, stops)
    assert not any(stop in output for output in texts.outputs for stop in stops)
    assert (rollouts.finish_N == 2).any()
    assert rollouts.response_mask_NT.sum(-1).float().mean() < 15


def test_a_loss_that_ignores_the_mask_would_be_noticed(tiny_folder):
    """Poison outside the mask reaches neither loss nor gradient."""
    trainer = trainer_of(tiny_folder, method={"gen_kwargs": {"max_new_tokens": 6, "eos_token_id": list(range(100))}})
    rollouts, measured, credit = prepared(trainer)
    mask = rollouts.response_mask_NT
    poisoned = credit.advantages_NT.masked_fill(~mask, torch.nan)
    loss = ppo_loss(
        measured.logprobs_bT, measured.values_bT, measured.logprobs_bT, measured.values_bT,
        poisoned, credit.returns_NT, mask,
        cliprange=0.2, cliprange_value=0.2, vf_coef=1.0, denominator=mask.sum(),
    )  # fmt: skip
    assert torch.isfinite(loss.loss)
