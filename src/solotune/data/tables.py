"""Rows from a file or a dataset: what prompts, ratings and preference pairs are read with."""

import gzip
import json
from pathlib import Path
from typing import Any

from solotune.errors import DataError
from solotune.progress import phase_progress
from solotune.quiet import quiet_datasets

Row = str | dict[str, Any]

ENCODING = "utf-8-sig"  # a mark of byte order at the beginning is no text
_SUFFIXES = (".txt", ".json", ".jsonl", ".jsonl.gz", ".csv", ".parquet")


def read_rows(source: str, split: str = "train") -> list[Row]:
    """The rows of `source`, in its order.

    Args:
        source: a file (.txt: a row a line, blank lines skipped; .json: a list; .jsonl, also .gz; .csv; .parquet), or
            the name or folder of a dataset for `datasets.load_dataset`.
        split: which split of a dataset; a file has one only.
    Raises:
        DataError: the source does not exist or is not of that form.
    """
    try:
        path = Path(source).expanduser()
        path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, ~ of nobody
        raise DataError(f"{source[:200]!r} is no file's name: {error}") from error
    if path.name.lower().endswith(_SUFFIXES):
        if not path.is_file():
            raise DataError(f"there is no file {source!r} (looked in {path.absolute().parent})")
        try:
            return _read_file(path)
        except Exception as error:  # json, gzip and pyarrow raise a dozen classes; each means the same here
            reason = str(error)[:1000] or type(error).__name__
            raise DataError(f"{source!r} cannot be read as a {path.suffix} file: {reason}") from error
    if path.is_file():
        raise DataError(f"{source!r} is a file of an unknown kind; the kinds are {', '.join(_SUFFIXES)}")
    return _read_dataset(source, split)


def _read_file(path: Path) -> list[Row]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return [line for line in path.read_text(encoding=ENCODING).splitlines() if line.strip()]
    if suffix in (".jsonl", ".gz"):
        with (gzip.open if suffix == ".gz" else open)(path, "rt", encoding=ENCODING) as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
    elif suffix == ".json":
        rows = json.loads(path.read_text(encoding=ENCODING))
        if not isinstance(rows, list):
            raise ValueError(f"expected a list of texts or of objects, got {type(rows).__name__}")
    elif suffix == ".csv":
        from pyarrow import csv

        rows = csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True)).to_pylist()
    else:
        from pyarrow import parquet

        rows = parquet.read_table(path).to_pylist()
    for index, row in enumerate(rows):
        if not isinstance(row, str | dict):
            raise ValueError(f"row {index} is a {type(row).__name__}, expected a text or an object: {str(row)[:80]!r}")
    return rows


def _read_dataset(name: str, split: str) -> list[Row]:
    import datasets

    try:
        with quiet_datasets(), phase_progress(f"loading the data set {name}"):
            dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen classes; each has one meaning for the caller
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name!r} is neither a file ({', '.join(_SUFFIXES)}) that exists nor a dataset that "
            f"datasets.load_dataset can load with split={split!r}: {reason}"
        ) from error
    assert isinstance(dataset, datasets.Dataset)
    return dataset.to_list()
