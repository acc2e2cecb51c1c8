import math

import pytest
import torch

from solotune.algorithms import PPOLoss, ShapeError, explained_variance, ppo_loss

SETTINGS = {"cliprange": 0.2, "cliprange_value": 0.3, "vf_coef": 0.7}


@pytest.fixture
def batch(mask_BT):
    """Arguments in the order of the signature; float64, some ratios and values far enough to be clipped."""
    logprobs, values, old_logprobs, old_values, advantages, returns = torch.randn(6, 5, 7, dtype=torch.float64) * 0.5
    return [logprobs.requires_grad_(), values.requires_grad_(), old_logprobs, old_values, advantages, returns, mask_BT]


def token_by_token(logp, value, old_logp, old_value, advantage, target, cliprange, cliprange_value):
    """Policy and value loss of one token, by cases instead of by maxima."""
    ratio = math.exp(logp - old_logp)
    gain = advantage * (min(ratio, 1 + cliprange) if advantage >= 0 else max(ratio, 1 - cliprange))
    near = min(max(value, old_value - cliprange_value), old_value + cliprange_value)
    return -gain, 0.5 * max((value - target) ** 2, (near - target) ** 2)


def test_the_loss_is_the_sum_over_tokens_by_the_denominator(batch):
    mask_BT = batch[-1]
    result = ppo_loss(*batch, **SETTINGS, denominator=16)
    tokens = [
        token_by_token(*(x[row, t].item() for x in batch[:-1]), 0.2, 0.3) for row, t in mask_BT.nonzero().tolist()
    ]
    policy_loss, value_loss = (sum(column) / 16 for column in zip(*tokens, strict=True))
    assert result.policy_loss.item() == pytest.approx(policy_loss, rel=1e-12)
    assert result.value_loss.item() == pytest.approx(value_loss, rel=1e-12)
    assert result.loss.item() == pytest.approx(policy_loss + 0.7 * value_loss, rel=1e-12)


def test_an_unmoved_policy_has_ratio_1_no_kl_and_nothing_clipped(batch):
    logprobs_BT, values_BT = batch[0], batch[1]
    result = ppo_loss(
        logprobs_BT, values_BT, logprobs_BT.detach(), values_BT.detach(), *batch[4:], **SETTINGS, denominator=16
    )
    assert result.ratio == 1.0
    assert result.approx_kl == 0.0
    assert result.clipfrac == 0.0
    assert result.value_clipfrac == 0.0
    # and its gradient is that of plain policy gradient: -A by each log-prob
    (grad,) = torch.autograd.grad(result.loss, logprobs_BT)
    torch.testing.assert_close(grad, torch.where(batch[-1], -batch[4] / 16, 0))


def test_metrics_are_means_over_the_tokens_under_the_mask(batch):
    mask_BT = batch[-1]
    result = ppo_loss(*batch, **SETTINGS, denominator=16)
    log_ratios = (batch[0] - batch[2])[mask_BT].tolist()
    ratios = [math.exp(x) for x in log_ratios]
    assert result.ratio.item() == pytest.approx(sum(ratios) / 16)
    assert result.approx_kl.item() == pytest.approx(
        sum(r - 1 - x for r, x in zip(ratios, log_ratios, strict=True)) / 16
    )
    assert result.clipfrac.item() == pytest.approx(sum(abs(r - 1) > 0.2 for r in ratios) / 16)
    assert 0 < result.clipfrac < 1
    assert 0 < result.value_clipfrac < 1


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [2, 3]])
def test_micro_batches_add_up_to_the_batch(batch, sizes):
    whole = ppo_loss(*batch, **SETTINGS, denominator=16)
    whole_grads = torch.autograd.grad(whole.loss, batch[:2])
    parts, start = [], 0
    grads = [torch.zeros_like(x) for x in batch[:2]]
    for size in sizes:
        rows = slice(start, start + size)
        start += size
        parts.append(ppo_loss(*(x[rows] for x in batch), **SETTINGS, denominator=torch.tensor(16.0)))
        for total, grad in zip(grads, torch.autograd.grad(parts[-1].loss, batch[:2]), strict=True):
            total += grad
    for name in PPOLoss._fields:
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
    for total, grad in zip(grads, whole_grads, strict=True):
        torch.testing.assert_close(total, grad)


def test_neither_values_nor_gradients_see_padding(batch):
    mask_BT = batch[-1]
    clean = ppo_loss(*batch, **SETTINGS, denominator=16)
    clean_grads = torch.autograd.grad(clean.loss, batch[:2])
    poisoned_batch = [x.detach().masked_fill(~mask_BT, torch.nan) for x in batch[:-1]]
    for x in poisoned_batch[:2]:
        x.requires_grad_()
    poisoned = ppo_loss(*poisoned_batch, mask_BT, **SETTINGS, denominator=16)
    assert [x.item() for x in poisoned] == [x.item() for x in clean]
    for grad, clean_grad in zip(torch.autograd.grad(poisoned.loss, poisoned_batch[:2]), clean_grads, strict=True):
        assert torch.equal(grad, clean_grad)
        assert (grad[~mask_BT] == 0).all()
    packed = ppo_loss(*(x[mask_BT] for x in batch), **SETTINGS, denominator=16)
    torch.testing.assert_close(packed.loss, clean.loss)


@pytest.mark.parametrize(("advantage", "ratio", "moves"), [
    (1.0, 1.5, False), (1.0, 0.5, True), (-1.0, 1.5, True), (-1.0, 0.5, False), (1.0, 1.1, True), (-1.0, 0.9, True),
])  # fmt: skip
def test_a_token_stops_moving_once_it_went_far_enough_the_right_way(advantage, ratio, moves):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    zero = torch.zeros(1, 1)
    mask_BT = torch.ones(1, 1, dtype=torch.bool)
    result = ppo_loss(logprobs, zero, zero, zero, zero + advantage, zero, mask_BT, **SETTINGS, denominator=1)
    (grad,) = torch.autograd.grad(result.loss, logprobs)
    assert grad.item() == pytest.approx(-advantage * ratio if moves else 0.0)


def test_without_value_clipping_the_value_loss_is_half_the_squared_error(batch):
    result = ppo_loss(*batch, cliprange=0.2, cliprange_value=None, vf_coef=1.0, denominator=16)
    errors = (batch[1] - batch[5])[batch[-1]]
    torch.testing.assert_close(result.value_loss, 0.5 * errors.detach().square().mean())
    assert result.value_clipfrac == 0.0


def test_only_the_loss_carries_a_gradient(batch):
    result = ppo_loss(*batch, **SETTINGS, denominator=16)
    assert [name for name in PPOLoss._fields if getattr(result, name).requires_grad] == ["loss"]


def test_what_cannot_be_meant_is_refused(batch):
    with pytest.raises(ShapeError, match=r"returns_BT \(5, 6\)"):
        ppo_loss(*batch[:5], batch[5][:, :6], batch[6], **SETTINGS, denominator=16)
    with pytest.raises(ValueError, match="denominator=0"):
        ppo_loss(*batch, **SETTINGS, denominator=0)


def test_explained_variance_of_known_critics(mask_BT):
    returns_BT = torch.randn(5, 7)
    pad = torch.where(mask_BT, 0.0, torch.nan)
    assert explained_variance(returns_BT + 3 + pad, returns_BT, mask_BT).item() == pytest.approx(1.0)  # offset is free
    assert explained_variance(torch.zeros(5, 7), returns_BT + pad, mask_BT).item() == pytest.approx(0.0)
    assert explained_variance(-returns_BT, returns_BT, mask_BT).item() == pytest.approx(-3.0)
    assert explained_variance(returns_BT, torch.full((5, 7), 0.1), mask_BT).item() == 0.0


def test_explained_variance_over_processes(mask_BT, on_processes):
    values_BT, returns_BT = torch.randn(2, 5, 7)
    together = explained_variance(values_BT, returns_BT, mask_BT)
    for part in on_processes(
        lambda all_reduce: explained_variance(values_BT[:1], returns_BT[:1], mask_BT[:1], all_reduce),
        lambda all_reduce: explained_variance(values_BT[1:], returns_BT[1:], mask_BT[1:], all_reduce),
    ):
        torch.testing.assert_close(part, together)
