"""Prompts, ratings and pairs from files of every kind of nonsense: used, or refused with an error of our own."""

import gzip
import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solotune.config import DataConfig
from solotune.data.prompts import Prompts, encode, load_eval_prompts, load_prompts
from solotune.data.ratings import load_feedback
from tests.reliability import hostile
from tests.reliability.hostile import examples, refused_or
from tests.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
COLUMNS = ["prompt", "text", "query", "rating", "chosen", "rejected", "label", "samples", "", "a b"]
CELLS = st.one_of(
    hostile.TEXTS,
    hostile.TEXTS,
    hostile.NUMBERS,
    st.none(),
    st.lists(hostile.TEXTS, max_size=2),
    st.dictionaries(hostile.TEXTS, hostile.TEXTS, max_size=2),
)
ODD_LINES = [
    "[" * 50_000,
    "1" + "0" * 5000,
    "NaN",
    "{}",
    "[]",
    '"x"',
    '{"prompt": "\\ud800"}',
    '{"prompt": "a"',
    "\x00",
    '{"prompt": ' + json.dumps("long " * 100_000) + "}",
    '{"prompt": "a", "prompt": 2}',
    '{"prompt": NaN}',
]


@st.composite
def files(draw: st.DrawFn, columns: list[str], suffixes: list[str]) -> tuple[str, bytes]:
    """A file's ending and its content: rows of these and other columns, some of them ragged, some files broken."""
    suffix = draw(st.sampled_from(suffixes))
    likely = {name: draw(st.sampled_from(["a film", "b", "3", "c\nd"])) for name in columns}
    odd_rows = st.dictionaries(st.sampled_from(COLUMNS) | hostile.TEXTS, CELLS, max_size=3).map(
        lambda row: likely | row
    )
    rows = draw(st.lists(st.just(likely) | odd_rows | (hostile.VALUES if suffix == ".json" else odd_rows), max_size=5))
    match suffix:
        case ".json":
            content = _json(rows if draw(st.integers(0, 3)) else draw(hostile.VALUES))
        case ".jsonl" | ".jsonl.gz":
            lines = [_json(row).decode() for row in rows]
            for _ in range(draw(st.integers(0, 1))):
                lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(ODD_LINES) | hostile.TEXTS))
            content = "\n".join(lines).encode("utf-8", "surrogatepass")
        case ".csv":
            cells = [[str(value) for value in row.values()] for row in rows]
            header = ",".join(draw(st.permutations(columns + draw(st.lists(st.sampled_from(COLUMNS), max_size=2)))))
            content = "\n".join([header, *map(",".join, cells)]).encode("utf-8", "surrogatepass")
        case ".parquet":
            content = _parquet(rows, draw(st.sampled_from(["none", "snappy"])))
        case _:
            content = "\n".join(draw(st.lists(hostile.TEXTS, max_size=5))).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 4)) == 0:
        content = draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe"])) + content
    if suffix == ".jsonl.gz":
        content = gzip.compress(content, mtime=0)
    if draw(st.integers(0, 2)) == 0:
        content = hostile.damaged(draw, content)
    return suffix, content


def _json(value) -> bytes:
    return json.dumps(value, default=repr, skipkeys=True).encode()


def _parquet(rows, compression: str) -> bytes:
    import pyarrow
    from pyarrow import parquet

    kept = [{k: v for k, v in row.items() if _is_arrow(v) and _is_arrow(k)} for row in rows]
    out = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(kept or [{"prompt": "a"}])
    except (pyarrow.ArrowException, OverflowError):  # columns of two types
        table = pyarrow.table(
            {"prompt": ["a", None], "rating": [1.5, math.nan], "when": pyarrow.array([1, 2], "date64")}
        )
    parquet.write_table(table, out, compression=compression)
    return out.getvalue()


def _is_arrow(value) -> bool:
    return (isinstance(value, str) and value.isascii()) or (isinstance(value, float | bool))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


PROMPT_FILES = [".txt", ".json", ".jsonl", ".jsonl.gz", ".csv", ".parquet"]


@examples(1500)
@given(
    file=files(["prompt"], PROMPT_FILES) | files(["text", "label"], PROMPT_FILES),
    column=st.sampled_from([None, None, None, "prompt", "label", "nowhere"]),
    template=st.sampled_from(
        [
            None,
            None,
            None,
            "{prompt}!",
            "{text} {label}",
            "{nowhere}",
            "{",
            "{}",
            "{0}",
            "{prompt.__class__}",
            "{prompt[0]}",
            "{prompt:>99999999999}",
            "{prompt:d}",
            "{prompt!r}",
            "{prompt!x}",
            "plain",
            "\ud800",
        ]
    ),
    words=st.sampled_from([None, None, 1, 3, 10**12]),
    until=st.sampled_from([None, None, "i", "\n"]),
)
def test_prompt_files(file, column, template, words, until, folder):
    suffix, content = file
    path = folder / f"given{suffix}"
    path.write_bytes(content)
    column = None if template else column
    options = {"prompt_column": column, "prompt_template": template, "prompt_words": words, "prompt_until": until}
    data = refused_or(lambda: DataConfig(prompts=str(path), **options))
    prompts = None if data is None else refused_or(lambda: load_prompts(data))
    if prompts is None:
        return
    assert len(prompts) > 0
    assert all(text.strip() for text in prompts.texts)
    "".join(prompts.texts).encode("utf-8")
    refused_or(lambda: load_eval_prompts(data))
    ids = refused_or(lambda: encode(prompts, TOKENIZER, 10_000))
    assert ids is None or len(ids) == len(prompts)


@examples(200)
@given(rows=st.lists(hostile.VALUES, max_size=4) | hostile.VALUES)
def test_prompts_from_python(rows):
    prompts = refused_or(lambda: load_prompts(DataConfig(prompts=rows)))
    if prompts is not None:
        assert refused_or(lambda: encode(prompts, TOKENIZER, 10_000)) is None or len(prompts) > 0
    if isinstance(rows, list):
        refused_or(lambda: Prompts.from_list(rows))


@examples(300)
@given(
    source=hostile.TEXTS.filter(lambda text: text.endswith((".txt", ".json", ".csv", ".parquet")))
    | hostile.TEXTS.map(lambda text: text + ".txt")
)
def test_names_of_files(source):
    refused_or(lambda: load_prompts(DataConfig(prompts=source)))


@examples(1000)
@given(
    file=files(["text", "rating"], PROMPT_FILES) | files(["chosen", "rejected"], PROMPT_FILES),
    objective=st.sampled_from(["ratings", "pairs"]),
)
def test_feedback_files(file, objective, folder):
    suffix, content = file
    path = folder / f"feedback{suffix}"
    path.write_bytes(content)
    columns = {
        "text_column": "text",
        "rating_column": "rating",
        "chosen_column": "chosen",
        "rejected_column": "rejected",
    }
    found = refused_or(lambda: load_feedback(str(path), objective, low=-4.0, high=4.0, **columns))
    if found is None:
        return
    texts = [*found.texts] if hasattr(found, "texts") else [*found.chosen, *found.rejected]
    assert texts
    assert all(text.strip() for text in texts)
    "".join(texts).encode("utf-8")
    if hasattr(found, "ratings"):
        assert all(-4 <= rating <= 4 for rating in found.ratings)
    assert len(found.groups()) > 0


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv"])
def test_a_mark_of_byte_order_is_no_text(suffix, tmp_path):
    content = {".txt": "a film", ".json": '["a film"]', ".jsonl": '{"prompt": "a film"}', ".csv": "prompt\na film"}[
        suffix
    ]
    (tmp_path / f"given{suffix}").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert load_prompts(DataConfig(prompts=str(tmp_path / f"given{suffix}"))).texts == ["a film"]
