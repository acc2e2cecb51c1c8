"""Reading a run folder, also one whose run still goes on, crashed, or was written by another algorithm."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from solotune.cleaning import one_line
from solotune.errors import DataError

FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json")


class Pair(NamedTuple):
    """The same evaluation sample (same prompt, same random stream) before and after training."""

    prompt: str
    before: str
    reward_before: float | None
    after: str
    reward_after: float | None


class Change(NamedTuple):
    """The mean reward of a run's first and last evaluation."""

    before: float | None
    after: float | None


@dataclass
class Run:
    """What a run folder holds. `notes` say what is missing or was left out, in sentences for the reader.

    Of a generation sweep `evaluations` are those of the setting whose last one has the highest mean reward.
    """

    name: str
    metrics: list[dict[str, Any]]  # one a round, by round
    evaluations: dict[int, list[dict[str, Any]]]  # samples by round, in the order of the file; rounds ascending
    summary: dict[str, Any]
    config: str
    notes: list[str] = field(default_factory=list)
    sweep: dict[str, Change] = field(default_factory=dict)  # by the setting of a generation sweep; empty without one

    @property
    def before(self) -> list[dict[str, Any]]:
        """The samples of the first evaluation; empty if there was none."""
        return self.evaluations[min(self.evaluations)] if self.evaluations else []

    @property
    def after(self) -> list[dict[str, Any]]:
        """The samples of the last evaluation; empty if there were fewer than two."""
        return self.evaluations[max(self.evaluations)] if len(self.evaluations) > 1 else []

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(rounds, values) of one metric, where it was logged as a finite number."""
        points = [(number(line["round"]), number(line.get(key))) for line in self.metrics]
        kept = [(x, y) for x, y in points if x is not None and y is not None]
        return [x for x, _ in kept], [y for _, y in kept]

    def evaluation_means(self, key: str) -> tuple[list[float], list[float]]:
        """(rounds, means over the samples) of `reward` or `kl`, for the evaluations that have it."""
        means = {r: mean(sample.get(key) for sample in samples) for r, samples in self.evaluations.items()}
        kept = [(float(r), value) for r, value in means.items() if value is not None]
        return [x for x, _ in kept], [y for _, y in kept]


def read_run(run_dir: Path) -> Run:
    """Reads a run folder.

    Raises:
        DataError: there is no such folder, or it holds none of the files that a run writes.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(
            f"No run folder at {str(run_dir)!r}. A report needs the folder that a training run wrote "
            f"(for example runs/quickstart), which holds {', '.join(FILES)}; give the path of that folder."
        )
    if not any((run_dir / name).is_file() for name in FILES):
        raise DataError(
            f"{str(run_dir)!r} is not a run folder: it holds none of {', '.join(FILES)}. "
            "Give the folder of one run (runs/<name>), not the one above it."
        )
    notes: list[str] = []
    by_round: dict[int, dict[str, Any]] = {}
    for line in _read_lines(run_dir / "metrics.jsonl", notes):
        by_round[line["round"]] = line  # a resumed run may write a round again: the last one counts
    by_setting: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for line in _read_lines(run_dir / "samples.jsonl", notes):
        by_setting.setdefault(str(line.get("setting", "")), {}).setdefault(line["round"], []).append(line)
    changes = {setting: _change(evaluations) for setting, evaluations in by_setting.items()}
    highest = max(changes, key=lambda s: -math.inf if (after := changes[s].after) is None else after, default="")
    evaluations = by_setting.get(highest, {})
    if len(changes) > 1:
        told = [f"{one_line(setting)[:40]} {_told(change)}" for setting, change in islice(changes.items(), 12)]
        told += ["..."] * (len(changes) > 12)
        notes.append(
            "Samples were drawn with each setting of a sweep; mean rewards of the first and the last evaluation: "
            f"{'; '.join(told)}. Shown is {one_line(highest)[:40]}, "
            f"{'the first' if changes[highest].after is None else 'the highest at the end'}."
        )
    summary = _read_summary(run_dir / "summary.json", notes)
    config = run_dir / "config.yaml"
    has_config = config.is_file() and _is_own(config, notes)
    return Run(
        name=run_dir.resolve().name,
        metrics=[by_round[r] for r in sorted(by_round)],
        evaluations={r: evaluations[r] for r in sorted(evaluations)},
        summary=summary,
        config=config.read_text(encoding="utf-8", errors="replace") if has_config else "",
        notes=notes,
        sweep=changes if len(changes) > 1 else {},
    )


def number(value: object) -> float | None:
    """The value if it is a finite number that can be drawn, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e30 else None  # False for NaN; an int may be too large for a float


def mean(values: Iterable[object]) -> float | None:
    """The mean of those values that are finite numbers; None if none is."""
    numbers = [kept for value in values if (kept := number(value)) is not None]
    return sum(numbers) / len(numbers) if numbers else None


def pair_up(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[Pair]:
    """Pairs the samples of two evaluations by index; indices that only one of them has, or whose prompts differ, go."""
    return [
        Pair(
            str(first.get("prompt", "")),
            str(first.get("output", "")),
            number(first.get("reward")),
            str(last.get("output", "")),
            number(last.get("reward")),
        )
        for first, last in zip(before, after, strict=False)
        if first.get("prompt") == last.get("prompt")
    ]


def by_prompt(pairs: list[Pair], rows: int, per_prompt: int) -> dict[str, list[Pair]]:
    """At most `rows` pairs, at most `per_prompt` of each prompt: the first ones, taken in turn from every prompt."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.prompt, []).append(pair)
    turns = (pair for turn in range(per_prompt) for group in groups.values() for pair in group[turn : turn + 1])
    kept: dict[str, list[Pair]] = {}
    for pair in islice(turns, rows):
        kept.setdefault(pair.prompt, []).append(pair)
    return kept


def _change(evaluations: dict[int, list[dict[str, Any]]]) -> Change:
    first, last = (mean(sample.get("reward") for sample in evaluations[of(evaluations)]) for of in (min, max))
    return Change(first, last)


def _told(change: Change) -> str:
    return " → ".join("-" if value is None else f"{value:.3f}" for value in change)


def _is_own(path: Path, notes: list[str]) -> bool:
    """Whether a file lies in its folder; a page that is passed on must not show what a link in it pointed to."""
    if path.resolve().is_relative_to(path.parent.resolve()):
        return True
    notes.append(f"{path.name} is a link to a file outside of the run's folder and is left out.")
    return False


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file that have a `round`; each line left out makes a note."""
    if not path.is_file():
        notes.append(f"{path.name} is missing: the run has not got that far, or was moved without it.")
        return []
    if not _is_own(path, notes):
        return []
    rows = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    found: list[dict[str, Any]] = []
    bad: list[int] = []
    for index, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get("round"), int) and number(line["round"]) is not None:
            found.append(line)
        else:
            bad.append(index)
    if bad and bad[-1] == len(rows):
        bad.pop()
        notes.append(
            f"The last line of {path.name} (line {len(rows)}) is cut off and is left out: "
            "the run was writing it, or was stopped."
        )
    if bad:
        named = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        notes.append(f"{path.name}: {len(bad)} unreadable lines are left out (line {named}).")
    return found


def _read_summary(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append("summary.json is missing: the run still goes on or was stopped. The numbers are those so far.")
        return {}
    if not _is_own(path, notes):
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        summary = None
    if not isinstance(summary, dict):
        notes.append("summary.json is not a JSON object. The numbers are those of metrics.jsonl and samples.jsonl.")
        return {}
    return summary
