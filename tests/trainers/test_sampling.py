"""Where a round's trunk activations lie changes nothing of what is learned from them."""

import pytest
import torch

from solotune.rollout.records import Rollouts, _rows_of
from tests.trainers.test_ppo import trainer_of

CLOCKED = ("time/", "memory/", "rollout/tokens_per_second")


def test_a_trunk_that_waits_on_the_host_changes_nothing(tiny_folder, monkeypatch):
    asked, moved = [], []

    def count(rollouts):
        moved.append(rollouts.n_rollouts)
        return rollouts._replace(trunk_NSH=rollouts.trunk_NSH.cpu())

    monkeypatch.setattr(Rollouts, "with_trunk_on_host", count)
    rounds = []
    for room in (True, False):
        monkeypatch.setattr(
            "solotune.trainers.sampling.has_room", lambda trunk_bytes, _, room=room: asked.append(trunk_bytes) or room
        )
        torch.manual_seed(0)
        metrics = trainer_of(tiny_folder, method={"chunk_size": 2}).train_round()
        rounds.append({name: value for name, value in metrics.items() if not name.startswith(CLOCKED)})
    assert moved[:4] == [2, 2, 2, 2]  # every chunk of the second round
    width, rest = divmod(asked[0], 8 * 32 * 4)  # of the whole round, by its first chunk: rollouts, hidden size, bytes
    assert rest == 0
    assert 2 + 5 <= width <= 25 + 5  # the shortest and the longest prompt, five tokens that are fed
    assert rounds[0] == rounds[1]


def test_rounds_go_on_in_the_prompts_and_every_row_is_a_group_of_its_own(tiny_folder):
    trainer = trainer_of(tiny_folder)
    places, prompts = [], []
    for _ in range(2):
        rollouts = trainer.sample_rollouts()
        places.append(rollouts.group_N.tolist())
        prompts += rollouts.prompt_index_N.tolist()
        assert torch.equal(rollouts.select(torch.tensor([3, 1])).group_N, rollouts.group_N[[3, 1]])
        trainer.train_round()
    assert places == [[*range(8)], [*range(8, 16)]]
    assert prompts == [trainer.order[place] for place in range(16)]
    assert trainer.state()["prompts_taken"] == 16


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_of_a_trunk_on_the_host_come_to_the_device():
    trunk = torch.randn(6, 5, 4)
    rows = torch.tensor([4, 1], device="cuda")
    assert torch.equal(_rows_of(trunk, rows).cpu(), trunk[[4, 1]])
