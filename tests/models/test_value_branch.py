"""A critic with blocks of its own (trlX's num_value_layers_unfrozen)."""

import pytest
import torch
from safetensors.torch import load_file

from solotune.errors import ModelError
from solotune.models.critic import saved_branch_blocks
from solotune.models.loading import build_policy
from tests.models.test_split import KINDS, policy_of, rollouts_of
from tests.tiny import tiny_lm, tiny_ppo_config

ARCHITECTURES = ("opt", "gpt2", "gpt_neox", "llama", "qwen2", "gemma3_text")


def branched(folder, n_blocks, architecture="opt", dtype=torch.float32, **model):
    """A policy whose critic has `n_blocks` blocks, and a value head that does not say zero."""
    config = tiny_ppo_config(folder, model=model, method={"num_value_layers_unfrozen": n_blocks})
    config.model.model_path = tiny_lm(architecture).to(dtype)
    policy = build_policy(config)
    torch.manual_seed(5)
    torch.nn.init.normal_(policy.value_head.layers[-1].weight)
    return policy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["lora on the last 2", "last 2 blocks", "everything"])
@pytest.mark.parametrize("n_blocks", [1, 2, 3])
def test_a_new_branch_sees_what_the_policy_sees(tiny_folder, architecture, kind, n_blocks):
    """It starts as a copy, so its values are those of a head on the policy's own last hidden state."""
    policy = branched(tiny_folder, n_blocks, architecture, **KINDS[kind])
    plain = policy_of(tiny_folder, architecture, **KINDS[kind])
    plain.value_head.load_state_dict(policy.value_head.state_dict())
    torch.manual_seed(1)
    rollouts = rollouts_of(policy)
    torch.manual_seed(1)
    same = rollouts_of(plain)
    assert torch.equal(rollouts.response_ids_NT, same.response_ids_NT)
    measured, expected = policy("measure", rollouts, 1.0), plain("measure", same, 1.0)
    torch.testing.assert_close(measured.values_bT, expected.values_bT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(measured.logprobs_bT, expected.logprobs_bT, atol=1e-5, rtol=0)
    assert torch.equal(measured.ref_logprobs_bT, measured.logprobs_bT)
    assert measured.values_bT.abs().max() > 0.1
    whole = policy("whole", *rollouts.inputs)
    torch.testing.assert_close(
        whole.values_BT[:, rollouts.prompt_width - 1 :].masked_fill(~rollouts.response_mask_NT, 0.0),
        measured.values_bT, atol=1e-5, rtol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["opt", "qwen2"])
@pytest.mark.parametrize("kind", ["lora on the last 2", "last 2 blocks", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_16_bits_a_gpus_masks_fit_every_block(tiny_folder, architecture, kind, dtype, monkeypatch):
    """The branch is fp32 beside 16-bit blocks. On a CPU that says it is a GPU: masks come ready-made there."""
    policy = branched(tiny_folder, 1, architecture, dtype, **KINDS[kind])
    rollouts = rollouts_of(policy)
    expected = policy("measure", rollouts, 1.0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    measured, updated = policy("measure", rollouts, 1.0), policy("update", rollouts, 1.0)
    (updated.logprobs_bT.sum() + updated.values_bT.sum()).backward()
    for name in ("logprobs_bT", "ref_logprobs_bT", "values_bT"):
        torch.testing.assert_close(getattr(measured, name), getattr(expected, name), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("n_blocks", [1, 2])
def test_gradient_checkpointing_recomputes_the_branch_too(tiny_folder, n_blocks):
    gradients, recomputed = [], []
    for checkpointing in (False, True):
        sections = {
            "method": {"num_value_layers_unfrozen": n_blocks},
            "train": {"gradient_checkpointing": checkpointing},
        }
        config = tiny_ppo_config(tiny_folder, model=KINDS["last 2 blocks"], **sections)
        config.model.model_path = tiny_lm("llama")
        policy = build_policy(config)
        torch.manual_seed(3)
        torch.nn.init.normal_(policy.value_head.layers[-1].weight)
        rollouts = rollouts_of(policy)
        values_bT = policy("update", rollouts, 1.0).values_bT
        ran = []
        policy.value_branch.blocks[0].mlp.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        values_bT.square().sum().backward()
        recomputed.append(len(ran))
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert recomputed == [0, 1]
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_the_value_loss_trains_the_branch_and_not_the_blocks_it_was_copied_from(tiny_folder):
    policy = branched(tiny_folder, 2, **KINDS["lora on the last 2"])
    rollouts = rollouts_of(policy)
    measured = policy("update", rollouts, 1.0)
    measured.values_bT.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in policy.value_branch.blocks.parameters() if p.dim() > 1)
    assert all(p.grad is None or not p.grad.any() for p in policy.backbone.parameters())
    with torch.no_grad():
        for parameter in policy.value_branch.parameters():
            parameter.add_(0.05)
    moved = policy("measure", rollouts, 1.0)
    assert torch.equal(moved.logprobs_bT, measured.logprobs_bT.detach())
    assert (moved.values_bT - measured.values_bT).abs().max() > 1e-3


def test_a_branch_above_the_policys_lowest_block_hands_gradient_down(tiny_folder):
    policy = branched(tiny_folder, 1, **KINDS["last 2 blocks"])
    policy("update", rollouts_of(policy), 1.0).values_bT.square().sum().backward()
    third, fourth = policy.decoder.blocks[2], policy.decoder.blocks[3]
    assert all(p.grad.abs().sum() > 0 for p in third.parameters() if p.dim() > 1)
    assert all(p.grad is None for p in fourth.parameters())


def test_the_saved_branch_says_its_size(tiny_folder, tmp_path):
    assert saved_branch_blocks(tmp_path) == 0
    branched(tiny_folder, 2, **KINDS["lora on the last 2"]).save_pretrained(tmp_path)
    assert saved_branch_blocks(tmp_path) == 2


def test_it_is_saved_beside_the_model_and_read_back(tiny_folder, tmp_path):
    policy = branched(tiny_folder, 2, **KINDS["lora on the last 2"])
    policy.save_pretrained(tmp_path)
    other = branched(tiny_folder, 2, **KINDS["lora on the last 2"])
    with torch.no_grad():
        for parameter in other.critic.parameters():
            parameter.zero_()
    other.load_critic(tmp_path)
    saved = load_file(tmp_path / "value_head.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"value_head", "value_branch"}
    for mine, yours in zip(policy.critic.parameters(), other.critic.parameters(), strict=True):
        assert torch.equal(mine, yours)


def test_more_blocks_than_the_model_has(tiny_folder):
    with pytest.raises(ModelError, match=r"num_value_layers_unfrozen = 4.*4 blocks.*allowed are 0 .* to 3"):
        branched(tiny_folder, 4, **KINDS["lora on the last 2"])
