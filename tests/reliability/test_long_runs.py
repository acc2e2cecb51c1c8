"""A run's memory does not grow. SOLOTUNE_SOAK=1 (`make soak`) looks from round 50 to round 500."""

import os
from pathlib import Path

from solotune.data.prompts import Prompts
from solotune.runs.folder import RunFolder
from solotune.trainers.ppo import PPOTrainer
from tests.tiny import tiny_ppo_config

FIRST, LAST = (50, 500) if os.environ.get("SOLOTUNE_SOAK") else (30, 70)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_host_memory_stays_within_three_percent(tiny_folder, tmp_path):
    config = tiny_ppo_config(tiny_folder, train={"epochs": LAST, "total_steps": 10**6, "eval_interval": 40})
    prompts = Prompts(["a film", "another film"])
    trainer = PPOTrainer(
        config, lambda outputs: [float(len(o)) for o in outputs], prompts, prompts, run=RunFolder(tmp_path / "run")
    )
    sizes = {}
    trainer.learn(on_round=lambda _: sizes.update({trainer.rounds_done: resident_bytes()}))
    assert max(sizes[round] for round in range(FIRST, LAST + 1)) < 1.03 * sizes[FIRST]
