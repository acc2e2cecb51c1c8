"""Reference and critic are chosen each for itself; what is there says the same as where both are."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from solotune.models.policy import PolicyModel
from solotune.rollout.draw import row_uniforms
from solotune.rollout.settings import SamplingSettings
from tests.tiny import tiny_lm


def policy_of(**roles) -> PolicyModel:
    torch.manual_seed(1)
    lm = tiny_lm()
    lm.requires_grad_(False)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3], init_lora_weights=False)
    torch.manual_seed(2)
    return PolicyModel(get_peft_model(lm, adapter), **roles)


def sampled(policy):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    uniforms = row_uniforms(0, 0, range(2), 5)
    settings = SamplingSettings(max_new_tokens=5)
    return policy("sample", ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(2), uniforms, settings, 0)


@pytest.mark.parametrize("has_reference", [True, False])
@pytest.mark.parametrize("has_critic", [True, False])
def test_each_role_is_there_or_not(has_reference, has_critic):
    both, some = policy_of(), policy_of(has_reference=has_reference, has_critic=has_critic)
    assert some.has_reference == has_reference
    assert (len(some.critic) > 0) == has_critic
    expected, rollouts = sampled(both), sampled(some)
    assert torch.equal(rollouts.response_ids_NT, expected.response_ids_NT)
    assert torch.equal(rollouts.trunk_NSH, expected.trunk_NSH), "what is sampled is learned from"
    whole, measured = both("measure", expected, 1.0), some("measure", rollouts, 1.0)
    assert torch.equal(measured.logprobs_bT, whole.logprobs_bT)
    assert torch.equal(measured.entropies_bT, whole.entropies_bT)
    assert (measured.values_bT is not None) == has_critic
    assert (measured.ref_logprobs_bT is not None) == has_reference
    if has_reference:
        assert torch.equal(measured.ref_logprobs_bT, whole.ref_logprobs_bT)
        assert not torch.equal(measured.ref_logprobs_bT, measured.logprobs_bT)
    now = some("update", rollouts, 1.0)
    assert torch.equal(now.logprobs_bT, whole.logprobs_bT)
    assert now.ref_logprobs_bT is None
    now.logprobs_bT.sum().backward()
    assert all(p.grad is not None for name, p in some.named_parameters() if "lora" in name)
