"""Epochs of SFT and ILQL with a frozen trunk, with its activations kept and without.

    python benchmarks/offline_epochs.py --shape deep --json

The model, its LoRA and the sizes are those of `ppo_round.py`; the data are as many random samples as a round has
rollouts, each a prompt and an output of the shape's lengths. Tokens are as frequent as words of a text (the share of
the n-th falls as 1/n: Zipf's law), or with `--tokens uniform` all alike. Two trainers of each method take turns in one
process: one keeps what the trunk makes of the samples (`train.trunk_cache_gb`), the other computes it anew in every
pass, as a trainer without a cache has to. Their steps are otherwise the same; so are their losses, which is checked.
Nothing is evaluated or saved. The first epoch is that in which the kept activations are computed; `ratio` compares
the medians of the epochs after it. What a cache can save is the trunk's forward pass; a step's other costs bound
the ratio (in ILQL the products of the Q heads with the tokens that the data choose).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from shapes import SHAPES, Shape
from solotune_round import number_tokenizer, ppo_config
from worker import peak_memory_bytes

import solotune
from solotune.config import ILQLConfig, SFTConfig, TRLConfig
from solotune.data.prompts import Prompts
from solotune.trainers.ilql import ILQLTrainer
from solotune.trainers.offline import OfflineTrainer
from solotune.trainers.sft import SFTTrainer

METHODS = ("sft", "ilql")


def config_of(method: str, shape: Shape, dtype: str, tokenizer_dir: str, kept: bool) -> TRLConfig:
    """The PPO benchmark's model and optimizer with another method. All samples have one length: nothing is packed."""
    base = ppo_config(shape, dtype, tokenizer_dir)
    gen = {"max_new_tokens": shape.new_tokens}
    return replace(
        base,
        method=SFTConfig(gen_kwargs=gen) if method == "sft" else ILQLConfig(gen_kwargs=gen),
        train=replace(base.train, seq_length=shape.length + 1, trunk_cache_gb=64.0 if kept else None, pack=False),
    )


def samples_of(shape: Shape, frequencies: str) -> list[list[str]]:
    """As many samples as a round has rollouts: numbers, a token each."""
    ranks = torch.arange(1.0, shape.vocabulary - 2)
    shares = 1 / ranks if frequencies == "zipf" else torch.ones_like(ranks)
    drawn = torch.multinomial(shares, shape.rollouts * shape.length, replacement=True) + 3
    ids = drawn.view(shape.rollouts, shape.length).tolist()
    texts = [[str(token) for token in row] for row in ids]
    return [[" ".join(row[: shape.prompt_tokens]), " ".join(row[shape.prompt_tokens :])] for row in texts]


def trainer_of(method: str, shape: Shape, settings: argparse.Namespace, folder: str, kept: bool) -> OfflineTrainer:
    torch.manual_seed(0)
    samples, accelerator = samples_of(shape, settings.tokens), Accelerator(cpu=settings.device == "cpu")
    config, prompts = config_of(method, shape, settings.dtype, folder, kept), Prompts(["3"])
    if method == "sft":
        return SFTTrainer(config, samples, prompts, accelerator=accelerator)
    rewards = torch.rand(len(samples)).tolist()
    return ILQLTrainer(config, samples, rewards, prompts, accelerator=accelerator)


def play(trainer: OfflineTrainer) -> dict[str, float]:
    """One pass over the samples, which is one round."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    metrics = trainer.train_round()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "loss": metrics["objective/loss"], "seconds_of_the_cache": metrics["time/measure"]}


def measure(method: str, shape: Shape, settings: argparse.Namespace, folder: str) -> dict[str, Any]:
    kept, anew = (trainer_of(method, shape, settings, folder, is_kept) for is_kept in (True, False))
    epochs: dict[str, list[dict[str, float]]] = {"kept": [], "anew": []}
    for _ in range(1 + settings.epochs):
        for name, trainer in (("kept", kept), ("anew", anew)):
            epochs[name].append(play(trainer))
    for one, other in zip(epochs["kept"], epochs["anew"], strict=True):
        tolerance = 1e-4 if settings.dtype == "float32" else 2e-2
        if abs(one["loss"] - other["loss"]) > tolerance * abs(other["loss"]):
            raise SystemExit(f"{method}: the losses differ, {one['loss']} with the cache and {other['loss']} without")
    later = {name: median(epoch["seconds"] for epoch in played[1:]) for name, played in epochs.items()}
    cache = kept._cache
    assert cache is not None
    return {
        "samples": len(kept.samples),
        "tokens_chosen": len(kept.samples.chosen_tokens),
        "steps_per_epoch": kept.plan.steps_per_pass,
        "seconds_of_first_epoch": epochs["kept"][0]["seconds"],
        "seconds_of_which_the_cache": epochs["kept"][0]["seconds_of_the_cache"],
        "seconds_of_later_epochs": later["kept"],
        "seconds_of_later_epochs_without": later["anew"],
        "ratio": later["anew"] / later["kept"],
        "cache_bytes": cache.nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time epochs of SFT and ILQL with and without kept activations.")
    parser.add_argument("--shape", choices=SHAPES, default="deep")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--tokens", choices=("zipf", "uniform"), default="zipf", help="how frequent the tokens are")
    parser.add_argument("--samples", type=int, help="samples of the data; default: the shape's rollouts")
    parser.add_argument("--epochs", type=int, default=3, help="measured epochs after the first")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--json", action="store_true", help="one JSON object alone on stdout")
    settings = parser.parse_args()
    settings.dtype = settings.dtype or {"cpu": "float32", "cuda": "bfloat16"}[settings.device]
    shape = SHAPES[settings.shape]
    if settings.samples is not None:
        shape = shape.with_rollouts(settings.samples)
    result: dict[str, Any] = {
        "shape": shape.name,
        "device": settings.device,
        "dtype": settings.dtype,
        "threads": torch.get_num_threads(),
        "versions": {
            "solotune": solotune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        number_tokenizer(shape.vocabulary).save_pretrained(folder)
        for method in settings.methods:
            result[method] = measure(method, shape, settings, folder)
    result["peak_memory_bytes"] = peak_memory_bytes(settings.device)
    if settings.json:
        print(json.dumps(result, indent=2))
        return
    for method in settings.methods:
        found = result[method]
        print(
            f"{method}, {found['tokens_chosen']} of {shape.vocabulary} tokens chosen: first epoch "
            f"{found['seconds_of_first_epoch']:.2f} s, later ones {found['seconds_of_later_epochs']:.2f} s, without "
            f"the cache {found['seconds_of_later_epochs_without']:.2f} s: {found['ratio']:.1f} times as fast"
        )


if __name__ == "__main__":
    main()
