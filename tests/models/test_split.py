"""One backbone, four roles: the rules of the split, for every architecture."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from solotune.errors import ModelError
from solotune.models.adapters import select_trainable, switch_off_dropout
from solotune.models.loading import build_policy
from solotune.models.policy import PolicyModel
from solotune.models.split import Decoder, Head, InputRecorder, Top
from solotune.rollout.draw import row_uniforms
from solotune.rollout.records import positions_of
from solotune.rollout.settings import SamplingSettings
from tests.tiny import ARCHITECTURES, PAD, VOCABULARY, tiny_lm, tiny_ppo_config

EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)
LORA = {"delta_kwargs": {"delta_type": "lora", "modified_modules": "all", "lora_r": 4}}
KINDS = {
    "lora on the last 2": {"num_layers_unfrozen": 2, **LORA},
    "lora everywhere": {"num_layers_unfrozen": -1, **LORA},
    "last 2 blocks": {"num_layers_unfrozen": 2, "delta_kwargs": None},
    "everything": {"num_layers_unfrozen": -1, "delta_kwargs": None},
}


def policy_of(folder, architecture="opt", lora_noise=0.0, dtype=torch.float32, **model) -> PolicyModel:
    config = tiny_ppo_config(folder, model=model)
    config.model.model_path = tiny_lm(architecture).to(dtype)
    policy = build_policy(config)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, lora_noise)
    return policy


def prompts(lengths=(10, 7, 5, 10)):
    """Left-padded random prompts."""
    width = max(lengths)
    ids = torch.randint(0, 256, (len(lengths), width))
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, PAD), mask


def rollouts_of(policy, lengths=(10, 7, 5, 10), steps=8, eos=(), **settings):
    ids, mask = prompts(lengths)
    uniforms = row_uniforms(0, 0, range(len(lengths)), steps)
    return policy(
        "sample",
        ids,
        mask,
        torch.arange(len(lengths)),
        uniforms,
        SamplingSettings(steps, eos_token_ids=eos, **settings),
        PAD,
    )


def full_logprobs(lm, rollouts, temperature=1.0):
    """The textbook way: the whole model, a softmax over everything."""
    ids = torch.cat([rollouts.prompt_ids_NP, rollouts.response_ids_NT], dim=1)
    mask = torch.cat([rollouts.prompt_mask_NP, rollouts.response_mask_NT], dim=1).long()
    positions = {} if lm.config.model_type == "bloom" else {"position_ids": positions_of(mask)}
    logits = lm(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits / temperature
    logits = logits[:, rollouts.prompt_width - 1 : -1]
    chosen = logits.log_softmax(-1).gather(-1, rollouts.response_ids_NT[..., None]).squeeze(-1)
    return chosen.masked_fill(~rollouts.response_mask_NT, 0.0)


@EVERY
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_a_resumed_decoder_gives_the_full_models_logits_to_the_last_bit(architecture, start):
    lm = tiny_lm(architecture)
    decoder = Decoder(lm)
    recorder = InputRecorder(decoder.blocks[start])
    ids, mask = prompts()
    positions = {} if architecture == "bloom" else {"position_ids": positions_of(mask)}
    with torch.no_grad():
        recorder.active = True
        full = lm(input_ids=ids, attention_mask=mask.long(), use_cache=False, **positions).logits
        recorder.active = False
        hidden = Top(decoder, start)(recorder.take(), ids, mask.long(), positions_of(mask))
        resumed = Head(lm, decoder.name)(hidden.flatten(0, 1)).view(*ids.shape, VOCABULARY)
        again = lm(input_ids=ids, attention_mask=mask.long(), use_cache=False, **positions).logits
    assert torch.equal(resumed[mask], full[mask])
    assert torch.equal(again, full), "the full model has to be left as it was"


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_before_training_policy_and_reference_agree_exactly(tiny_folder, architecture, kind):
    policy = policy_of(tiny_folder, architecture, **KINDS[kind])
    measured = policy("measure", rollouts_of(policy), 1.0)
    assert torch.equal(measured.logprobs_bT, measured.ref_logprobs_bT)


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ratio_is_exactly_one(tiny_folder, architecture, kind):
    policy = policy_of(tiny_folder, architecture, lora_noise=0.1, **KINDS[kind])
    rollouts = rollouts_of(policy, eos=(3, 4, 5))
    measured, updated = policy("measure", rollouts, 0.7), policy("update", rollouts, 0.7)
    assert torch.equal(updated.logprobs_bT, measured.logprobs_bT)
    assert torch.equal(updated.values_bT, measured.values_bT)


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_cached_trunk_recomputed_trunk_and_full_model_agree_in_values_and_gradients(tiny_folder, architecture, kind):
    policy = policy_of(tiny_folder, architecture, lora_noise=0.1, **KINDS[kind])
    rollouts = rollouts_of(policy, eos=(3, 4, 5))
    weights = torch.randn(rollouts.response_mask_NT.shape)
    expected = full_logprobs(policy.lm, rollouts)
    (expected * weights).sum().backward()
    wanted = {name: p.grad.clone() for name, p in policy.backbone.named_parameters() if p.grad is not None}
    policy.zero_grad()
    got = policy("update", rollouts, 1.0).logprobs_bT
    (got * weights).sum().backward()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollouts.sample_logprobs_NT, expected.detach(), atol=1e-5, rtol=0)
    for name, parameter in policy.backbone.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-3, msg=name)
    if policy.start > 0:
        with policy._recording() as take:
            ids, mask, positions = rollouts.inputs
            given = {} if architecture == "bloom" else {"position_ids": positions}
            policy.lm(input_ids=ids, attention_mask=mask, use_cache=False, **given)
            recomputed = take()
        torch.testing.assert_close(recomputed[mask.bool()], rollouts.trunk_NSH[mask.bool()], atol=1e-5, rtol=1e-5)


@EVERY
def test_padding_changes_nothing(tiny_folder, architecture):
    policy = policy_of(tiny_folder, architecture, lora_noise=0.1, **KINDS["lora on the last 2"])
    rollouts = rollouts_of(policy, eos=tuple(range(40)))
    whole = policy("measure", rollouts, 1.0)
    for row in range(4):
        left = int((~rollouts.prompt_mask_NP[row]).sum())
        length = int(rollouts.response_mask_NT[row].sum())
        alone = rollouts.select(torch.tensor([row]))
        alone = alone._replace(
            prompt_ids_NP=alone.prompt_ids_NP[:, left:],
            prompt_mask_NP=alone.prompt_mask_NP[:, left:],
            response_ids_NT=alone.response_ids_NT[:, :length],
            response_mask_NT=alone.response_mask_NT[:, :length],
            trunk_NSH=alone.trunk_NSH[:, left : rollouts.prompt_width + length - 1],
        )
        single = policy("measure", alone, 1.0)
        torch.testing.assert_close(single.logprobs_bT[0], whole.logprobs_bT[row, :length], atol=1e-5, rtol=0)
        torch.testing.assert_close(single.values_bT[0], whole.values_bT[row, :length], atol=1e-5, rtol=0)


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_never_moves_and_the_frozen_part_neither(tiny_folder, architecture, kind):
    policy = policy_of(tiny_folder, architecture, **KINDS[kind])
    rollouts = rollouts_of(policy)
    before = policy("measure", rollouts, 1.0)
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-2)
    for _ in range(3):
        (-policy("update", rollouts, 1.0).logprobs_bT.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = policy("measure", rollouts, 1.0)
    assert torch.equal(after.ref_logprobs_bT, before.ref_logprobs_bT)
    assert after.logprobs_bT.sum() > before.logprobs_bT.sum() + 0.1, "the policy has to learn"
    assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if name in frozen)


@EVERY
def test_all_dropout_is_off_in_training_mode(architecture):
    rates = {
        "dropout": 0.5,
        "attention_dropout": 0.5,
        "resid_pdrop": 0.5,
        "embd_pdrop": 0.5,
        "attn_pdrop": 0.5,
        "hidden_dropout": 0.5,
    }
    lm = tiny_lm(architecture, **rates)
    target = (
        "query_key_value" if architecture in ("gpt_neox", "bloom") else "c_attn" if architecture == "gpt2" else "q_proj"
    )
    backbone = get_peft_model(lm, LoraConfig(target_modules=[target], lora_dropout=0.5, init_lora_weights=False))
    switch_off_dropout(backbone)
    backbone.train()
    ids, mask = prompts()
    with torch.no_grad():
        first, second = (backbone(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)
    assert backbone.peft_config["default"].lora_dropout == 0.5, "the saved adapter's configuration keeps it"


@EVERY
def test_the_split_lies_below_the_lowest_trained_tensor(architecture):
    lm = tiny_lm(architecture)
    decoder = Decoder(lm)
    for k in (1, 2, 4):
        select_trainable(decoder, k)
        assert decoder.lowest_trainable_block() == 4 - k
        trained = {id(p) for p in lm.parameters() if p.requires_grad}
        assert trained.isdisjoint(id(p) for p in lm.get_input_embeddings().parameters())
        assert trained.isdisjoint(id(p) for p in lm.get_output_embeddings().parameters())
        assert all(id(p) in trained for norm in decoder.final_norms.values() for p in norm.parameters())
    select_trainable(decoder, 2)
    lm.get_input_embeddings().weight.requires_grad_(True)
    assert decoder.lowest_trainable_block() == 0, "trained embeddings leave no trunk"


def test_gradient_checkpointing_changes_memory_and_not_the_gradient(tiny_folder):
    gradients = []
    for checkpointing in (False, True):
        config = tiny_ppo_config(
            tiny_folder, model=KINDS["last 2 blocks"], train={"gradient_checkpointing": checkpointing}
        )
        config.model.model_path = tiny_lm("llama")
        policy = build_policy(config)
        torch.manual_seed(3)
        rollouts = rollouts_of(policy)
        policy("update", rollouts, 1.0).logprobs_bT.sum().backward()
        gradients.append([p.grad for p in policy.backbone.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_the_critics_gradient_enters_the_top(tiny_folder):
    policy = policy_of(tiny_folder, **KINDS["last 2 blocks"])
    torch.nn.init.normal_(policy.value_head.layers[-1].weight)
    policy("update", rollouts_of(policy), 1.0).values_bT.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in policy.decoder.blocks[-1].parameters() if p.dim() > 1)


def test_a_new_critic_says_zero(tiny_folder):
    policy = policy_of(tiny_folder, **KINDS["last 2 blocks"])
    assert torch.equal(policy("measure", rollouts_of(policy), 1.0).values_bT, torch.zeros(4, 8))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_layers_unfrozen": 5, "delta_kwargs": None}, r"num_layers_unfrozen is 5.*4 blocks"),
        (
            {"delta_kwargs": {"delta_type": "lora", "modified_modules": ["self_attn.query"]}},
            r"'self_attn.query' is no linear",
        ),
        (
            {"delta_kwargs": None, "peft_config": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}},
            "allowed is LORA",
        ),
        ({"delta_kwargs": None, "peft_config": {"peft_type": "LORA", "target_modules": ["nothing"]}}, "does not fit"),
        (
            {"delta_kwargs": None, "peft_config": {"peft_type": "LORA", "target_modules": ["q_proj"], "bias": "all"}},
            "allowed is 'none'",
        ),
    ],
)
def test_what_cannot_be_trained_is_said(tiny_folder, model, message):
    with pytest.raises(ModelError, match=message):
        policy_of(tiny_folder, **model)


def test_presets_put_lora_where_opendelta_did(tiny_folder):
    expected = {
        "opt": {"q_proj", "k_proj", "v_proj", "out_proj"},
        "gptj": {"q_proj", "k_proj", "v_proj"},
        "gpt_neox": {"query_key_value"},
        "bloom": {"query_key_value", "dense"},
    }
    for architecture, names in expected.items():
        delta = {"delta_type": "lora", "modified_modules": "attention", "lora_r": 4}
        policy = policy_of(tiny_folder, architecture, num_layers_unfrozen=2, delta_kwargs=delta)
        adapted = {name.split(".lora_A")[0] for name, _ in policy.named_parameters() if ".lora_A" in name}
        assert {name.rpartition(".")[2] for name in adapted} == names
        assert {int(part) for name in adapted for part in name.split(".") if part.isdigit()} == {2, 3}


@EVERY
@pytest.mark.parametrize("kind", ["lora on the last 2", "last 2 blocks", "everything"])
def test_a_bf16_backbone_samples_measures_and_learns(tiny_folder, architecture, kind):
    """The bound on what bf16 changes is measured: it has 8 bits, the logits here are below 10."""
    torch.manual_seed(1)
    exact = policy_of(tiny_folder, architecture, **KINDS[kind])
    rough = policy_of(tiny_folder, architecture, dtype=torch.bfloat16, **KINDS[kind])
    assert {p.dtype for p in rough.trainable_parameters()} == {torch.float32}
    rollouts = rollouts_of(rough)
    measured, updated = rough("measure", rollouts, 1.0), rough("update", rollouts, 1.0)
    assert torch.equal(measured.logprobs_bT, updated.logprobs_bT)
    assert torch.equal(measured.logprobs_bT, measured.ref_logprobs_bT)
    updated.logprobs_bT.sum().backward()
    assert any(p.grad.abs().sum() > 0 for p in rough.trainable_parameters() if p.grad is not None)
    difference = (measured.logprobs_bT - full_logprobs(exact.lm, rollouts)).abs()
    assert difference.max() < 0.5
    assert (measured.logprobs_bT - rollouts.sample_logprobs_NT).abs().max() < 0.2
