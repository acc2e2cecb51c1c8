"""`solotune export --merge`: one ordinary model that says what the adapter said."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from solotune.errors import ModelError
from solotune.models.export import merge_adapter
from solotune.models.loading import build_policy
from tests.tiny import byte_tokenizer, tiny_ppo_config


@pytest.mark.parametrize("model", [{}, {"delta_kwargs": None}], ids=["adapter", "in place"])
def test_the_merged_model_gives_the_tuned_models_logits(tiny_folder, tmp_path, model):
    policy = build_policy(tiny_ppo_config(tiny_folder, model=model))
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path / "run" / ("adapter" if not model else "model")
    folder.mkdir(parents=True)
    policy.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    target = merge_adapter(tmp_path / "run", tmp_path / "merged")
    ids = torch.tensor([[1, 5, 9, 200]])
    merged = AutoModelForCausalLM.from_pretrained(target)
    untuned = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        expected = policy.backbone(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert (untuned(input_ids=ids).logits - expected).abs().max() > 0.01
    assert AutoTokenizer.from_pretrained(target)("ab").input_ids == byte_tokenizer()("ab").input_ids
    with pytest.raises(ModelError, match="not empty"):
        merge_adapter(tmp_path / "run", target)


def test_a_run_that_was_stopped_is_exported_from_its_newest_checkpoint(tiny_folder, tmp_path):
    policy = build_policy(tiny_ppo_config(tiny_folder))
    for step in ("step_000004", "step_000008"):
        folder = tmp_path / "run" / "checkpoints" / step / "hf_model"
        folder.mkdir(parents=True)
        with torch.no_grad():
            policy.trainable_parameters()[1].add_(0.1)
        policy.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(tmp_path / "run", tmp_path / "merged"))
    ids = torch.tensor([[1, 5, 9, 200]])
    with torch.no_grad():
        expected = policy.backbone(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="holds no tuned model"):
        merge_adapter(tmp_path, tmp_path / "merged")
