"""Copies of frozen weights: the same products and gradients, used in a policy's own passes alone, never stale."""

import contextlib

import pytest
import torch
from torch.nn.functional import linear

from solotune.models import packed
from solotune.models.loading import build_policy
from solotune.models.packed import PackedWeights
from tests.tiny import VOCABULARY, save_tiny, tiny_ppo_config


@pytest.fixture
def packs(monkeypatch):
    """Every processor with a oneDNN that is exact takes the path, with weights of any size."""
    if not (torch.backends.mkldnn.is_available() and packed._is_exact()):
        pytest.skip("oneDNN is not there, or not exact here")
    monkeypatch.setattr(packed, "gains_by_packing", lambda: True)
    monkeypatch.setattr(packed, "LEAST_WEIGHT", 1)


@pytest.fixture
def policy(tmp_path):
    return build_policy(tiny_ppo_config(save_tiny(tmp_path / "model", "llama")))


IDS_BT = torch.arange(10).view(2, 5) % VOCABULARY
WHOLE = (IDS_BT, torch.ones_like(IDS_BT), torch.arange(5).expand(2, 5))


@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 5, 48)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_and_gradients_are_those_of_linear(shape, has_bias, packs):
    torch.manual_seed(0)
    weight, x = torch.randn(96, 48), torch.randn(shape, requires_grad=True)
    bias = torch.randn(96) if has_bias else None
    plain = linear(x, weight, bias)
    slope = torch.randn_like(plain)
    (wanted,) = torch.autograd.grad(plain, x, slope)
    with PackedWeights([weight]):
        found = linear(x, weight, bias)
    assert type(found.grad_fn).__name__ != type(plain.grad_fn).__name__  # by another way
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found, x, slope)[0], wanted)
    with PackedWeights([weight]), torch.no_grad():
        assert torch.equal(linear(x, weight, bias), found)


def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(packs):
    weight, x_NK = torch.randn(512, 96), torch.randn(300, 96)
    with PackedWeights([weight]):
        every = linear(x_NK, weight)
        assert all(torch.equal(linear(x_NK[:n], weight), every[:n]) for n in (1, 2, 3, 5, 9, 17, 64, 65, 200))


def test_a_weight_that_was_changed_in_place_is_copied_anew(packs):
    weight, x = torch.randn(16, 32), torch.randn(4, 32)
    with PackedWeights([weight]):
        linear(x, weight)
        weight.mul_(2)
        torch.testing.assert_close(linear(x, weight), x @ weight.T)


def test_other_weights_types_and_empty_batches_are_left_to_torch(packs):
    weight = torch.randn(16, 32)
    with PackedWeights([weight]):
        assert torch.equal(linear(torch.ones(2, 32), weight.clone()), torch.ones(2, 32) @ weight.T)
        assert linear(torch.ones(0, 32), weight).shape == (0, 16)
        with pytest.raises(RuntimeError):
            linear(torch.ones(2, 32, dtype=torch.float64), weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(torch.ones(2, 32), weight).dtype == torch.bfloat16


def test_copies_are_made_in_order_as_long_as_there_is_room(packs, monkeypatch):
    weights = [torch.randn(16, 32) for _ in range(3)]
    monkeypatch.setattr(packed, "MOST_BYTES", 2 * weights[0].nbytes)
    assert len(PackedWeights([weights[0], weights[0], *weights[1:]])) == 2


def test_a_policy_packs_what_is_frozen_and_its_passes_stay_the_same(packs, policy):
    found = policy("whole", *WHOLE)
    assert isinstance(policy._packed, PackedWeights)
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    assert policy._packed._packed.keys().isdisjoint(trained)
    policy._packed = contextlib.nullcontext()
    wanted = policy("whole", *WHOLE)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.logits_BTV, found.ref_logits_BTV)  # the adapter is fresh


def test_outside_of_a_policys_passes_the_plain_weights_count(packs, policy):
    policy("whole", *WHOLE)
    before = policy.lm(input_ids=IDS_BT).logits
    for parameter in policy.lm.parameters():
        parameter.data.mul_(1.5)  # as merging does, without a trace in the version
    assert not torch.allclose(policy.lm(input_ids=IDS_BT).logits, before)
