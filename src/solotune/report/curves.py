"""The curves of a run: SVG for the page (its colours are CSS variables), PNG for a README."""

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from solotune.cleaning import one_line
from solotune.errors import DataError
from solotune.models.tree import format_bytes
from solotune.report.reading import Run, number, read_run

# Drawn in these colours, then replaced by the page's: matplotlib knows no CSS variables.
INK, GRID, FIRST, SECOND = "#010203", "#040506", "#070809", "#0a0b0c"
VARIABLES = {INK: "var(--muted)", GRID: "var(--line)", FIRST: "var(--first)", SECOND: "var(--second)"}
# Okabe and Ito's palette: told apart with every kind of colour vision.
SEED_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MOST_POINTS = 400
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
    "axes.formatter.use_mathtext": False,
}


def reward_svg(run: Run) -> str:
    """Training score of every round with a band of one standard deviation, and the evaluations' mean rewards."""
    rounds, scores = run.series("objective/score")
    deviations = dict(zip(*run.series("objective/score_std"), strict=True))
    eval_rounds, rewards = run.evaluation_means("reward")
    if not rounds and not eval_rounds:
        return ""

    def draw(axes: Axes) -> None:
        x, y, low, high = _thin(
            rounds,
            scores,
            [s - deviations.get(r, 0.0) for r, s in zip(rounds, scores, strict=True)],
            [s + deviations.get(r, 0.0) for r, s in zip(rounds, scores, strict=True)],
        )
        if deviations:
            axes.fill_between(x, low, high, color=FIRST, alpha=0.14, linewidth=0)
        if rounds:
            axes.plot(x, y, color=FIRST, linewidth=1.8, label="training score, ± std", marker=_dot(x))
        if eval_rounds:
            axes.plot(
                eval_rounds, rewards, color=SECOND, marker="D", markersize=5, linewidth=1.4, label="evaluation reward"
            )
        axes.set_ylabel("reward")

    spoken = [_spoken("Training score", rounds, scores), _spoken("Evaluation reward", eval_rounds, rewards)]
    return _svg("reward", draw, spoken)


def kl_svg(run: Run) -> str:
    """KL to the reference in nats per response: of the training rollouts, and of the evaluation samples."""
    rounds, kls = run.series("objective/kl")
    eval_rounds, eval_kls = run.evaluation_means("kl")
    if not rounds and not eval_rounds:
        return ""

    def draw(axes: Axes) -> None:
        if rounds:
            x, y = _thin(rounds, kls)
            axes.plot(x, y, color=FIRST, linewidth=1.8, label="training", marker=_dot(x))
        if eval_rounds:
            axes.plot(eval_rounds, eval_kls, color=SECOND, marker="D", markersize=5, linewidth=1.4, label="evaluation")
        axes.set_ylabel("nats per response")

    return _svg("kl", draw, [_spoken("Training KL", rounds, kls), _spoken("Evaluation KL", eval_rounds, eval_kls)])


def losses_svg(run: Run) -> str:
    """Every metric called `.../loss`: the curve of methods that sample nothing to learn from. At most two."""
    keys = sorted({key for line in run.metrics for key in line if key.endswith("/loss")})
    curves = [(key, *run.series(key)) for key in keys]
    curves = [curve for curve in curves if curve[1]][:2]
    if not curves:
        return ""

    def draw(axes: Axes) -> None:
        for (key, rounds, losses), colour, dashes in zip(curves, (FIRST, SECOND), ("-", "--"), strict=False):
            x, y = _thin(rounds, losses)
            axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.8, label=_label(key), marker=_dot(x))
        axes.set_ylabel("loss")

    return _svg("losses", draw, [_spoken(key, rounds, losses) for key, rounds, losses in curves])


def memory_svg(run: Run) -> str:
    """Peak memory of each round."""
    rounds, peaks = run.series("memory/peak_bytes")
    if not rounds:
        return ""

    size, unit = (1e9, "GB") if max(peaks) >= 1e9 else (1e6, "MB")

    def draw(axes: Axes) -> None:
        x, y = _thin(rounds, [peak / size for peak in peaks])
        axes.fill_between(x, 0, y, color=FIRST, alpha=0.14, linewidth=0)
        axes.plot(x, y, color=FIRST, linewidth=1.8, marker=_dot(x))
        axes.set_ylim(0, max(peaks) / size * 1.15 or 1)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_ylabel(unit)

    return _svg("memory", draw, [f"Peak memory by round, at most {format_bytes(max(peaks))}."])


def histogram_svg(run: Run) -> str:
    """Rewards of the evaluation samples, before and after training, in the same 20 bins."""
    before, after = (
        np.array([kept for s in samples if (kept := number(s.get("reward"))) is not None])
        for samples in (run.before, run.after)
    )
    if not before.size and not after.size:
        return ""
    edges = np.histogram_bin_edges(np.concatenate([before, after]), bins=20)
    sides = [("before", before, SECOND, "--"), ("after", after, FIRST, "-")]
    sides = [side for side in sides if side[1].size]

    def draw(axes: Axes) -> None:
        for label, rewards, colour, dashes in sides:
            counts, _ = np.histogram(rewards, edges)
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.16)
            axes.stairs(counts, edges, color=colour, linewidth=1.6, linestyle=dashes, label=label)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.set_xlabel("reward")
        axes.set_ylabel("samples")

    spoken = [
        f"{len(r)} samples {label}, mean reward {r.mean():.3f}, median {np.median(r):.3f}." for label, r, *_ in sides
    ]
    return _svg("histogram", draw, spoken, by_round=False)


def write_curve_png(run_dirs: Sequence[Path], path: Path) -> Path:
    """Draws reward (evaluation and training score) and KL over rounds, one colour a run, to a PNG.

    Args:
        run_dirs: run folders, for example one a seed; the legend names each by its seed, or by its folder.
        path: the file to write.
    Raises:
        DataError: no run folder was given, or one is not a run folder.
    """
    if not run_dirs:
        raise DataError("No run folders to draw; give at least one, for example [Path('runs/quickstart')].")
    runs = [read_run(Path(run_dir)) for run_dir in run_dirs]
    style: dict[Any, Any] = STYLE | {"grid.color": "#e5e7eb", "axes.edgecolor": "#9ca3af"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 3.6), dpi=160, layout="constrained")
        reward_axes, kl_axes = figure.subplots(1, 2)
        for index, run in enumerate(runs):
            colour = SEED_COLOURS[index % len(SEED_COLOURS)]
            name = f"seed {run.summary['seed']}" if "seed" in run.summary else run.name
            for axes, metric, sampled in ((reward_axes, "objective/score", "reward"), (kl_axes, "objective/kl", "kl")):
                x, y = _thin(*run.series(metric))
                axes.plot(x, y, color=colour, linewidth=1.2, alpha=0.55)
                axes.plot(*run.evaluation_means(sampled), color=colour, marker="D", markersize=5, linewidth=1.8)
            reward_axes.plot([], [], color=colour, linewidth=1.8, label=_label(name))
        reward_axes.plot([], [], color="#6b7280", marker="D", markersize=5, linewidth=1.8, label="evaluation")
        reward_axes.plot([], [], color="#6b7280", linewidth=1.2, alpha=0.55, label="training rollouts")
        reward_axes.legend(loc="best")
        reward_axes.set_title("Reward", loc="left")
        kl_axes.set_title("KL to the reference, nats per response", loc="left")
        for axes in (reward_axes, kl_axes):
            axes.set_xlabel("round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.savefig(path, format="png", metadata={"Software": None})
    return Path(path)


def _svg(name: str, draw: Callable[[Axes], None], spoken: list[str], by_round: bool = True) -> str:
    """One inline SVG: scales with its column, follows the page's colours, says in words what it shows.

    Deterministic (hashsalt, no date); ids carry `name`, so that several SVGs share a page.
    """
    ink = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "xtick.labelcolor", "ytick.labelcolor")
    style: dict[Any, Any] = STYLE | dict.fromkeys(ink, INK) | {"axes.edgecolor": GRID, "grid.color": GRID}
    style |= {"svg.fonttype": "none", "svg.hashsalt": f"solotune-{name}"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 3.0), layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        axes.tick_params(length=0)
        draw(axes)
        if by_round:
            axes.set_xlabel("round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[0]:
            # Above the plot, never on a curve.
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, labelcolor=INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", svg, flags=re.DOTALL)  # a <style> would reach the whole page
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)  # the page's font
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    label = escape(one_line(" ".join(filter(None, spoken))))
    viewbox = re.search(r'viewBox="[^"]*"', svg)
    assert viewbox, "matplotlib's SVG has a viewBox"
    return f'<svg {viewbox[0]} role="img" aria-label="{label}">{svg[svg.index(">") + 1 :]}'


def _thin(x: Sequence[float], *ys: Sequence[float]) -> list[np.ndarray]:
    """Long curves become the means of at most MOST_POINTS runs of neighbouring rounds: the page stays small."""
    parts = min(len(x), MOST_POINTS)
    if parts == 0:
        return [np.array([]) for _ in (x, *ys)]
    return [np.array([part.mean() for part in np.array_split(np.asarray(values), parts)]) for values in (x, *ys)]


def _dot(x: np.ndarray) -> str:
    """A single point has no line to be seen by."""
    return "o" if len(x) == 1 else ""


def _label(text: object) -> str:
    """A short legend entry that matplotlib can draw, does not hide (a leading underscore), nor read as mathematics."""
    return one_line(text)[:40].replace("$", r"\$").lstrip("_")


def _spoken(what: str, rounds: list[float], values: list[float]) -> str:
    if not rounds:
        return ""
    first, last = f"{values[0]:.3f} in round {rounds[0]:.0f}", f"{values[-1]:.3f} in round {rounds[-1]:.0f}"
    return f"{what}: {first}, {last}." if len(rounds) > 1 else f"{what}: {first}."
