import numpy as np
import pytest
import torch

from solotune.algorithms import ShapeError, gae, whiten


def advantages_by_explicit_sum(rewards, values, gamma, lam):
    """One unpadded row: sum over l of (gamma * lam)^l * delta_{t+l}, in float64."""
    n = len(rewards)
    following = np.append(values[1:], 0.0)
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_discounted_sum_of_deltas(mask_BT, gamma, lam):
    rewards_BT, values_BT = torch.randn(2, 5, 7)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma, lam)
    for row, n in enumerate(mask_BT.sum(dim=1).tolist()):
        rewards, values = (x[row, :n].numpy().astype(np.float64) for x in (rewards_BT, values_BT))
        expected = advantages_by_explicit_sum(rewards, values, gamma, lam)
        np.testing.assert_allclose(advantages_BT[row, :n].numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(returns_BT[row, :n].numpy(), np.add(expected, values), atol=1e-5)
    assert (advantages_BT[~mask_BT] == 0).all()
    assert (returns_BT[~mask_BT] == 0).all()


def test_with_lambda_1_the_return_is_what_was_really_earned(mask_BT):
    rewards_BT, values_BT = torch.randn(2, 5, 7)
    returns_BT = gae(rewards_BT, values_BT, mask_BT, 1.0, 1.0).returns_BT
    earned_B = (rewards_BT * mask_BT).sum(dim=1)
    torch.testing.assert_close(returns_BT[:, 0], earned_B)  # whatever the critic said


def test_padding_is_not_read(mask_BT):
    rewards_BT, values_BT = torch.randn(2, 5, 7)
    clean = gae(rewards_BT, values_BT, mask_BT, 0.9, 0.8)
    poisoned = gae(
        rewards_BT.masked_fill(~mask_BT, torch.nan), values_BT.masked_fill(~mask_BT, torch.inf), mask_BT, 0.9, 0.8
    )
    wider = gae(*(torch.nn.functional.pad(x, (0, 3), value=9.0) for x in (rewards_BT, values_BT)),
                torch.nn.functional.pad(mask_BT, (0, 3)), 0.9, 0.8)  # fmt: skip
    for name in ("advantages_BT", "returns_BT"):
        assert torch.equal(getattr(poisoned, name), getattr(clean, name))
        assert torch.equal(getattr(wider, name)[:, :7], getattr(clean, name))
        assert (getattr(wider, name)[:, 7:] == 0).all()


def test_credit_carries_no_gradient_to_the_critic(mask_BT):
    values_BT = torch.randn(5, 7, requires_grad=True)
    assert not gae(torch.randn(5, 7), values_BT, mask_BT, 1.0, 0.95).returns_BT.requires_grad


def test_gae_refuses_what_it_cannot_mean(mask_BT):
    with pytest.raises(ShapeError, match=r"rewards_BT \(5, 7\), values_BT \(5, 8\), mask_BT \(5, 7\)"):
        gae(torch.zeros(5, 7), torch.zeros(5, 8), mask_BT, 1.0, 0.95)
    left_padded_BT = mask_BT.flip(1)
    with pytest.raises(ShapeError, match="row 0 of the mask has a True after a False"):
        gae(torch.zeros(5, 7), torch.zeros(5, 7), left_padded_BT, 1.0, 0.95)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-2, 5.0), (1e3, -2e3)])
def test_whitened_values_have_mean_0_and_std_1_under_the_mask(mask_BT, scale, shift):
    x_BT = torch.randn(5, 7) * scale + shift
    whitened_BT = whiten(x_BT.masked_fill(~mask_BT, torch.nan), mask_BT)
    selected = whitened_BT[mask_BT].numpy().astype(np.float64)
    assert selected.mean() == pytest.approx(0.0, abs=1e-6)
    assert selected.std() == pytest.approx(1.0, abs=1e-3)
    assert (whitened_BT[~mask_BT] == 0).all()
    assert whitened_BT.dtype == x_BT.dtype
    assert torch.equal(selected_order(whitened_BT, mask_BT), selected_order(x_BT, mask_BT))


def selected_order(x_BT, mask_BT):
    return x_BT[mask_BT].argsort()


@pytest.mark.parametrize("selected", [1, 4])
def test_one_value_or_equal_values_whiten_to_zero(selected):
    mask_BT = torch.arange(6)[None] < selected
    assert (whiten(torch.full((1, 6), 0.1), mask_BT) == 0).all()


def test_whitening_over_processes_is_whitening_of_all_their_tokens(mask_BT, on_processes):
    x_BT = torch.randn(5, 7) + 3
    together_BT = whiten(x_BT, mask_BT)
    parts = on_processes(
        lambda all_reduce: whiten(x_BT[:2], mask_BT[:2], all_reduce),
        lambda all_reduce: whiten(x_BT[2:], mask_BT[2:], all_reduce),
    )
    torch.testing.assert_close(torch.cat(parts), together_BT, atol=1e-6, rtol=0)
