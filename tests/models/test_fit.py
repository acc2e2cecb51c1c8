"""The memory that a recipe needs, counted from its modules."""

import pytest
import torch
from typer.testing import CliRunner

from solotune.cli import app
from solotune.errors import ConfigError
from solotune.models.fit import Fit, Part, advice, fit, parse_size
from solotune.models.loading import build_policy
from tests.models.test_split import KINDS, rollouts_of
from tests.tiny import save_tiny, tiny_config, tiny_offline_config, tiny_ppo_config


def config_of(folder, architecture="llama", model=None, **sections):
    config = tiny_ppo_config(folder, model=model or {}, **sections)
    config.model.model_path = tiny_config(architecture)
    return config


def part(fitted, start):
    (found,) = [p.size for p in fitted.parts if p.name.startswith(start)]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["opt", "llama", "bloom", "gemma3_text"])
def test_weights_are_those_of_the_model(tiny_folder, architecture, kind):
    config = config_of(tiny_folder, architecture, KINDS[kind])
    fitted, policy = fit(config), build_policy(config)
    copies = sum(p.numel() for p in policy.reference.parameters())  # of tensors trained in fp32
    frozen = sum(p.numel() for p in policy.parameters() if not p.requires_grad)
    assert part(fitted, "weights, frozen") == 2 * (frozen - copies) + 4 * copies
    assert part(fitted, "weights, trained") == 4 * sum(p.numel() for p in policy.trainable_parameters())


def test_ilql_heads_and_their_targets_are_counted_in_fp32(tiny_folder):
    config = tiny_offline_config(tiny_folder, "ilql")
    fitted, policy = fit(config), build_policy(config)
    targets = sum(p.numel() for p in policy.heads.target_q_heads.parameters())
    frozen = sum(p.numel() for p in policy.parameters() if not p.requires_grad)
    assert part(fitted, "weights, frozen") == 2 * (frozen - targets) + 4 * targets
    assert part(fitted, "gradients of the Q heads") == 4 * targets


def test_keys_and_values_are_those_that_are_allocated(tiny_folder):
    from solotune.models.split import Decoder, Head
    from solotune.rollout.draw import row_uniforms
    from solotune.rollout.settings import SamplingSettings
    from solotune.rollout.static import StaticSampler
    from tests.tiny import PAD, tiny_lm

    config = config_of(tiny_folder, "llama")  # 8 rows, prompts of 26 tokens at most, 6 new ones
    lm = tiny_lm("llama").to(torch.bfloat16)
    decoder = Decoder(lm)
    sampler = StaticSampler(decoder.module, Head(lm, decoder.name), None, captures=False)
    ids = torch.zeros(8, 26, dtype=torch.long)
    uniforms = row_uniforms(0, 0, range(8), 6)
    sampler.sample(ids, torch.ones_like(ids).bool(), torch.arange(8), uniforms, SamplingSettings(6), PAD)
    allocated = sum(t.nbytes for layer in sampler._cache.layers for t in (layer.keys, layer.values))
    assert part(fit(config), "keys and values") == allocated


@pytest.mark.parametrize("kind", ["lora on the last 2", "lora everywhere"])
def test_activations_are_near_to_what_autograd_saves(tiny_folder, kind):
    """Counted on a real pass of the same shape, in fp32 as the CPU has it; the estimate is of bf16."""
    config = config_of(tiny_folder, "llama", KINDS[kind], train={"minibatch_size": 4, "seq_length": 32})
    policy = build_policy(config)
    rollouts = rollouts_of(policy, lengths=(26,) * 4, steps=6)
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy._response_hidden(rollouts, policy.top)
    real = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert 0.3 < part(fit(config), "activations") / real < 2.0


def test_gradient_checkpointing_and_smaller_passes_need_less(tiny_folder):
    plain = fit(config_of(tiny_folder, train={"minibatch_size": 4}))
    checkpointed = fit(config_of(tiny_folder, train={"minibatch_size": 4, "gradient_checkpointing": True}))
    smaller = fit(config_of(tiny_folder, train={"minibatch_size": 2}))
    assert part(checkpointed, "activations") < part(plain, "activations")
    assert part(smaller, "activations") < 0.6 * part(plain, "activations")  # positions are kept once


def test_what_cannot_be_quantised_is_said(tiny_folder):
    given = {"model_path": str(tiny_folder), "quantization": "nf4"}
    with pytest.raises(ConfigError, match="num_value_layers_unfrozen to 0"):
        tiny_ppo_config(tiny_folder, model=given, method={"num_value_layers_unfrozen": 1})
    with pytest.raises(ConfigError, match=r"give\s+model\.delta_kwargs or model\.peft_config"):
        tiny_ppo_config(tiny_folder, model={**given, "delta_kwargs": None})


def test_few_bits_are_for_the_linear_layers_of_the_blocks(tiny_folder):
    configs = [config_of(tiny_folder), config_of(tiny_folder)]
    configs[1].model.quantization = "int8"
    full, few = map(fit, configs)
    config = tiny_config("llama")
    linear = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert part(full, "weights, frozen") - part(few, "weights, frozen") == linear
    assert config.num_hidden_layers == 4


def test_the_most_at_one_time_is_of_the_larger_phase():
    fitted = Fit([Part("a", 1e9), Part("b", 2e9, "sampling"), Part("c", 3e9, "an update"), Part("d", 1e8, "sampling")])
    assert fitted.total == pytest.approx(4e9 * 1.05 + 0.6e9)


def test_advice_is_what_helps(tiny_folder, tmp_path):
    save_tiny(tmp_path / "llama", "llama")
    paths = {"model": {"model_path": str(tmp_path / "llama")}, "tokenizer": {"tokenizer_path": str(tmp_path / "llama")}}
    config = tiny_ppo_config(tiny_folder, train={"batch_size": 4}, **paths)
    lines = advice(config, fit(config), limit=1e12)
    assert any("minibatch_size=2" in line and "fits" in line for line in lines)
    assert any("quantization=nf4" in line for line in lines)


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("24 GB", 24e9), ("8", 8e9), ("40GiB", 40 * 2**30)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "24 apples", "0GB"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="must be a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["opt-1.3b-imdb", "--gpu", "40GB"], 0, "fits:"),
        (["opt-1.3b-imdb", "--gpu", "2GB"], 1, "--set model.quantization=nf4"),
        (["opt-1.3b-imdb", "--set", "model.num_layers_unfrozen=99"], 2, "99"),
        (["nowhere"], 2, "no recipe nowhere"),
        (["opt-1.3b-imdb", "--gpu", "large"], 2, "must be a size"),
    ],
)
def test_the_command(arguments, code, said):
    result = CliRunner().invoke(app, ["fit", *arguments])
    assert result.exit_code == code, result.output
    assert said in result.output + result.stderr


def test_llama_7b_fits_where_it_has_to(tiny_folder):
    """32 x (64 + 64) tokens, LoRA r=16 on all linear layers: by this count 20 GB in bf16 and 9 GB in nf4 are enough."""
    from transformers import LlamaConfig

    peft = {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"}
    sections = {
        "train": {"seq_length": 128, "batch_size": 32, "minibatch_size": 4, "gradient_checkpointing": True},
        "method": {"num_rollouts": 32, "chunk_size": 32, "gen_kwargs": {"max_new_tokens": 64}},
    }
    config = tiny_ppo_config(tiny_folder, **sections, model={"delta_kwargs": None, "peft_config": peft})
    config.model.model_path = LlamaConfig(vocab_size=32000)
    assert fit(config).total < 20e9
    config.model.quantization = "nf4"
    assert fit(config).total < 9e9
