"""The packaged recipes run end to end on tiny stand-ins, with files in the formats of their data sets."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from solotune.cli import app
from solotune.config import Recipe
from solotune.config.packaged import RECIPE_FOLDERS
from solotune.runs.folder import read_lines
from tests.rewards.words import bert_config, save, word_tokenizer
from tests.tiny import save_tiny

SMALL = {
    "train.total_steps": 4, "train.epochs": 2, "train.batch_size": 8, "train.minibatch_size": 4,
    "method.num_rollouts": 16, "method.chunk_size": 16, "method.ppo_epochs": 1, "method.gen_kwargs.max_new_tokens": 8,
}  # fmt: skip


def run(tmp_path, name, **settings):
    overrides = [word for key, value in {**SMALL, **settings}.items() for word in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(
        app, ["train", name, "--out", str(tmp_path / "run"), *overrides], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return tmp_path / "run"


def classifier(folder: Path) -> str:
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = bert_config(id2label=labels, label2id={name: index for index, name in labels.items()})
    tokenizer = word_tokenizer("<cls> $A <sep>", pad_token="<pad>", cls_token="<cls>", sep_token="<sep>")
    return save(folder, BertForSequenceClassification(config), tokenizer)


@pytest.mark.parametrize("path", sorted(RECIPE_FOLDERS[1].glob("*.yaml")), ids=lambda path: path.stem)
def test_every_packaged_recipe_is_valid_and_says_what_it_needs(path):
    Recipe.load_yaml(path).config.check()
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("hardware", "command", "time", "memory"):
        assert any(word in line for line in header), word


def test_negative_reviews_from_a_file_in_alpacas_format(tmp_path):
    rows = [{"instruction": f"give a negative review about movie {n}", "input": "", "output": "dull"} for n in range(5)]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(rows))
    folder = save_tiny(tmp_path / "llama", "llama", max_position_embeddings=1024)
    ran = run(
        tmp_path,
        "alpaca-7b-negative",
        **{"model.model_path": folder, "tokenizer.tokenizer_path": folder, "train.seq_length": 400},
        **{"data.prompts": tmp_path / "alpaca_data.json", "reward.classifier": classifier(tmp_path / "classifier")},
    )
    samples = read_lines(ran / "samples.jsonl")
    assert samples[0]["prompt"].startswith("Below is an instruction")
    assert "### Instruction:\ngive a negative review about movie 0\n\n### Response:\n" in samples[0]["prompt"]
    assert all(0 < sample["reward"] < 1 for sample in samples)
    settings = (tmp_path / "run" / "adapter" / "adapter_config.json").read_text()
    assert json.loads(settings)["layers_to_transform"] == [2, 3]


def dialogue(turns, answer):
    return "".join(f"\n\nHuman: {turn}\n\nAssistant: the story" for turn in turns[:-1]) + (
        f"\n\nHuman: {turns[-1]}\n\nAssistant: {answer}"
    )


def test_hh_rlhf_from_files_in_its_own_format(tmp_path, monkeypatch):
    """A reward model learned from chosen and rejected dialogues, and PPO on the dialogues' openings."""
    monkeypatch.setenv("SOLOTUNE_CACHE", str(tmp_path / "cache"))
    rows = []
    for n in range(40):
        turns = [f"the film {n}", "and it was"][: 1 + n % 2]
        rows.append({"chosen": dialogue(turns, "good and lovely"), "rejected": dialogue(turns, "bad and dull")})
    rows.append({"chosen": dialogue(["x" * 300], "good"), "rejected": dialogue(["x" * 300], "bad")})
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    from transformers import BertModel

    tokenizer = word_tokenizer("<cls> $A <sep>", pad_token="<pad>", cls_token="<cls>", sep_token="<sep>")
    base = save(tmp_path / "encoder", BertModel(bert_config()), tokenizer)
    folder = save_tiny(tmp_path / "llama", "llama", max_position_embeddings=256)
    ran = run(
        tmp_path,
        "hh-rlhf",
        **{"model.model_path": folder, "tokenizer.tokenizer_path": folder, "train.seq_length": 128},
        **{"data.prompts": tmp_path / "train.jsonl.gz", "reward.training.data": tmp_path / "train.jsonl.gz"},
        **{"reward.training.base": base, "reward.training.holdout": 8, "reward.training.max_length": 32},
    )
    samples = read_lines(ran / "samples.jsonl")
    assert all(sample["prompt"].endswith("\n\nAssistant:") for sample in samples)
    assert any(sample["prompt"].count("\n\nAssistant:") == 2 for sample in samples), "the last turn, not the first"
    assert len(samples) == 2 * 32, "32 of the 40 dialogues that fit"
    shutil.rmtree(ran)
