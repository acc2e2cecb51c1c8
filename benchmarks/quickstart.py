"""What the quickstart learns, over seeds: reward, KL, variety, and a lexicon that was never trained on.

    python benchmarks/quickstart.py --seeds 0 1 2 --out runs/seeds

Runs `solotune quickstart` for each seed whose folder is not there yet, then prints one table and one JSON line. VADER
(Hutto and Gilbert 2014) is a hand-made sentiment lexicon: a policy that only learned to please the reward model would
not please it. distinct-2 (Li et al. 2016, arXiv:1510.03055) is the share of different pairs of words in the outputs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from solotune.report.curves import write_curve_png
from solotune.runs.folder import read_lines


def distinct_2(outputs: list[str]) -> float:
    """Different pairs of neighbouring words over all of them, counted within outputs."""
    pairs = [pair for output in outputs for pair in zip(output.split(), output.split()[1:], strict=False)]
    return len(set(pairs)) / max(len(pairs), 1)


def measure(run: Path) -> dict[str, float]:
    """One run's numbers, from its own files."""
    summary = json.loads((run / "summary.json").read_text())
    samples = read_lines(run / "samples.jsonl")
    first, last = min(row["round"] for row in samples), max(row["round"] for row in samples)
    analyzer = SentimentIntensityAnalyzer()
    numbers = {
        "seed": summary["seed"],
        "reward_before": summary["reward_before"],
        "reward_after": summary["reward_after"],
        "gain": summary["reward_after"] - summary["reward_before"],
        "kl": summary["kl"],
        "wall_seconds": summary["wall_seconds"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }
    for name, chosen in (("before", first), ("after", last)):
        rows = [row for row in samples if row["round"] == chosen]
        compounds = [analyzer.polarity_scores(row["prompt"] + row["output"])["compound"] for row in rows]
        numbers[f"vader_{name}"] = sum(compounds) / len(compounds)
        numbers[f"distinct2_{name}"] = distinct_2([row["output"] for row in rows])
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--curve", type=Path, help="also write the learning curves as a PNG")
    options = parser.parse_args()
    runs = [options.out / f"seed{seed}" for seed in options.seeds]
    for seed, run in zip(options.seeds, runs, strict=True):
        if not (run / "summary.json").exists():
            command = [sys.executable, "-m", "solotune.cli", "quickstart", "--seed", str(seed), "--out", str(run)]
            subprocess.run(command, check=True)
    results = [measure(run) for run in runs]
    console = Console(stderr=True)
    table = Table("seed", "reward", "gain", "KL", "VADER", "distinct-2", "seconds")
    for r in results:
        table.add_row(
            str(r["seed"]),
            f"{r['reward_before']:.3f} -> {r['reward_after']:.3f}",
            f"{r['gain']:+.3f}",
            f"{r['kl']:.2f}",
            f"{r['vader_before']:+.3f} -> {r['vader_after']:+.3f}",
            f"{r['distinct2_before']:.3f} -> {r['distinct2_after']:.3f}",
            f"{r['wall_seconds']:.0f}",
        )
    console.print(table)
    if options.curve is not None:
        write_curve_png(runs, options.curve)
    print(json.dumps({"mean_gain": sum(r["gain"] for r in results) / len(results), "runs": results}))


if __name__ == "__main__":
    main()
