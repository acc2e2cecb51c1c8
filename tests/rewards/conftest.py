"""Tiny text models with a word-level tokenizer, saved as a hub would give them."""

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

from tests.rewards.words import VOCABULARY, bert_config, save, word_tokenizer


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """An encoder without a head: what a reward model may start from."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer("<cls> $A <sep>", pad_token="<pad>", cls_token="<cls>", sep_token="<sep>")
    return save(tmp_path_factory.mktemp("encoder"), BertModel(bert_config()), tokenizer)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """A causal LM whose tokenizer has no pad token."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(VOCABULARY), n_positions=32, n_embd=16, n_layer=2, n_head=2)
    config.bos_token_id = config.eos_token_id = 3
    return save(tmp_path_factory.mktemp("decoder"), GPT2LMHeadModel(config), word_tokenizer("$A", eos_token="<sep>"))


@pytest.fixture(scope="session")
def make_classifier(tmp_path_factory):
    """Folder of a BERT classifier with the given labels."""

    def make(labels, **changes):
        torch.manual_seed(0)
        names = dict(enumerate(labels))
        config = bert_config(id2label=names, label2id={text: i for i, text in names.items()}, **changes)
        model = BertForSequenceClassification(config)
        torch.nn.init.normal_(model.classifier.weight, std=0.5)
        tokenizer = word_tokenizer("<cls> $A <sep>", pad_token="<pad>", cls_token="<cls>", sep_token="<sep>")
        return save(tmp_path_factory.mktemp("classifier"), model, tokenizer)

    return make
