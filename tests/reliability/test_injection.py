"""Texts of models, data sets, file names and recipes steer neither the terminal nor the page."""

import io
import logging
import os
import re
import shlex

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import solotune
from solotune import progress
from solotune.cli import app
from solotune.runs.console import SayingHandler, VisibleFormatter, say, show_logs
from tests.reliability.test_hostile_runs import ACTING, assert_inert
from tests.tiny import tiny_ppo_config

HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x1b]8;;file:///x\x07link\x1b]8;;\x07",
    "\x1b]0;title\x07\x9b2J\x9d0;x\x9c",
    "a\rb\x08\x7f\x00",
    "\u202eright\u2066\u200b",
    "[red]r[/red][link=http://x]l[/link][/nothing] :smile:",
    "<script>alert(1)</script><img src=x onerror=alert(1)>' onload='x",
    "javascript:alert(1) {{ 7*7 }} {% raw %}",
    "\u2028\u2029\x85",
]


@pytest.fixture
def terminal(monkeypatch):
    """A terminal that obeys everything; what it was sent."""
    out = io.StringIO()
    shown = Console(file=out, force_terminal=True, color_system="truecolor", width=10_000, no_color=False)
    monkeypatch.setattr(progress, "console", shown)
    return out


@pytest.mark.parametrize("text", HOSTILE)
def test_a_line_is_shown_as_it_is(terminal, text):
    say(text)
    shown = terminal.getvalue().removesuffix("\n")
    assert not ACTING.search(shown)
    assert "\n" not in shown
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_log_line_is_shown_as_it_is_and_stays_one_line(terminal, text):
    handler = SayingHandler()
    handler.setFormatter(VisibleFormatter("%(message)s"))
    logger = logging.Logger("of a test")
    logger.addHandler(handler)
    logger.warning("prompt %d begins %s and %r", 3, text + "\nforged line", text)
    shown = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())  # rich's own colours
    assert not ACTING.search(shown)
    assert len(shown.strip().split("\n")) == 1
    assert "↵forged line" in shown
    if text.isprintable():
        assert text in shown


def test_the_projects_own_log_goes_through_it(monkeypatch):
    logger = logging.getLogger("solotune")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    show_logs()
    assert isinstance(logger.handlers[0].formatter, VisibleFormatter)


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    def write(name="recipe.yaml", **changes):
        (tmp_path / "reward.py").write_text(
            "def vowels(outputs, **_):\n    return [o.count('a') / 6 for o in outputs]\n"
        )
        values = tiny_ppo_config(tiny_folder).evolve(train={"epochs": 1}).to_dict()
        values["data"] = {"prompts": ["a film", *(f"> {text[:12]}" for text in HOSTILE)]}
        values["reward"] = {"function": f"{tmp_path / 'reward.py'}:vowels"}
        for section, change in changes.items():
            values[section] |= change
        (tmp_path / name).write_text(yaml.safe_dump(values), encoding="utf-8")
        return tmp_path / name

    return write


def test_a_run_with_hostile_prompts_and_names(recipe, tmp_path):
    name = "[red]r[bold] [/nothing] \x1b[31m it's <b>{{ 7*7 }} :smile: $(touch x)"
    result = CliRunner().invoke(app, ["train", str(recipe()), "--out", str(tmp_path / name)])
    assert result.exit_code == 0, result.output[-3000:]
    assert not ACTING.search(result.output)
    assert r"[red]r[bold] [/nothing] \x1b[31m it's <b>{{ 7*7 }} :smile: $(touch x)" in result.output.replace("\n", "")
    assert_inert((tmp_path / name / "report.html").read_text())
    said = re.search(r"go on with: (solotune train .*)", result.output)[1]
    assert shlex.split(said)[-1] == str(tmp_path / name.replace("\x1b", r"\x1b")), "one argument to a shell"
    assert sorted(os.listdir(tmp_path)) == sorted(["reward.py", "recipe.yaml", name.split("/")[0]])


@pytest.mark.parametrize("text", [text.replace("/", "|").replace("\x00", "") for text in HOSTILE])
def test_errors(recipe, text):
    for arguments in (
        ["train", text],
        ["train", str(recipe(f"{text}.yaml", train={"run_name": 3}))],
        ["train", str(recipe(train={text: 1}))],
        ["train", str(recipe(data={"prompts": f"{text}.json"}))],
        ["train", str(recipe(data={"prompts": [{"prompt": "a", text: 1}, {"prompt": "b"}]}))],
        ["train", str(recipe(model={"model_path": f"{text}/x"}))],
        ["train", str(recipe(reward={"function": f"{text}.py:f"}))],
        ["train", str(recipe()), "--set", f"train.seed={text}"],
        ["report", text],
        ["export", text, "--merge", text],
        ["tree", str(recipe(model={"architecture": {"model_type": text}, "model_path": "nowhere/x"}))],
    ):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, SystemExit), (arguments, result.exception)
        assert result.exit_code in (1, 2)
        assert not ACTING.search(result.output), (arguments, result.output)


def test_metrics_of_hostile_names(tiny_folder, tmp_path, capsys):
    config = tiny_ppo_config(tiny_folder).evolve(train={"checkpoint_dir": str(tmp_path), "epochs": 1})
    solotune.train(
        reward_fn=lambda outputs, **_: [len(o) / 9 for o in outputs],
        metric_fn=lambda samples, **_: {text + "/loss": [1.0] * len(samples) for text in HOSTILE},
        prompts=["a film"],
        config=config,
    )
    assert not ACTING.search(capsys.readouterr().out)
    assert_inert((tmp_path / "tiny" / "report.html").read_text())
