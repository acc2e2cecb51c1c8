"""A backbone in few bits is still one backbone with four roles. Runs bitsandbytes' own CPU kernels."""

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from solotune.data.prompts import Prompts
from solotune.models.loading import build_policy
from solotune.trainers.ppo import PPOTrainer
from tests.tiny import save_tiny, tiny_ppo_config

pytest.importorskip("bitsandbytes")
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes packs blocks of 64 numbers
LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [2, 3]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama") / "model", "llama", spread=2.0, **SIZES)


def config_of(folder, quantization):
    model = {"delta_kwargs": None, "peft_config": LORA, "quantization": quantization}
    return tiny_ppo_config(folder, model=model, optimizer={"kwargs": {"lr": 1e-2}})


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_top_resumes_the_packed_model_and_the_reference_is_it_without_the_adapter(llama, quantization):
    policy = build_policy(config_of(llama, quantization))
    full_precision = AutoModelForCausalLM.from_pretrained(llama)
    packed = policy.decoder.blocks[0].mlp.up_proj.weight
    assert packed.nbytes <= full_precision.model.layers[0].mlp.up_proj.weight.nbytes / 4
    assert policy.start == 2
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (2, 9))
    given = (ids, torch.ones_like(ids), torch.arange(9).expand(2, 9))
    with torch.no_grad():
        whole = policy("whole", *given)
        assert torch.equal(whole.logits_BTV, policy.backbone(input_ids=ids).logits)
        assert torch.equal(whole.logits_BTV, whole.ref_logits_BTV)  # a fresh adapter
        exact = full_precision(ids).logits
    difference = (whole.logits_BTV - exact).abs().mean() / exact.abs().mean()
    assert 0 < difference < 0.3  # packed, and still that model


def test_gradients_pass_through_packed_layers_as_through_the_same_weights_unpacked(llama):
    """The adapter of block 2 learns through block 3, whose layers are packed."""
    import bitsandbytes as bnb

    packed = build_policy(config_of(llama, "nf4"))
    plain = build_policy(config_of(llama, None))
    for name, module in packed.backbone.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            linear = plain.backbone.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight.data.copy_(weight)
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (3, 9))
    given = (ids, torch.ones_like(ids), torch.arange(9).expand(3, 9))
    gradients = []
    for policy in (packed, plain):
        trained = {name: p for name, p in policy.backbone.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(1)
        for parameter in trained.values():  # a fresh adapter's B is zero, and A then gets no gradient
            parameter.data.normal_(std=0.1, generator=generator)
        policy("whole", *given).logits_BTV.log_softmax(-1)[..., 7].sum().backward()
        gradients.append({name: p.grad for name, p in trained.items()})
    assert len(gradients[0]) == 8
    for name, gradient in gradients[0].items():
        assert float(gradient.norm()) > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_training_moves_the_adapter_alone_and_it_loads_elsewhere(llama, quantization, tmp_path):
    config = config_of(llama, quantization)
    prompts = Prompts(["a film ", "the plot "])
    trainer = PPOTrainer(config, lambda outputs: [float(sum(map(ord, text)) % 7) for text in outputs], prompts, prompts)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    rollouts = trainer.sample_rollouts()
    measured = trainer.measure(rollouts)
    assert torch.equal(measured.logprobs_bT, measured.ref_logprobs_bT)
    now = trainer.policy("update", rollouts.select(torch.arange(8)), 1.0)
    torch.testing.assert_close(now.logprobs_bT, measured.logprobs_bT, atol=1e-5, rtol=0)
    metrics = trainer.train_round()
    assert metrics["policy/skipped_steps"] == 0
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name or "value_head" in name for name in moved)
    trainer.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "adapter")
    own = {name: p for name, p in trainer.model.backbone.named_parameters() if "lora_" in name}
    assert own
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, own[name])


def test_an_8_bit_optimizer_goes_on_from_a_checkpoint_to_the_same_bits(llama, tmp_path):
    kwargs = {"lr": 1e-2, "min_8bit_size": 64}  # else tensors below 4,096 numbers keep 32 bits
    config = tiny_ppo_config(llama, optimizer={"name": "adamw_8bit_bnb", "kwargs": kwargs})
    prompts = Prompts(["a film ", "the plot "])

    def reward(outputs):
        return [float(sum(map(ord, text)) % 7) for text in outputs]

    trainer = PPOTrainer(config, reward, prompts, prompts)
    trainer.train_round()
    states = trainer.optimizer.optimizer.state.values()
    assert any(x.dtype == torch.uint8 for state in states for x in state.values() if isinstance(x, torch.Tensor))
    trainer.save(tmp_path)
    resumed = PPOTrainer(config, reward, prompts, prompts)
    resumed.load(tmp_path)
    for each in (trainer, resumed):
        each.train_round()
    for mine, other in zip(trainer.parameters, resumed.parameters, strict=True):
        assert torch.equal(mine, other)
