"""The task of the learning benchmark, and a short version of it: `make learn` runs the whole."""

from itertools import pairwise, product

import pytest

from benchmarks.learning import learn_ppo, learn_rft
from benchmarks.walks import EOS, GOAL, MAX_LENGTH, N_WALKS, NODES, make_walks, walks_tokenizer


@pytest.mark.parametrize("seed", range(6))
def test_every_seed_connects_and_its_walks_follow_edges(seed):
    data = make_walks(seed)
    assert data.shortest.keys() == set(NODES)
    assert len(data.walks) == N_WALKS
    for walk, reward in zip(data.walks, data.rewards, strict=True):
        assert all(after in data.edges[node] for node, after in pairwise(walk))
        assert len(walk) == MAX_LENGTH or walk.endswith(GOAL)
        assert (reward > 0) == walk.endswith(GOAL)
        assert reward <= 1
    assert 0.05 < data.data_mean < 0.7
    assert data.walks == make_walks(seed).walks != make_walks(seed + 1).walks


def test_a_walk_is_worth_1_where_no_shorter_one_arrives():
    """Against all walks of up to five nodes, tried one by one."""
    data = make_walks(0)
    shortest: dict[str, int] = {}
    for length in range(2, 6):
        for nodes in product(NODES[1:], repeat=length - 1):
            walk = "".join(nodes) + GOAL
            if length > 4 and walk[1] not in data.edges[walk[0]]:
                continue
            if all(after in data.edges.get(node, "") for node, after in pairwise(walk)):
                best = shortest.setdefault(walk[0], length)
                assert (data.optimality(walk) == 1) == (length == best)
                assert 0 < data.optimality(walk) <= 1
            else:
                assert data.optimality(walk) == 0
        if length == 4:
            break
    assert shortest
    assert all(data.shortest[start] == length for start, length in shortest.items())


def test_what_is_no_path_is_worth_nothing():
    data = make_walks(0)
    walk = next(walk for walk in data.walks if data.optimality(walk) == 1)
    assert data.optimality(walk) == 1
    for bad in ("", "?", GOAL * 2, walk + GOAL, walk + walk, walk[:-1], walk[0] * 2 + walk[1:], "Z" + walk):
        assert data.optimality(bad) == 0, bad
    assert data.reward_fn(samples=[walk, walk[:-1]]) == [1.0, 0.0]
    assert data.metric_fn(samples=[walk])["shortest"] == [1.0]


def test_the_tokenizer_has_a_token_a_node():
    tokenizer = walks_tokenizer()
    assert tokenizer("abu").input_ids == [0, 1, 20]
    assert tokenizer.decode([0, 1, 20, EOS], skip_special_tokens=True) == "abu"


SMALL = {"layers": 2, "width": 72, "steps": 100, "lr": 3e-3}


@pytest.mark.parametrize(("learn", "rounds"), [(learn_ppo, 12), (learn_rft, 3)], ids=["ppo", "rft"])
def test_a_short_run_on_a_small_model_learns(learn, rounds, tmp_path):
    """From the data's level, 0.07 on this graph, to several times that."""
    result = learn(3, tmp_path, rounds, **SMALL, cache=tmp_path)
    assert abs(result.before - result.data_mean) < 0.1
    assert result.after > result.before + 0.3, result
