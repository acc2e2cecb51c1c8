"""A round of PPO: what has to be equal and what has to move."""

from dataclasses import dataclass, fields

import pytest
import torch
from accelerate import Accelerator

from solotune.algorithms.ppo import ppo_loss
from solotune.config import PPOConfig, register_method
from solotune.data.prompts import Prompts
from solotune.trainers.ppo import PPOTrainer
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
