"""A folder laid out like a hub's cache, with tiny random models under the names that trlX scripts use."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import BertForSequenceClassification

from tests.rewards.words import bert_config, save, word_tokenizer
from tests.tiny import save_tiny
from tests.tiny_seq2seq import save_tiny_seq2seq

REVIEWS = ["the film was a great story with fine actors", "the plot is dull and the film was awful to sit through"]


def in_hub(home: Path, name: str) -> Path:
    """The folder of a model's only revision, to be filled."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def fill_hub(home: Path) -> Path:
    """`facebook/opt-1.3b`, `lvwerra/gpt2-imdb`, `gpt2`, `lvwerra/t5-imdb` and the sentiment classifier."""
    save_tiny(in_hub(home, "facebook/opt-1.3b"), "opt", max_position_embeddings=2048)
    for name in ("lvwerra/gpt2-imdb", "gpt2"):
        save_tiny(in_hub(home, name), "gpt2", n_positions=1024)
    save_tiny_seq2seq(in_hub(home, "lvwerra/t5-imdb"), num_layers=3)
    torch.manual_seed(0)
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = bert_config(id2label=labels, label2id={name: index for index, name in labels.items()})
    tokenizer = word_tokenizer("<cls> $A <sep>", pad_token="<pad>", cls_token="<cls>", sep_token="<sep>")
    save(in_hub(home, "lvwerra/distilbert-imdb"), BertForSequenceClassification(config), tokenizer)
    return home


def save_imdb(folder: Path) -> None:
    """A data set in a folder called imdb: `load_dataset("imdb")` of a script that runs beside it finds it."""
    table = pa.table({"text": [review for review in REVIEWS for _ in range(40)], "label": [1, 0] * 40})
    (folder / "imdb").mkdir()
    for split in ("train", "test"):
        pq.write_table(table, folder / "imdb" / f"{split}.parquet")
