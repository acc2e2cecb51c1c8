"""Times one round of PPO: sampling, scoring, measuring, credit, and all updates of the round.

    python benchmarks/ppo_round.py --shape deep --json                # ours, and the bare matrix products
    python benchmarks/ppo_round.py --shape deep --peer trl --json     # TRL's PPO in turn with ours

Every side is a process of its own. All are started and warmed up, then they play their rounds in turn, one at a time;
what is reported is the median over rounds. With --json one object stands alone on stdout, everything else on stderr.
benchmarks/README.md says what each number means.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from shapes import SHAPES, Shape
from worker import PHASES

HERE = Path(__file__).resolve().parent
PEERS = {"trl": ("torch==2.13.0", "trl==1.12.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0")}


class Side:
    """A process that plays rounds of the same work; see worker.py for its end."""

    def __init__(self, python: str, script: str, settings: argparse.Namespace, shape: Shape) -> None:
        self._script = script
        self.rounds: list[dict[str, Any]] = []
        command = [python, str(HERE / script), "--shape", shape.name, "--rollouts", str(shape.rollouts)]
        self._process = subprocess.Popen(
            [*command, "--device", settings.device, "--dtype", settings.dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self.introduction = self._answer()

    def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer below says that it has ended
        return self._answer()

    def play(self, warmup: bool) -> None:
        record = self.ask("round")
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in record["seconds_by_phase"].items())
        print(
            f"{self.introduction['name']}: {'warm-up, ' if warmup else ''}{record['seconds']:.1f} s ({phases})",
            file=sys.stderr,
            flush=True,
        )
        if not warmup:
            self.rounds.append(record)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._script} ended with code {self._process.wait()}; its own message is above")
        return json.loads(line)

    def report(self, shape: Shape) -> dict[str, Any]:
        """The medians over the measured rounds, under the names that the benchmark promises."""
        seconds = median(played["seconds"] for played in self.rounds)
        return {
            **self.introduction,
            "seconds_per_round": seconds,
            "cpu_seconds_per_round": median(played["cpu_seconds"] for played in self.rounds),
            "seconds_by_phase": {
                phase: median(played["seconds_by_phase"][phase] for played in self.rounds) for phase in PHASES
            },
            "seconds_per_update": median(played["seconds_per_update"] for played in self.rounds),
            "tokens_per_second": shape.rollouts * shape.new_tokens / seconds,
            "peak_memory_bytes": max(played["peak_memory_bytes"] for played in self.rounds),
        }


def peer_python(peer: str) -> str:
    """The interpreter of the peer's own environment, made on first use.

    Environments lie in `$SOLOTUNE_PEERS/<peer>`, or in `.venv-peers/<peer>` of the repository.
    """
    environment = Path(os.environ.get("SOLOTUNE_PEERS") or HERE.parent / ".venv-peers") / peer
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        packages = PEERS[peer]
        print(f"Installing {', '.join(packages)} in {environment}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, stdout=sys.stderr)
        subprocess.run([str(python), "-m", "pip", "install", *packages], check=True, stdout=sys.stderr)
    return str(python)


def benchmark(settings: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[settings.shape]
    if settings.rollouts is not None:
        shape = shape.with_rollouts(settings.rollouts)
    rounds = settings.rounds or shape.rounds
    scripts = [(sys.executable, "solotune_round.py"), (sys.executable, "products.py")]
    if settings.peer:
        scripts.append((peer_python(settings.peer), f"peers/{settings.peer}_round.py"))
    sides: list[Side] = []
    try:
        for python, script in scripts:
            sides.append(Side(python, script, settings, shape))
        for turn in range(shape.warmup_rounds + rounds):
            for side in sides:
                side.play(warmup=turn < shape.warmup_rounds)
        ours, products, *peers = sides
        full_update = ours.ask("full_update")
    finally:
        for side in sides:
            side.close()
    result = {
        "shape": shape.name,
        "device": settings.device,
        "dtype": settings.dtype,
        "rollouts": shape.rollouts,
        "rounds": rounds,
        **ours.report(shape),
        **full_update,
        "seconds_of_matrix_products": median(played["seconds"] for played in products.rounds),
        "matrix_products_by_phase": {
            phase: median(played["seconds_by_phase"][phase] for played in products.rounds)
            for phase in products.rounds[0]["seconds_by_phase"]
        },
    }
    for peer in peers:
        result["peer"] = {"shape": shape.name, "device": settings.device, **peer.report(shape)}
        result["ratio"] = result["peer"]["seconds_per_round"] / result["seconds_per_round"]
    return result


def describe(result: dict[str, Any]) -> str:
    """The result as a few lines for a person."""
    lines = [f"{result['shape']} on {result['device']} ({result['dtype']}, {result['threads']} threads)"]
    for side in filter(None, (result, result.get("peer"))):
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in side["seconds_by_phase"].items())
        lines.append(
            f"{side['name']}: {side['seconds_per_round']:.2f} s a round ({phases}), "
            f"{side['seconds_per_update']:.3f} s an update, {side['peak_memory_bytes'] / 1e9:.2f} GB"
        )
    lines.append(f"a full-model update: {result['seconds_per_full_update']:.3f} s")
    lines.append(f"the round's bare matrix products: {result['seconds_of_matrix_products']:.2f} s")
    if "ratio" in result:
        lines.append(f"ours is {result['ratio']:.1f} times as fast as {result['peer']['name']}")
    return "\n".join(lines)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: has to be at least 1")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one round of PPO.")
    parser.add_argument("--shape", choices=SHAPES, default="deep")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--rollouts", type=positive, help="rollouts a round; default: the shape's own")
    parser.add_argument("--rounds", type=positive, help="measured rounds; default: the shape's own")
    parser.add_argument("--peer", choices=PEERS, help="play the same work in this peer, in turn with ours")
    parser.add_argument("--json", action="store_true", help="one JSON object alone on stdout")
    settings = parser.parse_args()
    settings.dtype = settings.dtype or {"cpu": "float32", "cuda": "bfloat16"}[settings.device]
    result = benchmark(settings)
    print(json.dumps(result, indent=2) if settings.json else describe(result))


if __name__ == "__main__":
    main()
