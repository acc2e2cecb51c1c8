"""What a sweep found: a table in the terminal, sweep.json, sweep.csv and sweep.png in its folder."""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table
from rich.text import Text

from solotune.cleaning import one_line
from solotune.runs.console import console
from solotune.sweep.job import Sweep
from solotune.sweep.space import Parameter, Plan
from solotune.sweep.trial import as_overrides

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS_IN_A_ROW = 3


class Row(NamedTuple):
    """One trial that has finished.

    Args:
        trial: its place in the sweep, from 0.
        state: complete, pruned or fail.
        value: the metric as last reported; None where the trial failed.
        seconds: wall time.
        settings: by dotted name.
        folder: below the sweep's.
        error: why it failed.
    """

    trial: int
    state: str
    value: float | None
    seconds: float
    settings: dict[str, Any]
    folder: str
    error: str


def best_row(rows: list[Row], plan: Plan) -> Row | None:
    """The complete trial with the best metric, the first of equals; None where none is complete."""
    done = [row for row in rows if row.state == "complete" and row.value is not None]
    return (max if plan.tune.mode == "max" else min)(done, key=_value, default=None)


def _value(row: Row) -> float:
    assert row.value is not None
    return row.value


def described(settings: Mapping[str, Any]) -> str:
    """Settings in one line, numbers to four digits."""
    return ", ".join(f"{name} = {_short(value)}" for name, value in settings.items())


def write(rows: list[Row], sweep: Sweep) -> None:
    """sweep.json and sweep.csv: every trial that has finished, with its settings, its metric and its error."""
    plan, best = sweep.plan, best_row(rows, sweep.plan)
    content = {
        "metric": plan.tune.metric,
        "mode": plan.tune.mode,
        "best": best._asdict() if best is not None else None,
        "trials": [row._asdict() for row in rows],
    }
    (sweep.folder / "sweep.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    names = [parameter.name for parameter in plan.parameters]
    with (sweep.folder / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["trial", "state", plan.tune.metric, "seconds", *names, "folder", "error"])
        for row in rows:
            settings = [row.settings.get(name) for name in names]
            table.writerow([row.trial, row.state, row.value, row.seconds, *settings, row.folder, row.error])


def show(rows: list[Row], sweep: Sweep) -> None:
    """Print the table and the best settings as a command, and draw the plot."""
    if not rows:
        return
    best = best_row(rows, sweep.plan)
    console.print(_table(rows, sweep.plan, best))
    if best is None:
        return
    plot(rows, sweep.plan, sweep.folder / "sweep.png")
    settings = {**sweep.fixed, **best.settings}
    words = " ".join(f"--set {shlex.quote(override)}" for override in as_overrides(settings))
    lines = [f"best: trial {best.trial}, {sweep.plan.tune.metric} {best.value:.4g}; see {sweep.folder / 'sweep.png'}"]
    if sweep.target.suffix == ".py":
        lines.append(f"  solotune trlx {sweep.target} {shlex.quote(json.dumps(settings, ensure_ascii=False))}")
        lines.append(f"  behind `solotune train RECIPE`: {words}")
    else:
        lines.append(f"  solotune train {sweep.target} {words}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(rows: list[Row], plan: Plan, best: Row | None) -> Table:
    table = Table(title=f"{plan.tune.mode} {plan.tune.metric}, {len(rows)} trials")
    table.add_column("trial", justify="right")
    for parameter in plan.parameters:
        table.add_column(parameter.name, justify="right", overflow="fold")
    table.add_column(plan.tune.metric, justify="right", overflow="fold")
    table.add_column("seconds", justify="right")
    table.add_column("state", overflow="fold")
    for row in rows:
        state = {"complete": "best" if row is best else "", "pruned": "stopped", "fail": f"failed: {row.error}"}
        cells = [
            str(row.trial),
            *(_short(row.settings.get(parameter.name)) for parameter in plan.parameters),
            "-" if row.value is None else f"{row.value:.4g}",
            f"{row.seconds:.1f}",
            state[row.state],
        ]
        table.add_row(*(Text(one_line(cell)) for cell in cells), style="bold" if row is best else None)
    return table


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- the plot -----------------------------------------------------------------------------------------------------


def plot(rows: list[Row], plan: Plan, path: Path) -> None:
    """The metric by trial with the best so far, and below it the metric over each parameter.

    Trials that were stopped are drawn hollow; those that failed have no value.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from solotune.report.curves import STYLE

    drawn = [row for row in rows if row.value is not None and math.isfinite(row.value)]
    n_rows = math.ceil(len(plan.parameters) / PANELS_IN_A_ROW)
    columns = min(len(plan.parameters), PANELS_IN_A_ROW)
    style: dict[Any, Any] = STYLE | {"grid.color": "#e5e7eb", "axes.edgecolor": "#9ca3af"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 3 + 2.4 * n_rows), dpi=120, layout="constrained")
        grid = figure.add_gridspec(1 + n_rows, columns)
        _by_trial(figure.add_subplot(grid[0, :]), drawn, plan)
        for place, parameter in enumerate(plan.parameters):
            axes = figure.add_subplot(grid[1 + place // PANELS_IN_A_ROW, place % PANELS_IN_A_ROW])
            _over_parameter(axes, drawn, parameter)
        figure.savefig(path, format="png", metadata={"Software": None})


def _by_trial(axes: Axes, rows: list[Row], plan: Plan) -> None:
    from matplotlib.ticker import MaxNLocator

    _points(axes, rows, [float(row.trial) for row in rows])
    done = [row for row in rows if row.state == "complete"]
    best_so_far = [_value(best) for stop in range(len(done)) if (best := best_row(done[: stop + 1], plan)) is not None]
    axes.step([row.trial for row in done], best_so_far, where="post", color="#d55e00", label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(_drawable(plan.tune.metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best")


def _over_parameter(axes: Axes, rows: list[Row], parameter: Parameter) -> None:
    if parameter.is_listed:
        labels = [_drawable(_short(value))[:20] for value in parameter.values]
        _points(axes, rows, [float(parameter.values.index(row.settings[parameter.name])) for row in rows])
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    else:
        _points(axes, rows, [float(row.settings[parameter.name]) for row in rows])
        axes.set_xscale("log" if parameter.is_log else "linear")
    axes.set_title(_drawable(parameter.name), loc="left", fontsize=10)


def _points(axes: Axes, rows: list[Row], x: list[float]) -> None:
    fills = ["#0072b2" if row.state == "complete" else "none" for row in rows]
    axes.scatter(x, [_value(row) for row in rows], s=28, facecolors=fills, edgecolors="#0072b2", zorder=3)


def _drawable(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return one_line(text).replace("$", r"\$")
