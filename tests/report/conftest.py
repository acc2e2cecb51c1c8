"""A synthetic run folder in the shape that a training run leaves behind."""

import json
import math
import random
from pathlib import Path

import pytest

PROMPTS = [
    "What made this movie so distinctly",
    "This movie was terrible",
    "I was surprised at how this movie",
    "I didn't expect this movie was",
]
BEFORE = [
    " boring is that it never once finds a reason to exist, and neither did I.",
    ", and the script is a mess of half-finished ideas.\nI left after an hour.",
    " could waste such a fine cast on so little.",
    " going to be this long, this loud and this empty.",
]
AFTER = [
    " charming is the warmth of its cast, and a score that stays with you.",
    ", well, technically okay, and that's great! A joy to watch with friends.",
    " moved me: funny, generous and beautifully shot.",
    " going to be one of the best and most touching films of the year.",
]
CONFIG = """\
method:
  name: PPOConfig
  ppo_epochs: 2
  init_kl_coef: 0.05
train:
  batch_size: 16
  seed: 0
versions:
  torch: 2.13.0
"""
TREE = """\
Gemma3ForCausalLM  269,000,000 parameters, 1.08 GB, 1,216,512 trainable
└─ model (Gemma3TextModel)  269,000,000, 1.08 GB, 1,216,512 trainable
   └─ layers (ModuleList)
      ├─ 0-13 (Gemma3DecoderLayer) x14
      └─ 14-17 (Gemma3DecoderLayer) x4
         └─ lora_A (Linear)  weight [16, 640]*
* trainable
Trainable 1,216,512 of 269,000,000 parameters (0.4522 %)
Value head: 820,481 trainable"""


def metrics_of(rounds: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    lines = []
    for r in range(1, rounds + 1):
        learned = 1 - math.exp(-r / 10)
        lines.append(
            {
                "round": r,
                "step": 4 * r,
                "objective/score": 0.36 + 0.3 * learned + draw.gauss(0, 0.025),
                "objective/score_std": 0.22 - 0.05 * learned,
                "objective/kl": 5.5 * learned + draw.gauss(0, 0.2),
                "policy/loss": -0.02 + draw.gauss(0, 0.005),
                "value/loss": 0.05 * math.exp(-r / 6),
                "rollout/tokens_per_second": 48 + draw.gauss(0, 2),
                "time/sample": 5.1,
                "time/round": 11.9,
                "memory/peak_bytes": 1_450_000_000 + 4_000_000 * min(r, 8),
            }
        )
    return lines


def samples_of(r: int, learned: float, seed: int, repeats: int) -> list[dict]:
    draw = random.Random(1000 * seed + r)
    return [
        {
            "round": r,
            "step": 4 * r,
            "prompt": prompt,
            "output": (after if draw.random() < learned else before),
            "reward": min(1.0, max(0.0, 0.36 + 0.35 * learned + draw.gauss(0, 0.18))),
            "finish": "length",
            "kl": 5.2 * learned,
        }
        for _ in range(repeats)
        for prompt, before, after in zip(PROMPTS, BEFORE, AFTER, strict=True)
    ]


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, rounds, seed, repeats) writes a folder and returns its path; files can be changed afterwards."""

    def make(name: str = "quickstart", rounds: int = 25, seed: int = 0, repeats: int = 8) -> Path:
        run = tmp_path / name
        run.mkdir(parents=True)
        evaluations = [0, rounds // 2, rounds]
        samples = [s for r in evaluations for s in samples_of(r, 1 - math.exp(-r / 10), seed, repeats)]
        write_lines(run / "metrics.jsonl", metrics_of(rounds, seed))
        write_lines(run / "samples.jsonl", samples)
        (run / "config.yaml").write_text(CONFIG)
        summary = {
            "reward_before": 0.361,
            "reward_after": 0.642,
            "kl": 5.13,
            "wall_seconds": 702.4,
            "seconds_by_phase": {
                "sample": 127.5,
                "score": 6.2,
                "measure": 48.1,
                "credit": 0.4,
                "update": 96.0,
                "evaluate": 41.7,
                "reward_training": 187.3,
            },
            "peak_memory_bytes": 1_482_000_000,
            "rounds": rounds,
            "seed": seed,
            "steps": 4 * rounds,
            "tokens_per_second": 48.2,
            "model": "asset:gemma-3-270m",
            "trainable_parameters": 1_216_512,
            "total_parameters": 269_000_000,
            "parameter_tree": TREE,
        }
        (run / "summary.json").write_text(json.dumps(summary))
        return run

    return make


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def rewrite():
    """rewrite(path, change): applies `change` to every JSON line of a file; lines for which it returns None go."""

    def apply(path: Path, change) -> None:
        lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
        write_lines(path, [line for line in lines if line is not None])

    return apply
