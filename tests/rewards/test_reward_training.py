"""Reward-model training: it learns, its zero is where it is said to be, and what it saves is an ordinary folder."""

import dataclasses
import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from solotune.config import RewardConfig, RewardTrainingConfig
from solotune.errors import ConfigError, DataError, ModelError
from solotune.rewards import build_reward
from solotune.rewards.base import load_base
from solotune.rewards.training import train_reward_model
from tests.rewards.words import BAD, GOOD, PLAIN


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOLOTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sentence(words, rng):
    return " ".join([rng.choice(words), *rng.choices(PLAIN, k=rng.randint(2, 8))])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def ratings(tmp_path):
    """400 texts with one good or bad word, rated 4.5 or 1.5 of 1 .. 5: the middle is 3."""
    rng = random.Random(0)
    rows = []
    for i in range(400):
        rows.append({"text": sentence(GOOD if i % 2 else BAD, rng), "rating": 4.5 if i % 2 else 1.5})
    return write(tmp_path / "ratings.jsonl", rows)


@pytest.fixture
def pairs(tmp_path):
    rng = random.Random(0)
    rows = [{"chosen": sentence(GOOD, rng), "rejected": sentence(BAD, rng)} for _ in range(200)]
    return write(tmp_path / "pairs.jsonl", rows)


def settings(base, data, **changes):
    usual = {
        "rating_min": 1,
        "rating_max": 5,
        "holdout": 50,
        "epochs": 5,
        "lr": 3e-3,
        "max_length": 16,
        "batch_size": 8,
    }
    return RewardTrainingConfig(base=base, data=data, **{**usual, **changes})


def card(folder):
    return json.loads((folder / "reward_model.json").read_text())


def rng_texts(words, count=20):
    rng = random.Random(99)
    return [sentence(words, rng) for _ in range(count)]


def score(cfg, texts, **changes):
    return torch.tensor(build_reward(RewardConfig(training=cfg, **changes))(samples=texts))


@pytest.mark.parametrize("base", ["encoder", "decoder"])
@pytest.mark.parametrize("objective", ["ratings", "pairs"])
def test_ratings_are_learned_by_either_objective_and_any_model(request, ratings, base, objective):
    cfg = settings(request.getfixturevalue(base), ratings, objective=objective)
    heldout = card(train_reward_model(cfg))["heldout"]
    assert heldout["rows"] == 50
    assert heldout["pairwise_accuracy"] > 0.95
    assert heldout["sign_accuracy"] > 0.95  # the zero is at a rating of 3, the middle of the range
    assert heldout["brier"] < 0.1
    good, bad = score(cfg, rng_texts(GOOD), transform="none"), score(cfg, rng_texts(BAD), transform="none")
    assert (good > 0).float().mean() > 0.9
    assert (bad < 0).float().mean() > 0.9
    torch.testing.assert_close(score(cfg, rng_texts(GOOD)), good.sigmoid())


@pytest.mark.parametrize("base", ["encoder", "decoder"])
def test_the_last_blocks_alone_learn_and_what_lies_below_them_stays(request, ratings, base):
    base = request.getfixturevalue(base)
    start, _ = load_base(base, torch.device("cpu"))
    n_blocks = start.config.num_hidden_layers
    folder = train_reward_model(settings(base, ratings, num_layers_unfrozen=1, max_rows=200))
    assert card(folder)["heldout"]["sign_accuracy"] > 0.8  # 0.5 is a coin
    assert card(folder)["train_rows"] == 200
    trained = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    moved = {name for name, before in start.state_dict().items() if not torch.equal(before, trained[name])}
    blocks = [name for name in moved if any(part.isdigit() for part in name.split("."))]
    assert blocks
    assert all(f".{n_blocks - 1}." in name for name in blocks)
    assert not any("embed" in name or "wte" in name or "wpe" in name for name in moved)
    assert any("score" in name or "classifier" in name for name in moved)


def test_more_blocks_than_there_are_is_an_error_before_anything_is_learned(encoder, ratings, cache):
    with pytest.raises(ModelError, match=r"num_layers_unfrozen = 99: .* has \d+ blocks"):
        train_reward_model(settings(encoder, ratings, num_layers_unfrozen=99))
    with pytest.raises(ConfigError, match="num_layers_unfrozen = 0"):
        settings(encoder, ratings, num_layers_unfrozen=0)


def test_the_rows_that_are_learned_from_are_drawn_at_random(encoder, tmp_path):
    """The file is sorted: its beginning alone would teach that everything is bad."""
    rng = random.Random(0)
    rows = [{"text": sentence(words, rng), "rating": r} for words, r in ((BAD, 1.5), (GOOD, 4.5)) for _ in range(300)]
    cfg = settings(encoder, write(tmp_path / "sorted.jsonl", rows), max_rows=150)
    assert card(train_reward_model(cfg))["heldout"]["sign_accuracy"] > 0.9


@pytest.mark.parametrize("base", ["encoder", "decoder"])
def test_pairs_are_learned_and_their_scores_centred(request, pairs, base):
    cfg = settings(request.getfixturevalue(base), pairs, objective="pairs")
    folder = train_reward_model(cfg)
    assert card(folder)["heldout"]["pairwise_accuracy"] > 0.95
    assert card(folder)["heldout"]["sign_accuracy"] is None
    with open(pairs) as lines:
        rows = [json.loads(line) for line in lines]
    scores = score(cfg, [row[side] for row in rows for side in ("chosen", "rejected")], transform="none")
    assert abs(scores.mean()) < 0.2 * scores.std()


def test_of_rated_texts_the_soft_label_is_learned_not_the_class(encoder, tmp_path):
    rng = random.Random(0)
    rows = [{"text": sentence(GOOD if i % 2 else BAD, rng), "rating": 3.4 if i % 2 else 1.0} for i in range(400)]
    cfg = settings(encoder, write(tmp_path / "r.jsonl", rows), epochs=6)
    assert score(cfg, rng_texts(GOOD)).mean() == pytest.approx((3.4 - 1) / 4, abs=0.1)
    assert score(cfg, rng_texts(BAD)).mean() < 0.15


def test_the_folder_is_an_ordinary_one(encoder, ratings):
    cfg = settings(encoder, ratings)
    folder = train_reward_model(cfg)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = rng_texts(GOOD, 3) + rng_texts(BAD, 3)
    logits = torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts]).detach()
    torch.testing.assert_close(score(cfg, texts, transform="none"), logits, atol=1e-4, rtol=1e-4)
    assert sorted(path.suffix for path in folder.iterdir() if path.suffix not in (".json", ".txt")) == [".safetensors"]


def test_an_offset_without_room_in_the_head_is_kept_beside_it(encoder, decoder, pairs):
    for base, has_bias in ((encoder, True), (decoder, False)):
        cfg = settings(base, pairs, objective="pairs", epochs=1)
        folder = train_reward_model(cfg)
        model, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
        logit = model(**tokenizer("a good film", return_tensors="pt")).logits[0, 0].item()
        offset = card(folder)["offset"]
        assert (offset == 0) == has_bias
        assert score(cfg, ["a good film"], transform="none").item() == pytest.approx(logit + offset, abs=1e-5)


def test_the_seed_decides_everything_and_the_callers_random_state_is_left_alone(encoder, ratings, tmp_path):
    def weights(name, **changes):
        cfg = settings(encoder, ratings, epochs=1, output_dir=str(tmp_path / name), **changes)
        return load_file(train_reward_model(cfg) / "model.safetensors")

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = weights("one")
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    again, other = weights("two"), weights("three", seed=1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_trained_model_is_reused_until_something_it_depends_on_changes(encoder, ratings):
    cfg = settings(encoder, ratings, epochs=1)
    folder = train_reward_model(cfg)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert train_reward_model(dataclasses.replace(cfg)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert train_reward_model(dataclasses.replace(cfg, lr=1e-3)) != folder
    with open(ratings, "a") as file:
        file.write('{"text": "a great story", "rating": 5}\n')
    assert train_reward_model(cfg) != folder


def test_a_folder_with_something_else_is_not_overwritten(encoder, ratings, tmp_path):
    (tmp_path / "mine").mkdir()
    cfg = settings(encoder, ratings, epochs=1, output_dir=str(tmp_path / "mine"))
    assert train_reward_model(cfg) == tmp_path / "mine"  # an empty one is
    assert train_reward_model(cfg) == tmp_path / "mine"
    with pytest.raises(ConfigError, match=r"output_dir.*not overwritten"):
        train_reward_model(dataclasses.replace(cfg, seed=3))


def test_a_training_that_fails_leaves_no_folder(encoder, ratings, cache):
    with pytest.raises(ModelError, match=r"loss is .* lower reward\.training\.lr"):
        train_reward_model(settings(encoder, ratings, lr=1e30))
    assert not list(cache.rglob("*.safetensors"))


def test_what_cannot_be_trained_is_said(encoder, ratings, tmp_path):
    with pytest.raises(DataError, match="cannot hold out 1000 of 400"):
        train_reward_model(settings(encoder, ratings, holdout=1000))
    with pytest.raises(ModelError, match=r"reward\.training\.base = 'nobody/nothing'"):
        train_reward_model(settings("nobody/nothing", ratings))
    equal = write(tmp_path / "equal.jsonl", [{"text": f"film {i}", "rating": 3} for i in range(90)])
    with pytest.raises(DataError, match="no two ratings differ"):
        train_reward_model(settings(encoder, equal, objective="pairs"))


def test_of_long_pairs_the_end_is_read(encoder, tmp_path):
    rng = random.Random(0)
    start = " ".join(["the", "film"] * 20)
    rows = [
        {"chosen": f"{start} {sentence(GOOD, rng)}", "rejected": f"{start} {sentence(BAD, rng)}"} for _ in range(200)
    ]
    cfg = settings(encoder, write(tmp_path / "long.jsonl", rows), objective="pairs")
    assert card(train_reward_model(cfg))["heldout"]["pairwise_accuracy"] > 0.95
    good, bad = (score(cfg, [f"{start} {text}" for text in rng_texts(words)]) for words in (GOOD, BAD))
    assert good.mean() > bad.mean() + 0.2


def test_only_a_trained_folder_is_a_reward_model(encoder, ratings):
    with pytest.raises(ModelError, match=r"no reward_model\.json.*reward\.classifier"):
        build_reward(RewardConfig(model=encoder))
    folder = train_reward_model(settings(encoder, ratings, epochs=1))
    assert len(build_reward(RewardConfig(model=str(folder)))(samples=["good"])) == 1
