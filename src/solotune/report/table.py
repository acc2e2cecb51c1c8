"""The before/after table in the terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text

from solotune.cleaning import one_line
from solotune.errors import DataError
from solotune.report.reading import by_prompt, mean, pair_up


def before_after_table(before: list[dict[str, Any]], after: list[dict[str, Any]], rows: int) -> Table:
    """The first samples of every prompt, in turn until `rows` are shown, nothing selected by reward.

    Args:
        before, after: records of samples.jsonl (`prompt`, `output`, `reward`), the same prompts in the same order.
        rows: the most rows to show, at least 1.
    Raises:
        DataError: the two lists do not match, or `rows` is below 1.
    """
    if rows < 1:
        raise DataError(f"The before/after table needs at least 1 row, not {rows}.")
    pairs = pair_up(before, after)
    if not len(before) == len(after) == len(pairs):
        raise DataError(
            f"{len(before)} samples before and {len(after)} after training, {len(pairs)} with the same prompt at the "
            "same place: both evaluations have to sample the same prompts in the same order."
        )
    shown = [pair for group in by_prompt(pairs, rows, per_prompt=rows).values() for pair in group]
    means = [mean(r.get("reward") for r in rows_of) for rows_of in (before, after)]
    rewards = "" if means == [None, None] else f"Mean reward {_number(means[0])} before, {_number(means[1])} after "
    table = Table(
        title=f"{rewards}({len(pairs)} samples)",
        caption=f"{len(shown)} of {len(pairs)} samples, the first of every prompt",
        show_lines=True,
        expand=True,
    )
    table.add_column("Prompt", overflow="fold", ratio=2)
    table.add_column("Before", overflow="fold", ratio=4)
    table.add_column("Reward", justify="right", no_wrap=True)
    table.add_column("After", overflow="fold", ratio=4)
    table.add_column("Reward", justify="right", no_wrap=True)
    for pair in shown:  # Text, not str: a str would be read as markup
        table.add_row(
            Text(one_line(pair.prompt)),
            Text(one_line(pair.before)),
            Text(_number(pair.reward_before)),
            Text(one_line(pair.after)),
            Text(_number(pair.reward_after)),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
