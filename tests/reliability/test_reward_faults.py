"""Reward functions that raise, answer nonsense, hang, or draw random numbers."""

import contextlib
import json
import math
import random
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from solotune.data.prompts import Prompts
from solotune.errors import RewardError
from solotune.rewards.guard import OnError, random_numbers_of_its_own
from solotune.runs.folder import RunFolder, read_lines
from solotune.trainers.ppo import PPOTrainer
from tests.tiny import tiny_ppo_config

PROMPTS = Prompts(["a film", "so", "the plot"])
CALLS = 5  # of a run of two rounds: an evaluation, and two times a round and an evaluation


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A trainer without a run's folder leaves the samples that a function failed on where it is."""
    monkeypatch.chdir(tmp_path)


def value(output):
    return sum(map(ord, output)) % 7 / 7


def good(outputs):
    return [value(output) for output in outputs]


class Faulty:
    """`good`, but at some of its calls something else happens."""

    def __init__(self, fault, calls=None):
        self.fault, self.calls, self.count = fault, calls, 0

    def __call__(self, outputs):
        self.count += 1
        return self.fault(outputs) if self.calls is None or self.count - 1 in self.calls else good(outputs)


def raises(outputs):
    raise OSError("the service is down")


def trainer_of(folder, reward_fn, run=None, on_error=None, **sections):
    torch.manual_seed(0)
    config = tiny_ppo_config(folder, **sections)
    run = RunFolder(run, continued=True) if run is not None else None
    return PPOTrainer(
        config, reward_fn, PROMPTS, PROMPTS, run=run, on_error=on_error, accelerator=Accelerator(cpu=True)
    )


@pytest.fixture(scope="module")
def undisturbed(tiny_folder, tmp_path_factory):
    trainer = trainer_of(tiny_folder, good, tmp_path_factory.mktemp("runs") / "undisturbed")
    trainer.learn()
    return trainer


def assert_same_end(trainer, undisturbed):
    pairs = zip(trainer.parameters, undisturbed.parameters, strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert trainer.last_evaluation == undisturbed.last_evaluation
    if trainer.run is not None:
        assert trainer.run.samples.read_text() == undisturbed.run.samples.read_text()
        assert [row["step"] for row in read_lines(trainer.run.metrics)] == [4, 8]


@pytest.mark.parametrize("call", range(1, CALLS))
def test_a_run_that_a_reward_function_stopped_goes_on_to_the_same_end(tiny_folder, undisturbed, tmp_path, call):
    stopped = trainer_of(tiny_folder, Faulty(raises, [call]), tmp_path / "run")
    with pytest.raises(RewardError, match=r"the service is down.*reward_failure\.jsonl.*The state is saved"):
        stopped.learn()
    stopped.run.release()
    resumed = trainer_of(tiny_folder, good, tmp_path / "run")
    resumed.learn(resumed.run.checkpoints)
    assert_same_end(resumed, undisturbed)


def test_a_service_that_comes_back_costs_nothing(tiny_folder, undisturbed, monkeypatch):
    waited = []
    monkeypatch.setattr("solotune.rewards.guard.time.sleep", waited.append)
    trainer = trainer_of(tiny_folder, Faulty(raises, [0, 1, 3]), on_error=OnError("retry", retries=2, backoff=5.0))
    trainer.learn()
    assert_same_end(trainer, undisturbed)
    assert waited == [5.0, 10.0, 5.0]


def test_one_that_stays_away_stops_the_run(tiny_folder, monkeypatch):
    monkeypatch.setattr("solotune.rewards.guard.time.sleep", lambda _: None)
    fault = Faulty(raises)
    with pytest.raises(RewardError, match="the service is down"):
        trainer_of(tiny_folder, fault, on_error=OnError("retry", retries=2)).learn()
    assert fault.count == 3


def hangs(_):
    time.sleep(60)


NONSENSE = {
    "raises": raises,
    "not a number": lambda _: [math.nan],
    "infinite": lambda _: [math.inf],
    "nothing": lambda _: None,
    "text": lambda _: ["good"],
    "too many": lambda outputs: [1.0] * (len(outputs) + 1),
    "hangs": hangs,
}


@pytest.mark.parametrize("fault", NONSENSE.values(), ids=NONSENSE)
def test_samples_that_get_no_reward_are_left_out_and_counted(tiny_folder, tmp_path, fault):
    def failing(outputs):
        return fault(outputs) if any(value(output) > 0.6 for output in outputs) else good(outputs)

    on_error = OnError("skip", timeout=0.05 if fault is hangs else None)
    trainer = trainer_of(tiny_folder, failing, tmp_path / "run", on_error)
    metrics = trainer.train_round()
    again = trainer_of(tiny_folder, good)
    outputs = again.sampled.texts(again.sample_rollouts()).outputs
    kept = [value(output) for output in outputs if value(output) <= 0.6]
    assert 0 < len(kept) < len(outputs)
    assert metrics["rollout/skipped"] == len(outputs) - len(kept)
    assert metrics["objective/score"] == pytest.approx(sum(kept) / len(kept))
    assert all(math.isfinite(number) for number in metrics.values())
    failures = [json.loads(line) for line in (tmp_path / "run" / "reward_failure.jsonl").read_text().splitlines()]
    assert [row["output"] for row in failures] == [output for output in outputs if value(output) > 0.6]
    assert all(row["error"] for row in failures)


def test_nothing_is_learned_from_what_is_left_out(tiny_folder):
    """Rows of which nothing is counted: the others' advantages and gradient are as if they had been alone."""
    trainer = trainer_of(tiny_folder, good)
    rollouts = trainer.sample_rollouts()
    kept = torch.tensor([0, 2, 3, 6])
    results = []
    for given in (rollouts.without([1, 4, 5, 7]), rollouts.select(kept)):
        rows = kept if given.n_rollouts == 8 else torch.arange(4)
        scores = torch.zeros(given.n_rollouts)
        scores[rows] = torch.tensor([1.0, -2.0, 0.5, 3.0])
        measured = trainer.measure(given)
        credit = trainer.credit(given, scores, measured)
        trainer._accumulate(given, measured, credit, torch.arange(given.n_rollouts), 8)
        results.append((credit.advantages_NT[rows], [p.grad.clone() for p in trainer.parameters]))
        trainer.optimizer.zero_grad()
    (some, gradients), (alone, others) = results
    torch.testing.assert_close(some, alone, atol=1e-6, rtol=0)
    for mine, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_a_function_that_fails_on_everything_stops_even_with_skip(tiny_folder, tmp_path):
    with pytest.raises(RewardError, match="failed on every sample"):
        trainer_of(tiny_folder, raises, tmp_path / "run", OnError("skip")).learn()


def test_evaluations_leave_out_what_has_no_reward(tiny_folder, tmp_path):
    def failing(outputs, prompts):
        return [math.nan if prompt == "so" else 0.5 for prompt in prompts]

    trainer = trainer_of(tiny_folder, failing, tmp_path / "run", OnError("skip"))
    evaluation = trainer.evaluate_and_record()
    assert evaluation.reward == 0.5
    assert [sample["reward"] for sample in read_lines(trainer.run.samples)] == [0.5, None, 0.5]


def test_a_function_that_swallows_every_exception_is_interrupted_all_the_same(tiny_folder):
    def stubborn(outputs):
        while True:
            try:
                time.sleep(10)
            except Exception:
                continue

    began = time.perf_counter()
    with pytest.raises(RewardError, match=r"stubborn took longer than reward\.timeout = 0\.2 s"):
        trainer_of(tiny_folder, stubborn, on_error=OnError(timeout=0.2)).evaluate()
    assert time.perf_counter() - began < 30


class Gambler:
    """`good`, and it draws from every global generator, and seeds them."""

    def __init__(self):
        self.drawn = []

    def __call__(self, outputs):
        self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return good(outputs)


def test_random_numbers_of_a_reward_function_are_its_own(tiny_folder, undisturbed, tmp_path):
    whole, first, second = Gambler(), Gambler(), Gambler()
    trainer = trainer_of(tiny_folder, whole)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    trainer.learn()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert_same_end(trainer, undisturbed)
    assert len(set(whole.drawn)) == CALLS, "other numbers at every call"
    stopped = trainer_of(tiny_folder, first, tmp_path / "run")
    stopped.evaluate_and_record()
    stopped.train_round()
    stopped.save_checkpoint()
    stopped.run.release()
    resumed = trainer_of(tiny_folder, second, tmp_path / "run")
    resumed.learn(resumed.run.checkpoints)
    assert first.drawn + second.drawn == whole.drawn, "the same ones after an interruption"


def test_generators_go_on_after_an_error():
    state = random.getstate()
    with contextlib.suppress(KeyError), random_numbers_of_its_own(1, 2):
        random.random()
        raise KeyError
    assert random.getstate() == state
