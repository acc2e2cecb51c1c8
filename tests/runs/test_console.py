"""A whole run whose output goes to a file: every phase is named in it, in few plain lines."""

import json
import os
import random
import re
import subprocess
import sys
import time

import pytest
import yaml

from solotune.runs.lines import read_lines
from tests.rewards.words import BAD, GOOD, PLAIN, bert_config, save, word_tokenizer
from tests.tiny import import_path, tiny_offline_config, tiny_ppo_config


def command(*arguments, cwd, **environment):
    """`solotune ARGUMENTS` with its output in a file; what it said, with its errors."""
    log = cwd / "log.txt"
    with log.open("wb") as file:
        code = subprocess.run(
            [sys.executable, "-m", "solotune.cli", *map(str, arguments)],
            stdout=file, stderr=subprocess.STDOUT, cwd=cwd, check=False,
            env={**os.environ, "PYTHONPATH": import_path(), "SOLOTUNE_CACHE": str(cwd / "cache"), **environment},
        ).returncode  # fmt: skip
    said = log.read_bytes().decode()
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def recipe(tiny_folder, tmp_path_factory):
    """PPO for a reward model that is trained first, on 400 rated texts."""
    from transformers import BertModel

    folder, rng = tmp_path_factory.mktemp("recipe"), random.Random(0)
    tokenizer = word_tokenizer("<cls> $A <sep>", pad_token="<pad>", cls_token="<cls>", sep_token="<sep>")
    save(folder / "encoder", BertModel(bert_config()), tokenizer)
    rows = [
        {"text": " ".join([rng.choice(GOOD if i % 2 else BAD), *rng.choices(PLAIN, k=6)]), "rating": 4.0 * (i % 2)}
        for i in range(400)
    ]
    (folder / "ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = tiny_ppo_config(tiny_folder).evolve(train={"epochs": 12, "eval_interval": 8}).to_dict()
    values["data"] = {"prompts": ["a film", "another film"], "eval_repeats": 8}
    training = {"base": str(folder / "encoder"), "data": str(folder / "ratings.jsonl"), "holdout": 50}
    values["reward"] = {"training": {**training, "max_length": 16, "batch_size": 8}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder / "tiny.yaml"


def test_a_run_in_a_file_names_its_phases_in_few_plain_lines(recipe, tmp_path):
    started = time.time()
    said = command("train", recipe, "--out", tmp_path / "run", cwd=tmp_path)
    ended = time.time()
    lines = said.split("\n")
    for named in (
        *("reward model: ", "scoring 50 held-out rows", "loading the model", "evaluating 16 samples"),
        *("round 1 of 12 begins", "round 12 of 12: score ", "KL "),
    ):
        assert named in said, named
    assert not re.search(r"[\r\x1b\t]", said)
    assert [line for line in lines if line != line.rstrip()] == []
    assert max(map(len, lines)) <= max(100, *(len(line) for line in lines if "go on with" in line or "report" in line))
    assert not re.search(r"Loading weights|it/s|Writing model shards|Warning", said)
    told = [line for line in lines if line.startswith(("round ", "evaluating"))]
    assert len(told) <= 12 + 2 * (2 + 6) + (ended - started) / 5
    assert said.count("score ") <= 12
    at = [row["time/at"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert at == sorted(at)
    assert started < at[0] <= at[-1] < ended


def test_a_run_over_given_samples_tells_its_loss(tiny_folder, tmp_path):
    config = tiny_offline_config(tiny_folder, "sft").to_dict()
    config["data"] = {"samples": ["a film that is fine", "a film that is dull", "a plot"] * 4}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    said = command("train", "sft.yaml", "--out", "run", cwd=tmp_path)
    assert "reading the samples\n" in said
    assert "frozen trunk: 12 samples\n" in said
    last = [line for line in said.splitlines() if line.startswith("round ")][-1]
    assert re.fullmatch(r"round (\d+) of \1: loss \d+\.\d{3}, .* a round", last)
