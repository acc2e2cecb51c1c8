"""Human feedback to learn a reward model from: rated texts, and pairs of a chosen and a rejected text."""

import logging
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from solotune.config.values import is_unicode
from solotune.data.assets import FILM_SNIPPETS, PREFIX, resolve
from solotune.data.film_snippets import read as read_film_snippets
from solotune.data.tables import read_rows
from solotune.errors import DataError

logger = logging.getLogger(__name__)


class Ratings(NamedTuple):
    """N texts and their N ratings, finite and within the range that was asked for."""

    texts: list[str]
    ratings: list[float]

    def groups(self) -> list[str]:
        """What must not be on both sides of a split: texts that differ in case, spacing or punctuation alone."""
        return [_normalised(text) for text in self.texts]


class Pairs(NamedTuple):
    """N pairs of whole texts, prompt included; `prompts` is what the two share and what splits go by."""

    chosen: list[str]
    rejected: list[str]
    prompts: list[str]

    def groups(self) -> list[str]:
        """The prompt, or the chosen text where the two share no beginning."""
        return [_normalised(p) or _normalised(c) for p, c in zip(self.prompts, self.chosen, strict=True)]


class Split(NamedTuple):
    """Indices of the training rows and of the held-out rows, each in ascending order."""

    train: list[int]
    heldout: list[int]


def load_feedback(
    source: str,
    objective: Literal["ratings", "pairs"],
    *,
    text_column: str,
    rating_column: str,
    low: float,
    high: float,
    chosen_column: str,
    rejected_column: str,
) -> Ratings | Pairs:
    """What `objective` learns from: ratings, or pairs; where a source has ratings only, these, to make pairs of.

    Raises:
        DataError: as `as_ratings` and `as_pairs`.
    """
    rows = _rows(source)
    if objective == "pairs" and ({chosen_column, rejected_column} & set(rows[0]) or rating_column not in rows[0]):
        return as_pairs(rows, source, chosen_column, rejected_column)
    return as_ratings(rows, source, text_column, rating_column, low, high)


def as_ratings(
    rows: list[dict[str, Any]], source: str, text_column: str, rating_column: str, low: float, high: float
) -> Ratings:
    """Rated texts from the rows of `source`, which messages name.

    The film snippets have the columns `text`, `rating` (mean, -4 .. 4) and `positive_share` (of the raters, 0 .. 1).

    Raises:
        DataError: a column is missing, a text is empty, or a rating is not a number in [low, high].
    """
    _require(rows, source, (text_column, rating_column))
    texts, ratings = [], []
    for index, row in enumerate(rows):
        text, rating = _text(row, text_column, index, source), row[rating_column]
        try:
            value = float(rating)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if isinstance(rating, bool) or not low <= value <= high:
            raise DataError(
                f"{source!r}, row {index}: the rating in column {rating_column!r} is {repr(rating)[:80]}, expected a "
                f"number from {low:g} to {high:g} (`rating_min` and `rating_max` of the reward training)"
            )
        texts.append(text)
        ratings.append(value)
    return Ratings(texts, ratings)


def as_pairs(rows: list[dict[str, Any]], source: str, chosen_column: str, rejected_column: str) -> Pairs:
    """Preference pairs from the rows of `source`, which messages name.

    With a column `prompt`, it is put before both answers unless they begin with it already. Without one, the two are
    whole texts (dialogues as in HH-RLHF), and their common beginning is the prompt.

    Rows whose two texts are the same say nothing and are left out, with one log line.

    Raises:
        DataError: a column is missing, a text is empty, or the two texts of every pair are the same.
    """
    _require(rows, source, (chosen_column, rejected_column))
    pairs = Pairs([], [], [])
    same: list[int] = []
    for index, row in enumerate(rows):
        chosen, rejected = (_text(row, column, index, source) for column in (chosen_column, rejected_column))
        prompt = row.get("prompt") or ""
        if not isinstance(prompt, str) or not is_unicode(prompt):
            raise DataError(
                f"{source!r}, row {index}: `prompt` is {str(prompt)[:80]!r} ({type(prompt).__name__}), expected a text"
            )
        if prompt and not (chosen.startswith(prompt) and rejected.startswith(prompt)):
            chosen, rejected = prompt + chosen, prompt + rejected
        if chosen == rejected:
            same.append(index)
            continue
        pairs.chosen.append(chosen)
        pairs.rejected.append(rejected)
        pairs.prompts.append(prompt or _shared_turns(chosen, rejected))
    if same and not pairs.chosen:
        raise DataError(f"{source!r}: the chosen and the rejected text are the same in every row")
    if same:
        logger.info(
            "%d rows left out: their chosen and rejected texts are the same; the first is row %d", len(same), same[0]
        )
    return pairs


def split(groups: Sequence[str], holdout: int, seed: int) -> Split:
    """Hold out `holdout` rows, drawn by `seed`; rows of one group are never on both sides.

    Raises:
        DataError: fewer than two rows would be left to train on, or the groups do not add up to `holdout` rows.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    order = list(members)
    random.Random(seed).shuffle(order)
    heldout: list[int] = []
    for group in order:
        if len(heldout) + len(members[group]) <= holdout:
            heldout += members[group]
        if len(heldout) == holdout:
            break
    train = sorted(set(range(len(groups))) - set(heldout))
    if len(heldout) != holdout or len(train) < 2:
        raise DataError(
            f"cannot hold out {holdout} of {len(groups)} rows ({len(members)} distinct ones) and keep two to train on; "
            "lower `holdout` of the reward training"
        )
    return Split(train, sorted(heldout))


def _rows(source: str) -> list[dict[str, Any]]:
    if source == FILM_SNIPPETS:
        rows: list[Any] = [snippet._asdict() for snippet in read_film_snippets(Path(resolve(source)))]
    elif source.startswith(PREFIX):
        raise DataError(f"{resolve(source)!r} holds no human feedback; {FILM_SNIPPETS!r} does")
    else:
        rows = read_rows(source)
    if not rows:
        raise DataError(f"{source!r} has no rows")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{source!r}, row {index} has no columns, it is a bare text: {row[:80]!r}")
    return rows


def _require(rows: list[dict[str, Any]], source: str, columns: tuple[str, ...]) -> None:
    for index, row in enumerate(rows):
        if missing := [column for column in columns if column not in row]:
            raise DataError(
                f"{source!r}, row {index} has no column {' or '.join(map(repr, missing))}; "
                f"it has {', '.join(map(str, row))[:400]}"
            )


def _text(row: dict[str, Any], column: str, index: int, source: str) -> str:
    text = row[column]
    if not isinstance(text, str) or not text.strip() or not is_unicode(text):
        raise DataError(
            f"{source!r}, row {index}: column {column!r} is {str(text)[:80]!r} ({type(text).__name__}), "
            "expected a text that is not empty and all Unicode"
        )
    return text


def _normalised(text: str) -> str:
    return re.sub(r"\W+", " ", text.casefold()).strip()


def _shared_turns(chosen: str, rejected: str) -> str:
    """The beginning that two dialogues share, up to the last line break in it; empty for texts without one."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[: chosen.rfind("\n", 0, shared) + 1]
