"""What laying out a frozen weight once is worth: products of few rows, and the same by the copies of models/packed.py.

    python benchmarks/packing.py

Medians, in GFLOP/s, on as many threads as torch takes; needs a CPU whose oneDNN passes `models/packed.py`'s own checks.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch.nn.functional import linear

from solotune.models.packed import PackedWeights

WEIGHTS = {"head of SmolLM2-135M": (49152, 576), "its feed-forward": (1536, 576), "head of Gemma 3 270M": (262144, 640)}
ROWS = (32, 64, 128, 512)
SECONDS = 0.5


def rate(flop: float, product: Callable[[], object]) -> float:
    product()
    times, until = [], time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        product()
        times.append(time.perf_counter() - started)
    return flop / median(times) / 1e9


@torch.no_grad()
def main() -> None:
    print(f"{'weight':24} rows   plain  packed  GFLOP/s, {torch.get_num_threads()} threads")
    for name, (outputs, inputs) in WEIGHTS.items():
        weight = torch.randn(outputs, inputs)
        packed = PackedWeights([weight])
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            flop = 2.0 * rows * outputs * inputs
            product = partial(linear, x, weight)
            plain = rate(flop, product)
            with packed:
                print(f"{name:24} {rows:4} {plain:7.0f} {rate(flop, product):7.0f}")


if __name__ == "__main__":
    main()
