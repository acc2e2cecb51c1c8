"""How long a run will take: its operations counted by hand, and what is said of them."""

import json

import pytest
import torch
import transformers

from solotune.config import DataConfig, Recipe, RewardConfig
from solotune.models.loading import build_policy
from solotune.trainers import estimate as est
from solotune.trainers import work
from solotune.trainers.estimate import Estimate, Rates, Reward, roughly
from tests.tiny import save_tiny, tiny_ppo_config

CPU = torch.device("cpu")
NO_REWARD = Reward(0, 0.0, [], 1)
EVEN = Rates(1.0, 1.0, 1.0, 1.0)


def recipe_of(folder, reward=None, **sections) -> Recipe:
    reward = reward or RewardConfig(function="f.py:g")
    return Recipe(tiny_ppo_config(folder, **sections), DataConfig(["a film"], eval_prompts=["a", "b"]), reward)


def policy_of(recipe):
    return build_policy(recipe.config, meta=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


def test_a_rounds_operations_are_those_counted_by_hand(llama):
    """Width 32, 4 heads and 2 of keys, MLP 64, 4 blocks, vocabulary 259; LoRA r=4 on the attention of the last two."""
    recipe = recipe_of(llama)
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    lora = 4 * (32 + 32) + 2 * 4 * (32 + 16) + 4 * (32 + 32)
    weights = work.Weights.of(policy_of(recipe))
    head, critic = 259 * 32, 32 * 64 + 64
    assert weights == (2 * block, 2 * (block + lora), 2 * lora, head, 0, critic, 0)
    n, p, t, s = 8, 5, 6, 5 + 6 - 1
    found = work.ppo_round(recipe.config, weights, prompt_width=p)
    body, top = 4 * block + 2 * lora, 2 * (block + lora)
    assert found.steps == 2 * n * 5 * body
    measured = 2 * n * (s * 2 * top + t * critic)
    learned = 2 * n * (s * (2 * top + 2 * lora) + 3 * t * critic)
    assert found.passes == 2 * n * p * body + measured + 2 * learned
    assert found.head == 2 * n * t * head * (1 + 2 + 2 * 2)


def test_what_is_trained_in_place_costs_its_own_gradient(llama):
    whole = recipe_of(llama, model={"delta_kwargs": None, "num_layers_unfrozen": -1})
    weights = work.Weights.of(policy_of(whole))
    assert weights.trunk == 0
    assert weights.trained == weights.top
    learned = work.learning(weights._replace(critic=0), 1, 5, 6)
    assert weights.trained_head == weights.head
    assert learned == (0, 2 * 10 * 3 * weights.top, 2 * 6 * 3 * weights.head)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gemma3_text"])
def test_tables_that_tokens_look_themselves_up_in_are_not_multiplied(tmp_path, architecture):
    lm = transformers.AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model", architecture))
    embeddings = lm.get_input_embeddings().weight.numel()
    everything = sum(p.numel() for p in lm.parameters() if p.dim() == 2)
    assert 0 < work.matrix_weights([lm]) <= everything - embeddings


def test_time_goes_with_rounds_and_rollouts(llama):
    def seconds(**sections):
        recipe = recipe_of(llama, **sections)
        return est.estimate(recipe, policy_of(recipe), NO_REWARD, EVEN)

    once = seconds(train={"epochs": 5})
    twice = seconds(train={"epochs": 10})
    assert (once.rounds, twice.rounds) == (5, 10)
    assert twice.round == once.round
    more = seconds(train={"epochs": 5}, method={"num_rollouts": 24})
    assert more.round == pytest.approx(3 * once.round)
    assert seconds(train={"epochs": 5}, method={"ppo_epochs": 4}).round > once.round


def test_a_reward_model_is_counted_by_the_rows_and_blocks_that_learn(tmp_path, monkeypatch):
    """BERT of width 16, MLP 32, 2 blocks and a pooler; 40 rows of 10 words, 10 of them held out."""
    from transformers import BertModel

    from tests.rewards.words import bert_config, save, word_tokenizer

    monkeypatch.setenv("SOLOTUNE_CACHE", str(tmp_path / "cache"))
    base = save(tmp_path / "bert", BertModel(bert_config()), word_tokenizer("$A", pad_token="<pad>"))
    rows = [{"text": "good " * 10, "rating": 1.0}] * 40
    (tmp_path / "ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def counted(**changes):
        training = {"base": base, "data": str(tmp_path / "ratings.jsonl"), "holdout": 10, "max_length": 8, **changes}
        return est.reward_work(RewardConfig(training=training))

    weights = 2 * (4 * 16 * 16 + 2 * 16 * 32) + 16 * 16
    assert counted().weights == weights
    assert counted().training == 2 * weights * 8 * (30 * 3 + 10)
    assert counted(epochs=2, max_rows=20).training == 2 * weights * 8 * (2 * 20 * 3 + 10)
    assert counted(num_layers_unfrozen=1).training == 2 * weights * 8 * (30 * 2 + 10)


def test_evaluations_are_counted_as_a_run_makes_them(llama, tmp_path):
    import solotune

    for interval in (1000, 4, 5):
        train = {"epochs": 3, "eval_interval": interval, "checkpoint_dir": str(tmp_path)}
        config = tiny_ppo_config(llama, train=train)
        trainer = solotune.train(reward_fn=lambda samples, **_: [1.0] * len(samples), prompts=["a"], config=config)
        rows = [json.loads(line) for line in trainer.run.samples.read_text().splitlines()]
        assert len({row["step"] for row in rows}) == work.n_evaluations(config), interval


def test_the_line_has_no_more_digits_than_are_known():
    line = Estimate(61.0, 11.04, 40, 20.0, 86.4e9).line()
    assert line == "about 9 minutes on this machine (86 GFLOP/s): reward model 60 seconds, 40 rounds of 11 s"
    assert [roughly(s) for s in (3, 44, 95, 5000, 9000, 200_000)] == [
        "10 seconds", "40 seconds", "2 minutes", "83 minutes", "2.5 hours", "2.3 days"
    ]  # fmt: skip


def test_nothing_is_said_of_what_cannot_be_known(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(est, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(est, "SECONDS_OF_TIMING", 0.01)
    classifier = RewardConfig(classifier=str(llama), label="x")
    known = recipe_of(llama, classifier)
    line, is_done = est.first_line(known, CPU)
    assert is_done
    assert line.startswith("about ")
    assert "2 rounds of" in line
    assert est.time_line(known, torch.device("cuda"), policy_of(known)) is None
    assert est.first_line(recipe_of(llama), CPU) == (None, True), "a function"
    assert est.first_line(recipe_of(llama, RewardConfig(classifier="nobody/nothing", label="x")), CPU) == (None, True)
    elsewhere = recipe_of(llama, classifier, model={"model_path": "nobody/nothing"})
    assert est.first_line(elsewhere, CPU) == (None, False)


def test_a_short_run_costs_no_timing(llama, monkeypatch):
    monkeypatch.setattr(est, "measured_rates", lambda *_: pytest.fail("timed"))
    assert est.first_line(recipe_of(llama, RewardConfig(classifier=str(llama), label="x")), CPU) == (None, True)


def test_assets_that_are_not_here_are_told_with_their_size(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("SOLOTUNE_CACHE", str(tmp_path))
    recipe = recipe_of(llama)
    recipe.data.prompts = "asset:film-snippets"
    assert est.first_line(recipe, CPU)[0] == "2.40 MB to download, 3.00 MB on disk"
    from solotune.data.assets import _ASSETS

    _ASSETS["asset:film-snippets"].folder().mkdir(parents=True)
    assert est.first_line(recipe, CPU)[0] is None


def test_a_rate_is_of_products(monkeypatch):
    monkeypatch.setattr(est, "SECONDS_OF_TIMING", 0.02)
    assert 1e7 < est.measured_rate([(256, 128), (128, 256)], 64, torch.float32) < 1e14
