"""Loading: what is refused, and with which words."""

import pytest
import torch
from transformers import AutoTokenizer

from solotune.config import TokenizerConfig
from solotune.errors import ModelError
from solotune.models.loading import build_policy, load_tokenizer
from tests.tiny import byte_tokenizer, tiny_lm, tiny_ppo_config


def test_a_model_that_is_not_there_is_named(tiny_folder):
    with pytest.raises(ModelError, match=r"'no/such-model' cannot be loaded.*Allowed are a folder"):
        build_policy(tiny_ppo_config(tiny_folder, model={"model_path": "no/such-model"}))


def test_pickled_weights_are_refused_and_never_read(tiny_folder, tmp_path):
    tiny_lm().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    marker = tmp_path / "ran"

    class RunsCode:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"x": RunsCode()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        build_policy(tiny_ppo_config(tiny_folder, model={"model_path": str(tmp_path)}))
    assert not marker.exists()


def test_a_wrong_dtype_is_named(tiny_folder):
    with pytest.raises(ModelError, match="'int8'; allowed are float32"):
        build_policy(tiny_ppo_config(tiny_folder, model={"model_extra_configs": {"dtype": "int8"}}))


def test_frozen_weights_take_the_dtype_and_trained_ones_stay_fp32(tiny_folder):
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        policy = build_policy(tiny_ppo_config(tiny_folder, model={"model_extra_configs": {"dtype": name}}))
        frozen = {p.dtype for p in policy.backbone.parameters() if not p.requires_grad}
        assert frozen == {dtype}
        assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}


def test_a_tokenizer_without_pad_pads_with_eos(tmp_path):
    byte_tokenizer(pad=None).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    tokenizer = load_tokenizer(TokenizerConfig(str(tmp_path)))
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<eos>", "left")


def test_a_tokenizer_that_is_not_there_is_named():
    with pytest.raises(ModelError, match="tokenizer_path 'no/such-tokenizer'"):
        load_tokenizer(TokenizerConfig("no/such-tokenizer"))


def test_the_meta_model_has_the_same_tensors(tiny_folder):
    config = tiny_ppo_config(tiny_folder)
    real, empty = build_policy(config), build_policy(config, meta=True)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    described = [{n: (p.shape, p.requires_grad) for n, p in policy.named_parameters()} for policy in (real, empty)]
    assert described[0] == described[1]
