import numpy as np
import pytest
import torch

from solotune.algorithms import RunningMoments, ShapeError, gae, scale_and_clip, token_rewards


def test_running_moments_are_those_of_all_values_at_once():
    batches = [torch.randn(n) * 3 + 1e4 for n in (5, 1, 0, 40, 2)]
    moments = RunningMoments()
    for batch in batches:
        mean, std = moments.update(batch)
        values = batch.numpy().astype(np.float64)
        assert mean == pytest.approx(values.mean() if len(values) else 0.0, rel=1e-12)
        assert std == pytest.approx(values.std(ddof=1) if len(values) > 1 else 0.0, rel=1e-9)
    values = torch.cat(batches).numpy().astype(np.float64)
    assert moments.count == 48
    assert moments.mean == pytest.approx(values.mean(), rel=1e-12)
    assert moments.std == pytest.approx(values.std(ddof=1), rel=1e-9)


def test_running_moments_over_processes_equal_one_process(on_processes):
    rounds = [torch.randn(12) for _ in range(3)]

    def process(part):
        def run(all_reduce):
            moments = RunningMoments(all_reduce)
            batch_stats = [moments.update(x_B[part]) for x_B in rounds]
            return batch_stats, moments.mean, moments.std, moments.count

        return run

    alone = process(slice(None))(lambda tensor: tensor)
    for batch_stats, mean, std, count in on_processes(process(slice(0, 3)), process(slice(3, 12))):
        np.testing.assert_allclose(batch_stats, alone[0], rtol=1e-12)
        np.testing.assert_allclose((mean, std, count), alone[1:], rtol=1e-12)


def test_running_moments_round_trip_and_refuse_nan():
    moments = RunningMoments()
    moments.update(torch.randn(7))
    resumed = RunningMoments()
    resumed.load_state_dict(moments.state_dict())
    with pytest.raises(ValueError, match="finite"):
        moments.update(torch.tensor([1.0, torch.nan]))
    x_B = torch.randn(9)
    assert moments.update(x_B) == resumed.update(x_B)
    assert (moments.mean, moments.std, moments.count) == (resumed.mean, resumed.std, resumed.count)


def test_clipping_comes_first_and_nothing_is_shifted():
    scores_B = torch.tensor([-100.0, 1.0, 2.0, 100.0])
    clipped_B = torch.tensor([-10.0, 1.0, 2.0, 10.0])
    moments = RunningMoments()
    result = scale_and_clip(scores_B, scale_reward="running", moments=moments, cliprange=10)
    std = clipped_B.numpy().std(ddof=1)
    assert moments.std == pytest.approx(std)  # of the clipped scores
    np.testing.assert_allclose(result.scores, clipped_B / std, rtol=1e-6)
    assert (result.mean, result.std) == pytest.approx((0.75, std))
    assert torch.equal(scores_B, torch.tensor([-100.0, 1.0, 2.0, 100.0]))  # the caller's tensor is its own


def test_running_scale_uses_every_round_and_ref_the_first():
    rounds = [torch.randn(64) * spread for spread in (1.0, 5.0, 0.2)]
    for mode, expected in (
        ("running", torch.cat(rounds).std().item()),
        ("ref", rounds[0].std().item()),
        (None, 1.0),
        ("ignored", 1.0),
    ):
        moments, ref_std = RunningMoments(), None
        for scores_B in rounds:
            result = scale_and_clip(scores_B, scale_reward=mode, moments=moments, ref_std=ref_std)
            ref_std = result.ref_std
        torch.testing.assert_close(result.scores, rounds[-1] / expected, rtol=1e-5, atol=0)
        assert moments.count == 192


def test_a_given_ref_std_is_kept():
    result = scale_and_clip(torch.tensor([1.0, 3.0]), scale_reward="ref", moments=RunningMoments(), ref_std=4.0)
    assert result.scores.tolist() == [0.25, 0.75]
    assert result.ref_std == 4.0


@pytest.mark.parametrize("mode", ["running", "ref"])
@pytest.mark.parametrize("scores_B", [torch.tensor([0.7]), torch.full((8,), 0.7)])
def test_scores_that_do_not_differ_stay_as_they_are(mode, scores_B):
    result = scale_and_clip(scores_B, scale_reward=mode, moments=RunningMoments())
    assert torch.equal(result.scores, scores_B)
    assert result.ref_std is None  # the next batch may set it


def test_dense_scores_are_clipped_by_token_and_counted_by_response(mask_BT):
    scores_BT = torch.randn(5, 7) * 4
    result = scale_and_clip(
        scores_BT.masked_fill(~mask_BT, torch.nan), scale_reward="running", moments=RunningMoments(), cliprange=2.0,
        mask_BT=mask_BT,
    )  # fmt: skip
    clipped = [np.clip(row[:n].numpy(), -2, 2) for row, n in zip(scores_BT, [5, 1, 0, 7, 3], strict=True)]
    totals = [row.astype(np.float64).sum() for row in clipped]
    assert result.mean == pytest.approx(np.mean(totals), abs=1e-6)
    assert result.std == pytest.approx(np.std(totals, ddof=1), rel=1e-6)
    for row, expected in zip(result.scores, clipped, strict=True):
        np.testing.assert_allclose(row[: len(expected)], expected / result.std, rtol=1e-5)
        assert (row[len(expected) :] == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_reward": "runing"}, "'runing'"),
        ({"scale_reward": None, "cliprange": -1.0}, "cliprange=-1.0"),
        ({"scale_reward": "ref", "ref_std": 0.0}, "ref_std=0.0"),
    ],
)
def test_settings_that_mean_nothing_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        scale_and_clip(torch.ones(3), moments=RunningMoments(), **settings)


def test_dense_scores_need_their_mask(mask_BT):
    with pytest.raises(ShapeError, match="no mask"):
        scale_and_clip(torch.ones(5, 7), scale_reward=None, moments=RunningMoments())
    with pytest.raises(ShapeError, match=r"\(5, 6\)"):
        token_rewards(torch.ones(5, 6), torch.zeros(5, 7), 0.1, mask_BT)
    with pytest.raises(ShapeError, match="4 scores"):
        token_rewards(torch.ones(4), torch.zeros(5, 7), 0.1, mask_BT)


def test_the_score_sits_on_the_last_real_token_and_nowhere_else(mask_BT):
    scores_B = torch.tensor([2.0, -3.0, 11.0, 5.0, 7.0])
    rewards_BT = token_rewards(scores_B, torch.full((5, 7), torch.nan).masked_fill(mask_BT, 0.0), 0.1, mask_BT)
    expected = torch.zeros(5, 7)
    expected[0, 4], expected[1, 0], expected[3, 6], expected[4, 2] = 2.0, -3.0, 5.0, 7.0  # row 2 has no token
    assert torch.equal(rewards_BT, expected)


def test_a_response_earns_its_score_less_the_price_of_its_kl(mask_BT):
    kl_BT = torch.randn(5, 7)
    scores_B = torch.randn(5)
    scores_B[2] = 0.0
    earned_B = token_rewards(scores_B, kl_BT, 0.3, mask_BT).sum(dim=1)
    torch.testing.assert_close(earned_B, scores_B - 0.3 * (kl_BT * mask_BT).sum(dim=1))


def test_dense_scores_stay_with_their_tokens(mask_BT):
    scores_BT, kl_BT = torch.randn(2, 5, 7)
    rewards_BT = token_rewards(scores_BT.masked_fill(~mask_BT, torch.nan), kl_BT, 0.5, mask_BT)
    for row, t in mask_BT.nonzero().tolist():
        assert rewards_BT[row, t].item() == pytest.approx((scores_BT[row, t] - 0.5 * kl_BT[row, t]).item(), abs=1e-6)
    assert (rewards_BT[~mask_BT] == 0).all()


def test_the_last_real_token_is_trained_on_its_own_score():
    mask_BT = torch.tensor([[True, True, False, False]])
    rewards_BT = token_rewards(torch.tensor([1.0]), torch.zeros(1, 4), 0.1, mask_BT)
    advantages_BT = gae(rewards_BT, torch.zeros(1, 4), mask_BT, gamma=0.5, lam=1.0).advantages_BT
    assert advantages_BT.tolist() == [[0.5, 1.0, 0.0, 0.0]]  # undiscounted where it is earned
