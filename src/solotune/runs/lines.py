"""Files of JSON lines, which a reader may open while they are written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from solotune.errors import RunFileError
from solotune.runs.files import named


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON line a row, all of them or none. Numbers that are not finite become null: JSON has no NaN.

    Raises:
        RunFileError: the disk is full, or the like.
    """
    content = as_lines(rows).encode()
    with named(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            written = 0
            while written < len(content):
                written += file.write(content[written:])
            os.fsync(file.fileno())  # on the disk before the checkpoint that counts on it
        except OSError:
            file.truncate(before)
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that a crash cut short is left out.

    Raises:
        RunFileError: it cannot be read, or another line is no object.
    """
    try:
        *lines, last = path.read_bytes().split(b"\n")  # bytes: the cut may lie inside a character
    except OSError as error:
        raise RunFileError(f"{str(path)!r} could not be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if (row := _row(line)) is None:
            raise not_a_runs(path, number, line)
        rows.append(row)
    cut = _row(last)
    return rows if cut is None else [*rows, cut]


def as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(finite(dict(row)), ensure_ascii=False) + "\n" for row in rows)


def finite(value: Any) -> Any:
    """`value` with null in place of every number in it that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value


def not_a_runs(path: Path, number: int, line: object) -> RunFileError:
    """The error for a line that no run writes."""
    said = str(line)[:80]
    return RunFileError(f"{str(path)!r}, line {number} is not what a run writes: {said!r}; remove it, or move the file")


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
