"""Does each method learn? Random walks (`walks.py`), a known optimum, seeds that nothing was tuned on.

    python benchmarks/learning.py --out docs                        # every method, seeds 0 to 2, into docs/
    python benchmarks/learning.py --methods ppo --seeds 10 11 12    # only what is asked for
    make learn                                                      # the first of these

Every run is a process of its own with the threads that `OMP_NUM_THREADS` grants, so its time is what a person would
wait. Results go to `<out>/learning.json`, joined with what is there for other methods, and curves to
`<out>/learning-<method>.png`. The command fails where a run misses what `METHODS` promises.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder's parent is not on it

from benchmarks.walks import EOS, MAX_NEW_TOKENS, OPTIMUM, PAD, Walks, make_walks, pretrained, walks_tokenizer

EVALUATION_REPEATS = 50
"""Samples a start node; 1,000 an evaluation, whose standard error is below 0.01: with 200, a policy of 0.967 came out
as 0.935 (PPO, seed 14)."""


class Result(NamedTuple):
    """What one run learned.

    Args:
        method, seed: which run; the seed is that of the graph, the walks, the model and the training.
        data_mean: mean reward of the data, every start counted alike; 0 where the data has none.
        before, after: mean reward of 1,000 sampled responses, fifty a start.
        steps: optimizer steps. episodes: responses sampled for training.
        seconds: of the training itself, evaluations included; the pretraining on the walks is not.
        curve: (optimizer steps, mean reward of an evaluation).
    """

    method: str
    seed: int
    data_mean: float
    before: float
    after: float
    steps: int
    episodes: int
    seconds: float
    curve: list[tuple[int, float]]


class Method(NamedTuple):
    """A method and what it promises.

    Args:
        learn: trains on a seed with files in a folder, and returns the result.
        bar: share of the optimum that the last evaluation reaches at least.
        title: of its curve.
        measure: what its curve shows.
    """

    learn: Callable[[int, Path], Result]
    bar: float
    title: str
    measure: str = "optimality of 1,000 samples"


def learn_ppo(seed: int, folder: Path, rounds: int = 40, **model: Any) -> Result:
    """Rounds of 72 walks, each learned from in 4 steps.

    The learning rate falls over the run; the critic's weight is small, because it shares all layers with the policy.
    """
    walks = make_walks(seed)
    method = {
        "name": "PPOConfig", "num_rollouts": 72, "chunk_size": 72, "ppo_epochs": 2, "init_kl_coef": 0.0, "vf_coef": 0.1,
        "gen_kwargs": {"max_new_tokens": MAX_NEW_TOKENS},
    }  # fmt: skip
    sections = {
        "method": method,
        "train": {"batch_size": 36, "epochs": rounds, "total_steps": 4 * rounds, "eval_interval": 20},
        "scheduler": falling_over(4 * rounds),
    }
    trainer, seconds = tune(walks, folder, sections, pretrained(walks, **model))
    return result_of("ppo", walks, trainer, seconds, trainer.rounds_done * 72)


def learn_rft(seed: int, folder: Path, rounds: int = 10, **model: Any) -> Result:
    """Rounds of 32 walks a start, 8 passes over the best of them in small batches.

    The learning rate falls over the run, of which some 20 steps a round were seen.
    """
    walks = make_walks(seed)
    sections = {
        "method": {"name": "RFTConfig", "n_improve_steps": 8, "gen_kwargs": {"max_new_tokens": MAX_NEW_TOKENS}},
        "train": {"batch_size": 16, "epochs": 8 * rounds, "eval_interval": 1},
        "scheduler": falling_over(20 * rounds),
    }
    trainer, seconds = tune(walks, folder, sections, pretrained(walks, **model))
    episodes = trainer.rounds_done * trainer.method.n_generations_per_prompt * len(walks.prompts)
    return result_of("rft", walks, trainer, seconds, episodes)


def learn_ilql(seed: int, folder: Path) -> Result:
    """240 steps on the walks; decoded at beta 100, and at beta 0, where it stays what the walks are."""
    method = {
        "name": "ILQLConfig", "tau": 0.8, "gamma": 0.99, "cql_scale": 0.1, "awac_scale": 1.0, "alpha": 0.1, "beta": 0.0,
        "steps_for_target_q_sync": 5, "two_qs": True,
        "gen_kwargs": {"max_new_tokens": MAX_NEW_TOKENS, "top_k": 10, "beta": [100, 0]},
    }  # fmt: skip
    train = {"batch_size": 100, "epochs": 24, "total_steps": 240, "eval_interval": 40}
    walks = make_walks(seed)
    data = {"samples": walks.pairs, "rewards": walks.rewards}
    sections = {"method": method, "train": train, "optimizer": {"kwargs": {"lr": 1e-3, "betas": [0.9, 0.95]}}}
    trainer, seconds = tune(walks, folder, sections, pretrained(walks), data)
    result = result_of("ilql", walks, trainer, seconds, 0, "beta=100.0")
    plain = result_of("ilql", walks, trainer, seconds, 0, "beta=0.0").after
    print(f"decoded at beta 0: {plain:.3f}", file=sys.stderr, flush=True)
    if result.after < plain + 0.3 or abs(plain - walks.data_mean) > 0.15:
        raise SystemExit(
            f"ilql seed {seed}: {result.after:.3f} at beta 100, {plain:.3f} at beta 0, data {walks.data_mean:.3f}: the "
            "first has to be above the second by 0.3, which has to be within 0.15 of the third"
        )
    return result


def learn_sft(seed: int, folder: Path) -> Result:
    """A GPT-2 that starts at random says three letters backwards."""
    from transformers import GPT2Config

    lm = GPT2Config(vocab_size=24, n_layer=2, n_embd=48, n_head=4, n_positions=32, eos_token_id=EOS)
    return learn_backwards("sft", seed, folder, lm, 3, 220)


def learn_t5(seed: int, folder: Path) -> Result:
    """A T5 that starts at random says four letters backwards."""
    from transformers import T5Config

    lm = T5Config(
        vocab_size=24, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, pad_token_id=PAD, decoder_start_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    return learn_backwards("t5", seed, folder, lm, 4, 800)


def learn_backwards(method: str, seed: int, folder: Path, lm: Any, n_letters: int, steps: int) -> Result:
    """SFT on all words of `n_letters` letters of eight but 100, which are asked. What is measured is the share that is
    right."""
    import torch

    import solotune

    torch.manual_seed(seed)
    words = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=n_letters)]
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, learned = ([words[index] for index in part] for part in (order[:100], order[100:]))
    walks_tokenizer().save_pretrained(folder / "tokenizer")
    config = solotune.default_sft_config().evolve(
        model={"model_arch_type": "seq2seq" if lm.is_encoder_decoder else "causal"},
        tokenizer={"tokenizer_path": str(folder / "tokenizer")},
        optimizer={"kwargs": {"lr": 4e-3}},
        scheduler={"kwargs": {"T_max": steps, "eta_min": 4e-4}},  # a cosine
        method={"gen_kwargs": {"max_new_tokens": n_letters + 2, "do_sample": False}},
        train={
            "batch_size": 64, "total_steps": steps, "epochs": 100, "eval_interval": 20, "seq_length": 16, "seed": seed,
            "save_best": False, "checkpoint_interval": 10**6, "checkpoint_dir": str(folder), "run_name": "run",
        },
    )  # fmt: skip
    started = time.perf_counter()
    trainer = solotune.train(
        lm,
        samples=[(word + "z", word[::-1]) for word in learned],
        eval_prompts=[word + "z" for word in held_out],
        reward_fn=lambda prompts, outputs: [
            float(output == prompt[-2::-1]) for prompt, output in zip(prompts, outputs, strict=True)
        ],
        config=config,
    )
    seconds = time.perf_counter() - started
    curve = curve_of(trainer)
    return Result(method, seed, 0.0, curve[0][1], curve[-1][1], trainer.steps_done, 0, seconds, curve)


def falling_over(steps: int) -> dict[str, Any]:
    """A learning rate that falls to a tenth over so many steps."""
    return {"name": "linear", "kwargs": {"start_factor": 1.0, "end_factor": 0.1, "total_iters": steps}}


def tune(
    walks: Walks, folder: Path, sections: dict[str, Any], model: Path, data: dict[str, Any] | None = None
) -> tuple[Any, float]:
    """`solotune.train` on the walks from a pretrained model; the trainer, and the seconds of its training.

    Args:
        sections: what differs from the settings here, section by section; `method` with its name.
        data: what is learned from; default the walks' prompts.
    """
    import solotune
    from solotune.config import TRLConfig

    defaults: dict[str, Any] = {
        "model": {"model_path": str(model), "num_layers_unfrozen": -1},
        "tokenizer": {"tokenizer_path": str(model)},
        "optimizer": {"name": "adamw", "kwargs": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 1e-6}},
        "scheduler": {"name": "constant"},
        "train": {
            "total_steps": 1000, "seq_length": 16, "epochs": 100, "batch_size": 64, "eval_interval": 16,
            "checkpoint_interval": 10**6, "save_best": False, "seed": walks.seed, "checkpoint_dir": str(folder),
            "run_name": "run",
        },
    }  # fmt: skip
    given = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {**defaults, **sections}}
    config = TRLConfig.from_dict(given)
    started = time.perf_counter()
    trainer = solotune.train(
        reward_fn=walks.reward_fn,
        **(data or {"prompts": walks.prompts}),
        eval_prompts=[prompt for prompt in walks.prompts for _ in range(EVALUATION_REPEATS)],
        metric_fn=walks.metric_fn,
        config=config,
    )
    return trainer, time.perf_counter() - started


def result_of(
    method: str, walks: Walks, trainer: Any, seconds: float, episodes: int, setting: str | None = None
) -> Result:
    """The result of a finished run; of a generation sweep, at one of its settings."""
    curve = curve_of(trainer, setting)
    return Result(
        method, walks.seed, walks.data_mean, curve[0][1], curve[-1][1], trainer.steps_done, episodes, seconds, curve
    )


def curve_of(trainer: Any, setting: str | None = None) -> list[tuple[int, float]]:
    """(optimizer steps, mean reward) of each evaluation, from the run's own files."""
    from solotune.runs.lines import read_lines

    rewards: dict[int, list[float]] = {}
    for sample in read_lines(trainer.run.samples):
        if sample.get("setting") == setting:
            rewards.setdefault(sample["step"], []).append(sample["reward"])
    return [(step, sum(values) / len(values)) for step, values in rewards.items()]


METHODS = {
    "ilql": Method(learn_ilql, 0.8, "ILQL: 240 steps on 1,000 walks, decoded at beta 100"),
    "ppo": Method(learn_ppo, 0.95, "PPO: 40 rounds of 72 walks, 4 steps a round"),
    "rft": Method(learn_rft, 0.9, "RFT: 10 rounds of 640 walks, 8 passes over the best"),
    "sft": Method(learn_sft, 0.95, "SFT: three letters backwards, words it has not seen", "share that is right"),
    "t5": Method(learn_t5, 0.95, "SFT of a T5: four letters backwards, words it has not seen", "share that is right"),
}


def run_alone(method: str, seed: int) -> Result:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--one", method, str(seed)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Result(**json.loads(finished.stdout.splitlines()[-1]))


def draw(results: list[Result], method: Method, path: Path) -> None:
    """The curves of a method's seeds, with the data's mean of each as a dotted line."""
    import matplotlib
    from matplotlib.figure import Figure

    from solotune.report.curves import SEED_COLOURS, STYLE

    with matplotlib.rc_context({**STYLE, "grid.color": "#e5e7eb", "axes.edgecolor": "#9ca3af"}):
        figure = Figure(figsize=(6.4, 3.4), dpi=110, layout="constrained")
        axes = figure.subplots()
        axes.axhline(method.bar * OPTIMUM, color="#6b7280", linewidth=1, linestyle="--", label=f"bar: {method.bar:g}")
        for result, colour in zip(results, SEED_COLOURS * len(results), strict=False):
            axes.plot(*zip(*result.curve, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1.6,
                      label=f"seed {result.seed}: {result.after:.3f}")  # fmt: skip
            if result.data_mean:
                axes.axhline(result.data_mean, color=colour, linewidth=1, linestyle=":")
        if any(result.data_mean for result in results):
            axes.plot([], [], color="#6b7280", linewidth=1, linestyle=":", label="mean of the data")
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(method.measure)
        axes.set_title(method.title, loc="left", fontsize=10)
        axes.legend(loc="lower right")
        figure.savefig(path, format="png", metadata={"Software": None})


def write(results: list[Result], out: Path) -> None:
    """Results and curves of the methods that were run; those of others stay."""
    path = out / "learning.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for name in {result.method for result in results}:
        own = [result for result in results if result.method == name]
        known[name] = [{**r._asdict(), "curve": [[s, round(v, 4)] for s, v in r.curve]} for r in own]
        draw(own, METHODS[name], out / f"learning-{name}.png")
    path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=sorted(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="where results and curves go; nothing is written without it")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SEED"), help="one run in this process, as a JSON line")
    options = parser.parse_args()
    if options.one:
        name, seed = options.one
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(METHODS[name].learn(int(seed), Path(folder))._asdict()))
        return 0
    results, missed = [], 0
    for name in options.methods:
        for seed in options.seeds:
            result = run_alone(name, seed)
            results.append(result)
            missed += (is_low := result.after < METHODS[name].bar * OPTIMUM)
            print(
                f"{name} seed {seed}: {result.before:.3f} -> {result.after:.3f} (data {result.data_mean:.3f}), "
                f"{result.steps} steps, {result.episodes} episodes, {result.seconds:.0f} s"
                + (f"  BELOW {METHODS[name].bar}" if is_low else ""),
                flush=True,
            )
    if options.out is not None:
        write(results, options.out)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
