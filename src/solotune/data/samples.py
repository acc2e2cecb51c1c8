"""The samples of a recipe, and their rewards: what SFT and ILQL learn from."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune.data.assets import FILM_SNIPPETS, PREFIX, resolve
from solotune.data.dialogues import checked_rewards
from solotune.data.film_snippets import read as read_film_snippets
from solotune.data.prompts import filled
from solotune.data.tables import read_rows
from solotune.errors import DataError

if TYPE_CHECKING:
    from solotune.config import DataConfig

log = logging.getLogger("solotune")

SAMPLE_COLUMNS = ("dialogue", "sample", "text")


def load_samples(data: DataConfig) -> tuple[list[Any], list[float] | None]:
    """Texts and dialogues, in a fixed order, and a reward each where the recipe names them.

    Raises:
        DataError: the source or a column is missing, a reward is no finite number, or no sample is left.
    """
    rows = _rows(data)
    samples = [_sample(row, index, data) for index, row in enumerate(rows)]
    rewards = None
    if data.rewards is not None:
        rewards = checked_rewards(data.rewards, len(samples))
    elif data.reward_column is not None:
        rewards = checked_rewards([_value(row, data.reward_column, i) for i, row in enumerate(rows)], len(samples))
    if data.least_reward is not None:
        assert rewards is not None
        kept = [index for index, reward in enumerate(rewards) if reward >= data.least_reward]
        if not kept:
            raise DataError(
                f"data.least_reward = {data.least_reward:g}: none of {len(rows)} samples has so much; the largest "
                f"{data.reward_column} is {max(rewards):g}"
            )
        log.info("%d of %d samples have a reward of at least %g", len(kept), len(rows), data.least_reward)
        samples, rewards = [samples[index] for index in kept], [rewards[index] for index in kept]
    return samples, rewards


def as_list(samples: Any) -> list[Any]:
    """What a script gives as samples, as a list.

    Raises:
        DataError: it is one text, or a table of which it is unclear what to learn.
    """
    if isinstance(samples, str | bytes | Mapping) or hasattr(samples, "columns") or not isinstance(samples, Iterable):
        raise DataError(
            f"samples= is a {type(samples).__name__}: it has to be a list of texts or dialogues [prompt, output, ...]"
        )
    return list(samples)


def _rows(data: DataConfig) -> list[Any]:
    source = data.samples
    assert source is not None
    if not isinstance(source, str):
        return list(source)
    if source == FILM_SNIPPETS:
        return [snippet._asdict() for snippet in read_film_snippets(Path(resolve(source)))]
    if source.startswith(PREFIX):
        raise DataError(f"{resolve(source)!r} is not a set of samples; {FILM_SNIPPETS!r} is")
    return list(read_rows(source, data.split))


def _sample(row: Any, index: int, data: DataConfig) -> Any:
    if not isinstance(row, dict):
        return row
    if data.output_column is not None:
        prompt = _value(row, data.prompt_column or "prompt", index)
        if data.prompt_template is not None:
            prompt = filled(data.prompt_template, row, index)
        return [prompt, _value(row, data.output_column, index)]
    column = data.sample_column or next((name for name in SAMPLE_COLUMNS if name in row), None)
    if column is None:
        raise DataError(
            f"sample {index} has the columns {sorted(row)}, none of which is {' or '.join(SAMPLE_COLUMNS)}; name the "
            "one to use in data.sample_column, or data.output_column beside data.prompt_column"
        )
    value = _value(row, column, index)
    if isinstance(value, str) and column == "dialogue" and value.startswith("["):  # a column of JSON, as in a CSV file
        try:
            return json.loads(value)
        except ValueError as error:
            raise DataError(f"sample {index}, column {column!r}: begins with '[' but is not JSON ({error})") from error
    return value


def _value(row: Any, column: str, index: int) -> Any:
    if not isinstance(row, dict) or column not in row:
        known = sorted(row) if isinstance(row, dict) else "no columns"
        raise DataError(f"sample {index} has no column {column!r}: it has {known}")
    return row[column]
