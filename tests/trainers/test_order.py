from solotune.trainers.order import PromptOrder, minibatches


def test_every_pass_over_the_prompts_is_a_shuffle_of_all_of_them():
    order = PromptOrder(7, seed=3)
    passes = [[order[p * 7 + i] for i in range(7)] for p in range(4)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


def test_a_position_alone_says_the_prompt():
    forwards, backwards = PromptOrder(7, seed=3), PromptOrder(7, seed=3)
    assert [forwards[i] for i in range(30)] == [backwards[i] for i in reversed(range(30))][::-1]
    assert [PromptOrder(7, seed=4)[i] for i in range(30)] != [forwards[i] for i in range(30)]


def test_minibatches_cover_the_rollouts_once_and_epochs_differ():
    epochs = [minibatches(10, 4, 0, epoch) for epoch in range(3)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(row for batch in batches for row in batch.tolist()) == list(range(10))
    assert len({tuple(row for batch in batches for row in batch.tolist()) for batches in epochs}) == 3
