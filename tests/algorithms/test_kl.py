import math

import pytest
import torch

from solotune.algorithms import AdaptiveKLController, FixedKLController, ShapeError, k1, response_kl


def test_the_mean_of_k1_is_the_kl_between_two_distributions():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    # 10 tokens drawn in exactly the policy's proportions: the sample mean is the expectation.
    tokens = torch.tensor([[0] * 7 + [1] * 2 + [2]])
    mask_BT = torch.ones(1, 10, dtype=torch.bool)
    kl_B = response_kl(policy.log()[tokens], reference.log()[tokens], mask_BT)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(policy), torch.distributions.Categorical(reference)
    )
    torch.testing.assert_close(kl_B[0] / 10, expected)


def test_kl_counts_response_tokens_only(mask_BT):
    logprobs_BT, ref_logprobs_BT = -torch.rand(2, 5, 7)
    kl_BT = k1(logprobs_BT, ref_logprobs_BT, mask_BT)
    poisoned_BT = k1(
        logprobs_BT.masked_fill(~mask_BT, torch.nan), ref_logprobs_BT.masked_fill(~mask_BT, -torch.inf), mask_BT
    )
    assert torch.equal(kl_BT, poisoned_BT)
    kl_B = response_kl(logprobs_BT, ref_logprobs_BT, mask_BT)
    for row, n in enumerate([5, 1, 0, 7, 3]):
        expected = sum((logprobs_BT[row, t] - ref_logprobs_BT[row, t]).item() for t in range(n))
        assert kl_B[row].item() == pytest.approx(expected, abs=1e-6)


def test_equal_models_have_no_kl_and_a_swap_turns_the_sign(mask_BT):
    logprobs_BT, ref_logprobs_BT = -torch.rand(2, 5, 7)
    assert (k1(logprobs_BT, logprobs_BT, mask_BT) == 0).all()
    assert torch.equal(k1(logprobs_BT, ref_logprobs_BT, mask_BT), -k1(ref_logprobs_BT, logprobs_BT, mask_BT))


def test_shapes_are_printed(mask_BT):
    with pytest.raises(ShapeError, match=r"\(5, 7\), ref_logprobs_BT \(5, 6\)"):
        k1(torch.zeros(5, 7), torch.zeros(5, 6), mask_BT)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.05),  # on target: nothing moves
        (6.6, 0.05 * (1 + 0.1 * 128 / 10_000)),  # 10 % above
        (600.0, 0.05 * (1 + 0.2 * 128 / 10_000)),  # clipped
        (0.0, 0.05 * (1 - 0.2 * 128 / 10_000)),  # clipped
        (-3.0, 0.05 * (1 - 0.2 * 128 / 10_000)),  # k1 can average below 0
    ],
)
def test_adaptive_controller_on_the_classic_recipe(kl, expected):
    controller = AdaptiveKLController(coef=0.05, target=6.0, horizon=10_000)
    controller.update(kl, n=128)
    assert controller.value == pytest.approx(expected, rel=1e-12)


def test_a_horizon_of_rollouts_far_off_target_moves_the_coefficient_by_about_20_percent():
    controller = AdaptiveKLController(coef=1.0, target=6.0, horizon=10_000)
    for _ in range(100):
        controller.update(100.0, n=100)
    assert controller.value == pytest.approx(math.exp(0.2), rel=1e-3)


def test_a_resumed_controller_goes_on_where_it_was():
    controller = AdaptiveKLController(0.05, 6.0, 1000)
    controller.update(20.0, 64)
    resumed = AdaptiveKLController(0.05, 6.0, 1000)
    resumed.load_state_dict(controller.state_dict())
    for each in (controller, resumed):
        each.update(1.0, 32)
    assert resumed.value == controller.value != 0.05


def test_fixed_controller_stays():
    controller = FixedKLController(0.1)
    controller.update(1000.0, 128)
    assert controller.value == 0.1
    resumed = FixedKLController(0.3)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.value == 0.1


@pytest.mark.parametrize("settings", [(0.0, 6.0, 100), (0.1, 0.0, 100), (0.1, 6.0, 0), (math.nan, 6.0, 100)])
def test_adaptive_controller_refuses_what_would_not_steer(settings):
    with pytest.raises(ValueError, match="above 0"):
        AdaptiveKLController(*settings)


def test_an_update_never_breaks_the_coefficient_in_silence():
    controller = AdaptiveKLController(0.05, 6.0, horizon=100)
    with pytest.raises(ValueError, match="kl=nan"):
        controller.update(math.nan, 10)
    with pytest.raises(ValueError, match="n=500 rollouts with horizon=100"):
        controller.update(0.0, 500)
    assert controller.value == 0.05
    with pytest.raises(ValueError, match=r"-0\.1"):
        FixedKLController(-0.1)
