"""ILQL's loss against a plain one: a loop over rows and tokens in float64, that knows nothing of masks or batches."""

import pytest
import torch

from solotune.algorithms.ilql import ilql_loss, normalised
from solotune.algorithms.masks import ShapeError

SETTINGS = {"tau": 0.7, "gamma": 0.9, "beta": 0.5, "cql_scale": 0.1, "awac_scale": 0.8}


def plain(rows, tau, gamma, beta, cql_scale, awac_scale):
    """Each row: per action its log-prob, its Qs, its target Qs, V, -log softmax(Q), and the reward at the end."""
    q_loss = v_loss = cql_loss = awac_loss = 0.0
    n = sum(len(row["values"]) for row in rows)
    for row in rows:
        for t, value in enumerate(row["values"]):
            last = t + 1 == len(row["values"])
            target = (row["reward"] if last else 0.0) + (0.0 if last else gamma * row["values"][t + 1].detach())
            for q in row["qs"][t]:
                q_loss = q_loss + (q - target) ** 2
            advantage = min(row["targets"][t]).detach() - value
            weight = tau if float(advantage.detach()) >= 0 else 1 - tau
            v_loss = v_loss + weight * advantage**2
            cql_loss = cql_loss + sum(row["cql"][t])
            awac_loss = awac_loss - row["logprobs"][t] * torch.exp(beta * advantage.detach())
    total = q_loss + v_loss + cql_scale * cql_loss + awac_scale * awac_loss
    return [x / n for x in (total, q_loss, v_loss, cql_loss, awac_loss)]


def rows_of(lengths, n_heads, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [
        {
            "logprobs": numbers(n),
            "qs": numbers(n, n_heads),
            "targets": numbers(n, n_heads),
            "values": numbers(n),
            "cql": numbers(n, n_heads),
            "reward": float(torch.randn((), generator=generator)),
        }
        for n in lengths
    ]


def together(rows, stands_in=0, **settings):
    """The same numbers as the trainer hands them over; `stands_in` actions of poison count for nothing."""

    def flat(name):
        return torch.cat([row[name] for row in rows])

    n = sum(len(row["values"]) for row in rows)
    last = torch.cat([torch.arange(len(row["values"])) == len(row["values"]) - 1 for row in rows])
    rewards = torch.zeros(n, dtype=torch.float64)
    rewards[last] = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    poison = torch.full((stands_in,), torch.nan, dtype=torch.float64)
    poison_K = poison.expand(rows[0]["qs"].shape[1], -1)
    return ilql_loss(
        torch.cat([flat("logprobs"), poison]),
        torch.cat([flat("qs").T, poison_K], dim=1),
        torch.cat([flat("targets").T, poison_K], dim=1),
        torch.cat([flat("values"), poison]),
        flat("cql").sum() / n,
        torch.cat([rewards, poison]),
        torch.cat([last, torch.ones(stands_in, dtype=torch.bool)]),
        torch.arange(n + stands_in) < n,
        **{**SETTINGS, **settings},
        denominator=n,
    )


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_it_is_the_plain_loss_with_its_gradients(n_heads, tau):
    rows = rows_of([3, 1, 5], n_heads)
    names = [(row, name) for row in rows for name in ("logprobs", "qs", "values", "cql")]
    expected = plain(rows, **{**SETTINGS, "tau": tau})
    wanted = torch.autograd.grad(expected[0], [row[name] for row, name in names])
    found = together(rows, tau=tau)
    for ours, theirs in zip(found[:5], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    slopes = torch.autograd.grad(found.loss, [row[name] for row, name in names])
    for ours, theirs, (_, name) in zip(slopes, wanted, names, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


def test_rows_that_stand_in_count_for_nothing_whatever_is_in_them():
    rows = rows_of([3, 2], 2)
    assert together(rows, stands_in=4).loss == together(rows).loss


def test_the_reward_reaches_the_last_action_alone_and_no_value_reaches_over_a_samples_end():
    """Two samples one behind the other: changing the second one's values changes nothing of the first one's Q loss."""
    first, second = rows_of([3, 2], 1)
    alone = together([first]).q_loss * 3
    both = together([first, second]).q_loss * 5 - together([second]).q_loss * 2
    torch.testing.assert_close(both, alone, rtol=1e-12, atol=1e-12)


def test_v_is_the_expectile_of_the_targets():
    """A single state with target Qs 0 and 1 in equal shares: the tau-expectile of those two is tau."""
    value = torch.zeros(1, requires_grad=True)
    for _ in range(400):
        loss = ilql_loss(
            torch.zeros(2), torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), value.expand(2), torch.zeros(()),
            torch.zeros(2), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool),
            tau=0.8, gamma=1.0, beta=0.0, cql_scale=0.0, awac_scale=0.0, denominator=2,
        )  # fmt: skip
        (slope,) = torch.autograd.grad(loss.loss, value)
        value = (value - 0.2 * slope).detach().requires_grad_()
    assert float(value) == pytest.approx(0.8, abs=1e-4)


def test_rewards_are_normalised_and_equal_ones_are_nothing():
    rewards = normalised(torch.tensor([1.0, 2.0, 4.0, -3.0]))
    assert rewards.mean() == pytest.approx(0.0, abs=1e-7)
    assert rewards.std() == pytest.approx(1.0, abs=1e-6)
    for equal in ([0.1] * 7, [1e9 + 0.5] * 3, [5.0], [0.0, 0.0]):
        assert normalised(torch.tensor(equal)).tolist() == [0.0] * len(equal)
    with pytest.raises(ShapeError, match="one a sample"):
        normalised(torch.zeros(2, 2))


def test_shapes_that_do_not_fit_are_named():
    rows = rows_of([2], 1)
    with pytest.raises(ShapeError, match="values_N"):
        together([{**rows[0], "logprobs": torch.zeros(3, dtype=torch.float64)}])
