"""report.html: one self-contained page of a run, a function of the run folder alone.

    solotune report runs/quickstart

It opens offline, needs no JavaScript and forbids it: a Content-Security-Policy stands behind the escaping.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from solotune.cleaning import visible
from solotune.models.tree import format_bytes
from solotune.report import curves
from solotune.report.reading import Pair, Run, by_prompt, mean, number, pair_up, read_run
from solotune.runs.files import write_whole

MOST_ROWS = 128
ROWS_PER_PROMPT = 4
TABLE_CHARACTERS = 100_000  # what the page's outputs may add up to; a long one is shortened, and says so
PHASES = ("sample", "score", "measure", "credit", "update", "evaluate")


class Headline(NamedTuple):
    name: str
    value: str
    remark: str = ""


class Phase(NamedTuple):
    name: str
    seconds: str
    share: float  # of all phases, in per cent


class Figure(NamedTuple):
    title: str
    svg: Markup
    caption: str


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html from the run's files and returns its path.

    What is missing (no evaluation yet, no summary because the run still goes on, a line cut off) is said on the page.

    Raises:
        DataError: `run_dir` is not a run folder.
        RunFileError: the page cannot be written; an earlier one stays.
    """
    run = read_run(run_dir)
    environment = Environment(
        loader=PackageLoader("solotune.report", "."),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pairs, notes = _pairs(run)
    shown = by_prompt(pairs, MOST_ROWS, ROWS_PER_PROMPT)
    page = environment.get_template("page.html.j2").render(
        name=run.name,
        subtitle=_subtitle(run.summary),
        notes=[*run.notes, *notes],
        headlines=_headlines(run),
        figures=_figures(run),
        phases=_phases(run),
        is_finished="seconds_by_phase" in run.summary,
        shown=shown,
        shown_rows=sum(len(group) for group in shown.values()),
        pairs=len(pairs),
        is_compared=bool(run.after),
        first_round=min(run.evaluations, default=None),
        last_round=max(run.evaluations, default=None),
        shorten=_shortener(shown),
        reward=_reward,
        tree=str(run.summary.get("parameter_tree") or ""),
        config=run.config,
    )
    path = Path(run_dir) / "report.html"
    write_whole(path, page)
    return path


def _subtitle(summary: dict[str, Any]) -> str:
    parts = [str(summary["model"])] if "model" in summary else []
    parts += [f"seed {summary['seed']}"] if "seed" in summary else []
    return ", ".join(parts)


def _headlines(run: Run) -> list[Headline]:
    """The summary's numbers; where it has none, those of the metrics and samples so far."""
    summary = run.summary

    def known(key: str, so_far: float | None) -> float | None:
        value = number(summary.get(key))
        return so_far if value is None else value

    before, after = (mean(s.get("reward") for s in samples) for samples in (run.before, run.after))
    kl = mean(s.get("kl") for s in run.after)
    if not run.sweep:  # of one, the summary's are those of its first setting
        before, after, kl = known("reward_before", before), known("reward_after", after), known("kl", kl)
    rounds = known("rounds", max((float(line["round"]) for line in run.metrics), default=None))
    steps = known("steps", max(run.series("step")[1], default=None))
    seconds = known("wall_seconds", sum(run.series("time/round")[1]) or None)
    memory = known("peak_memory_bytes", max(run.series("memory/peak_bytes")[1], default=None))
    what = "Learning" if run.series("policy/tokens_per_second")[0] else "Sampling"
    family = "policy" if what == "Learning" else "rollout"
    speed = known("tokens_per_second", mean(run.series(f"{family}/tokens_per_second")[1]))
    trainable, total = number(summary.get("trainable_parameters")), number(summary.get("total_parameters"))

    lines: list[Headline] = []
    if before is not None and after is not None:
        lines.append(Headline("Reward", f"{before:.3f} → {after:.3f}", f"{after - before:+.3f}, evaluation samples"))
    elif before is not None:
        lines.append(Headline("Reward", f"{before:.3f}", "one evaluation so far"))
    losses = run.series("objective/loss")[1]
    if losses:
        lines.append(Headline("Loss", f"{losses[0]:.3f} → {losses[-1]:.3f}", "first and last round"))
    if kl is not None:
        lines.append(Headline("KL", f"{kl:.2f}", "nats per response"))
    if rounds is not None:
        lines.append(Headline("Rounds", f"{rounds:,.0f}", f"{steps:,.0f} optimizer steps" if steps is not None else ""))
    if seconds is not None:
        lines.append(Headline("Time", _duration(seconds), "" if "wall_seconds" in summary else "in rounds, so far"))
    if memory is not None:
        lines.append(Headline("Peak memory", format_bytes(memory)))
    if speed is not None:
        lines.append(Headline(what, f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}", "tokens per second"))
    if trainable is not None and total:
        remark = f"{trainable:,.0f} of {total:,.0f} parameters"
        lines.append(Headline("Trainable", f"{100 * trainable / total:.3g} %", remark))
    return lines


def _figures(run: Run) -> list[Figure]:
    drawn = [
        ("Reward", curves.reward_svg(run), "Mean score of each round, mean reward of each evaluation."),
        ("KL to the reference", curves.kl_svg(run), "How far the policy has moved from where it started."),
    ]
    if not run.series("objective/score")[0]:
        drawn.append(("Loss", curves.losses_svg(run), "Mean over the optimizer steps of each round."))
    drawn += [
        (
            "Rewards of the evaluation samples",
            curves.histogram_svg(run),
            "First and last evaluation, in the same bins.",
        ),
        ("Peak memory", curves.memory_svg(run), "Highest use of memory in each round."),
    ]
    # Drawn by matplotlib, which escapes its texts; the label is escaped in curves.py.
    return [Figure(title, Markup(svg), caption) for title, svg, caption in drawn if svg]


def _phases(run: Run) -> list[Phase]:
    """Seconds by phase from the summary, or the sum over the rounds so far; the phases of a round come first."""
    seconds = run.summary.get("seconds_by_phase")
    if not isinstance(seconds, dict):
        seconds = {name: sum(run.series(f"time/{name}")[1]) for name in PHASES}
    order = [*(name for name in PHASES if name in seconds), *(name for name in seconds if name not in PHASES)]
    kept = [(str(name).replace("_", " "), value) for name in order if (value := number(seconds[name])) and value > 0]
    total = sum(value for _, value in kept)
    return [Phase(name, _duration(value), 100 * value / total) for name, value in kept]


def _pairs(run: Run) -> tuple[list[Pair], list[str]]:
    """The before/after pairs, and what the reader has to know about those that are not there."""
    if not run.evaluations:
        return [], ["No evaluation was written: there is nothing to compare."]
    if not run.after:
        return pair_up(run.before, run.before), [
            "There is one evaluation so far: outputs are shown without an 'after'."
        ]
    pairs = pair_up(run.before, run.after)
    if not len(run.before) == len(run.after) == len(pairs):
        return pairs, [
            f"The first evaluation has {len(run.before)} samples and the last {len(run.after)}; "
            f"{len(pairs)} have the same prompt at the same place and are compared."
        ]
    return pairs, []


def _shortener(shown: dict[str, list[Pair]]) -> Callable[[str], str]:
    """Cuts a text to its share of TABLE_CHARACTERS and says how much is gone; blanks around it are not shown."""
    rows = sum(len(group) for group in shown.values())
    limit = TABLE_CHARACTERS // max(1, 2 * rows + len(shown))

    def shorten(text: str) -> str:
        text = text.strip()
        if len(text) <= limit:
            return text or "(no text)"
        return f"{text[:limit]} … ({len(text) - limit:,} more characters in samples.jsonl)"

    return shorten


def _reward(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
