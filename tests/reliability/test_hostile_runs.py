"""Run folders of somebody else: shown, exported and gone on with; no crash, and nothing is written elsewhere."""

import json
import os
import pickle
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import solotune
from solotune.cli import app
from solotune.errors import ConfigError, ModelError, SolotuneError
from solotune.models.export import merge_adapter
from solotune.report import write_report
from solotune.report.reading import read_run
from solotune.runs.files import remove
from solotune.runs.folder import RunFolder
from tests.reliability import hostile
from tests.reliability.hostile import examples, in_time
from tests.tiny import tiny_ppo_config

ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff\ud800-\udfff]")
KEYS = [
    "round",
    "step",
    "prompt",
    "output",
    "reward",
    "kl",
    "setting",
    "objective/score",
    "objective/score_std",
    "objective/kl",
    "memory/peak_bytes",
    "time/sample",
    "time/round",
    "policy/loss",
    "rollout/tokens_per_second",
    "reward_before",
    "reward_after",
    "seconds_by_phase",
    "model",
    "seed",
    "parameter_tree",
    "rounds",
    "steps",
    "wall_seconds",
    "peak_memory_bytes",
    "tokens_per_second",
    "trainable_parameters",
    "total_parameters",
]
MARKUP = [
    "<script>alert(1)</script>",
    "</script>",
    "javascript:alert(1)",
    "<svg onload=alert(1)>",
    "{{ 7*7 }}",
    "$x$",
    "_x",
    "]]>",
    "\x1b]8;;http://x\x07l\x1b]8;;\x07",
    "\x1b[2J",
    "\r",
    "[red]",
    "[link=x]",
    "&lt;",
    "'\"><img src=x>",
    "\u202e",
]
WORDS = hostile.TEXTS | st.sampled_from(MARKUP)
ITEMS = st.recursive(
    st.none() | hostile.NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.sampled_from(KEYS) | WORDS.map(lambda text: text + "/loss") | WORDS, ITEMS, max_size=8)
LINES = OBJECTS.flatmap(lambda row: st.integers(0, 3).map(lambda number: {"round": number, **row})) | OBJECTS


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    content = "\n".join(_json(row) for row in draw(st.lists(LINES, max_size=6))).encode() + draw(
        st.sampled_from([b"", b"\n"])
    )
    return hostile.damaged(draw, content) if draw(st.integers(0, 3)) == 0 else content


def _json(value) -> str:
    return json.dumps(value, default=repr, skipkeys=True)


class Elements(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "action")]

    handle_startendtag = handle_starttag


def assert_inert(page: str) -> None:
    parsed = Elements(page)
    assert not parsed.tags & {
        "script",
        "img",
        "a",
        "iframe",
        "object",
        "embed",
        "link",
        "form",
        "base",
        "foreignobject",
    }
    assert not [name for name in parsed.names if name.startswith("on") or name in ("srcdoc", "formaction")]
    assert all(link.startswith("#") for link in parsed.links)
    assert not ACTING.search(page)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@examples(300)
@given(metrics=lines(), samples=lines(), summary=OBJECTS.map(_json) | ITEMS.map(_json) | WORDS, config=WORDS)
def test_pages_of_any_content(metrics, samples, summary, config, folder):
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(metrics)
    (run / "samples.jsonl").write_bytes(samples)
    (run / "summary.json").write_text(summary, errors="surrogatepass")
    (run / "config.yaml").write_text(config, errors="surrogatepass")
    with in_time():
        try:
            write_report(run)
        except SolotuneError:
            return
    assert_inert((run / "report.html").read_text(encoding="utf-8"))
    assert sorted(os.listdir(run)) == ["config.yaml", "metrics.jsonl", "report.html", "samples.jsonl", "summary.json"]


def test_a_line_of_fifty_megabytes(folder):
    run = folder / "long"
    run.mkdir()
    row = {"round": 0, "prompt": "p", "output": "x" * 50_000_000, "reward": 1.0}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    with in_time():
        page = write_report(run)
    assert page.stat().st_size < 1_000_000


@pytest.fixture(scope="module")
def real(tiny_folder, tmp_path_factory):
    """A real run's folder, which the tests copy and spoil."""
    out = tmp_path_factory.mktemp("real")
    config = tiny_ppo_config(tiny_folder).evolve(train={"checkpoint_dir": str(out)})
    solotune.train(
        reward_fn=lambda outputs, **_: [len(o) / 9 for o in outputs], prompts=["a film", "so"], config=config
    )
    return out / "tiny"


@pytest.fixture
def run(real, tmp_path):
    shutil.copytree(real, tmp_path / "given" / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep").write_text("mine")
    return tmp_path / "given" / "run"


@pytest.mark.parametrize(
    "name", ["report.html", ".report.html.partial", "summary.json", "metrics.jsonl", "config.yaml"]
)
def test_a_page_is_written_into_the_folder_and_shows_only_the_folder(run, tmp_path, name):
    mine = tmp_path / "mine" / "keep"
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(mine)
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert mine.read_text() == "mine"
    assert os.listdir(mine.parent) == ["keep"]
    page = run / "report.html"
    assert not page.is_symlink()
    assert ">mine<" not in page.read_text()
    if name.startswith(("summary", "metrics", "config")):
        assert f"{name} is a link to a file outside of the run" in page.read_text()


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "best",
        "failure",
        ".metrics.jsonl.partial",
        "adapter/x",
        "report.html",
    ],
)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_run_with_links_outside_is_not_gone_on_with(run, tmp_path, name, is_there):
    remove(run / name)
    (run / name).symlink_to(tmp_path / "mine" / ("keep" if is_there else "new"))
    with pytest.raises(ConfigError, match=re.escape(name) + r"' is a link to .*mine.*--out"):
        RunFolder(run, continued=True)
    assert os.listdir(tmp_path / "mine") == ["keep"]
    assert (tmp_path / "mine" / "keep").read_text() == "mine"


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_pickle_in_the_place_of_an_adapter_is_not_loaded(run, tmp_path):
    (run / "adapter" / "adapter_model.safetensors").unlink()
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
        (run / "adapter" / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    result = CliRunner().invoke(app, ["export", str(run), "--merge", str(tmp_path / "merged")])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert "safetensors" in result.output
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: (a / "adapter_config.json").write_text("{"),
        lambda a: (a / "adapter_config.json").write_text("[]"),
        lambda a: (a / "adapter_config.json").write_text("[" * 100_000),
        lambda a: (a / "adapter_config.json").write_text('{"peft_type": "x"}'),
        lambda a: (a / "adapter_config.json").write_text("{}"),
        lambda a: (a / "adapter_model.safetensors").write_bytes(b"123"),
        lambda a: (a / "tokenizer.json").write_text("{"),
        lambda a: _with(a, base_model_name_or_path="../../nowhere\x1b[31m"),
        lambda a: _with(a, base_model_name_or_path=None),
        lambda a: _with(a, base_model_name_or_path=5),
        lambda a: _with(a, r="x"),
        lambda a: _with(a, r=7),
        lambda a: _with(a, target_modules=[["x"]]),
    ],
)
def test_a_broken_adapter_is_refused(run, tmp_path, spoil):
    spoil(run / "adapter")
    with in_time():
        result = CliRunner().invoke(app, ["export", str(run), "--merge", str(tmp_path / "merged")])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    assert result.output.splitlines()[1].startswith("error: ")  # behind what was being done
    assert "\x1b[31m" not in result.output.replace("\x1b[31merror", "")
    assert not (tmp_path / "merged").exists()


def _with(adapter, **changes):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def test_a_link_is_not_copied_out(run, tmp_path):
    (run / "adapter").rename(run / "model")
    (run / "model" / "adapter_config.json").unlink()
    (run / "model" / "config.json").write_text("{}")
    (run / "model" / "secret").symlink_to(tmp_path / "mine" / "keep")
    with pytest.raises(ModelError, match="secret' is a link to a file elsewhere"):
        merge_adapter(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_notes_of_hostile_names_stay_in_the_page(run):
    hostile_run = run.with_name("<b>[red]\x1b[31m{{ 7*7 }}")
    run.rename(hostile_run)
    result = CliRunner().invoke(app, ["report", str(hostile_run)])
    assert result.exit_code == 0
    assert not ACTING.search(result.output)
    assert_inert((hostile_run / "report.html").read_text())
    assert read_run(hostile_run).name == hostile_run.name
