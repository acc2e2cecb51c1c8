"""A classifier rewards with the probability of one label, and a folder that is none is refused."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from solotune.config import RewardConfig
from solotune.errors import ConfigError, ModelError
from solotune.rewards import build_reward

TEXTS = ["good film", "a dull and bad plot with actors", "the story"]


def logit_rows(folder):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS]).detach()


def rewards(folder, label, **settings):
    return torch.tensor(build_reward(RewardConfig(classifier=folder, label=label, **settings))(samples=TEXTS))


def test_the_reward_is_the_labels_probability(make_classifier):
    folder = make_classifier(["NEGATIVE", "NEUTRAL", "POSITIVE"])
    every = torch.stack([rewards(folder, label) for label in ("NEGATIVE", "NEUTRAL", "POSITIVE")], dim=1)
    torch.testing.assert_close(every.sum(1), torch.ones(3))
    torch.testing.assert_close(every, logit_rows(folder).softmax(-1), atol=1e-5, rtol=0)
    assert every.std(0).min() > 1e-3  # the texts are told apart


def test_a_label_is_found_in_any_case_but_its_own_first(make_classifier):
    folder = make_classifier(["pos", "POS", "Neg"])
    assert rewards(folder, "POS").tolist() != rewards(folder, "pos").tolist()
    torch.testing.assert_close(rewards(folder, "neg"), rewards(folder, "Neg"))
    with pytest.raises(ConfigError, match=r"reward\.label = 'positive'.*pos, POS, Neg"):
        rewards(folder, "positive")
    with pytest.raises(ConfigError, match="Pos"):  # two labels could be meant
        rewards(folder, "Pos")


def test_transforms(make_classifier):
    folder = make_classifier(["NEGATIVE", "POSITIVE"])
    logits = logit_rows(folder)[:, 1]
    torch.testing.assert_close(rewards(folder, "POSITIVE", transform="none"), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rewards(folder, "POSITIVE", transform="sigmoid"), logits.sigmoid(), atol=1e-5, rtol=0)


def test_labels_that_do_not_exclude_each_other_have_their_own_probabilities(make_classifier):
    folder = make_classifier(["funny", "sad"], problem_type="multi_label_classification")
    torch.testing.assert_close(rewards(folder, "sad"), logit_rows(folder)[:, 1].sigmoid(), atol=1e-5, rtol=0)


def test_a_single_output_is_a_score(make_classifier):
    folder = make_classifier(["reward"])
    torch.testing.assert_close(rewards(folder, "reward"), logit_rows(folder)[:, 0], atol=1e-5, rtol=1e-5)


def test_a_folder_that_is_no_classifier_is_refused(encoder, decoder):
    for folder in (encoder, decoder):
        with pytest.raises(ModelError, match=r"reward\.classifier.*not a text-classification model"):
            rewards(folder, "LABEL_0")


def test_a_missing_model_and_one_without_safetensors(make_classifier, tmp_path):
    with pytest.raises(ModelError, match=r"reward\.classifier = 'nobody/nothing' cannot be loaded"):
        rewards("nobody/nothing", "POSITIVE")
    folder = make_classifier(["NEGATIVE", "POSITIVE"])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="safetensors"):
        rewards(str(tmp_path), "POSITIVE")


def test_long_samples_are_cut_to_what_the_model_reads(make_classifier):
    reward = build_reward(RewardConfig(classifier=make_classifier(["NEGATIVE", "POSITIVE"]), label="POSITIVE"))
    assert len(reward(samples=["good " * 500, "bad"])) == 2
