"""metrics.jsonl and samples.jsonl, cut anywhere in their last line: read, resumed from, and shown."""

import shutil

import pytest

import solotune
from solotune.errors import RunFileError
from solotune.report import write_report
from solotune.report.reading import read_run
from solotune.runs.folder import RunFolder, read_lines
from tests.tiny import tiny_ppo_config

LAST = {
    "round": 3,
    "step": 12,
    "prompt": "é 日本 👩‍🚀 \u2028",
    "output": '\\u00e9 " \\',
    "reward": -1.5e-05,
    "kl": None,
}
ROWS = [{"round": r, "step": 4 * r, "prompt": "p", "output": "o", "reward": 0.5, "kl": 1.0} for r in range(3)]


def test_at_every_byte(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.append(run.metrics, [*ROWS, LAST])
    content = run.metrics.read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    for length in range(start, len(content) + 1):
        run.metrics.write_bytes(content[:length])
        shutil.copy(run.metrics, run.samples)
        expected = [*ROWS, LAST] if length >= len(content) - 1 else ROWS
        assert read_lines(run.metrics) == expected, length
        assert read_run(run.path).metrics == expected
        run.cut_after(1)
        assert read_lines(run.metrics) == read_lines(run.samples) == ROWS[:2]
        run.metrics.write_bytes(content[:length])
        run.cut_after(3)
        assert read_lines(run.metrics) == expected
        assert run.metrics.read_bytes().endswith(b"}\n"), "the next line begins a line"


def test_a_page_of_a_cut_file(tmp_path):
    run = RunFolder(tmp_path / "run")
    for path in (run.metrics, run.samples):
        run.append(path, [*ROWS, LAST])
        path.write_bytes(path.read_bytes()[:-75])  # inside a character
    with pytest.raises(UnicodeDecodeError):
        run.metrics.read_text(encoding="utf-8")
    page = write_report(run.path).read_text()
    assert "The last line of metrics.jsonl (line 4) is cut off" in page
    assert "The last line of samples.jsonl (line 4) is cut off" in page


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b"3", b'{"step": 1}', b'{"round": "1"}', b"\xff", b"[" * 100_000])
def test_a_line_in_between_that_is_none_of_a_run_is_named(tmp_path, line):
    run = RunFolder(tmp_path / "run")
    run.append(run.metrics, ROWS)
    first, rest = run.metrics.read_bytes().split(b"\n", 1)
    broken = first + b"\n" + line + b"\n" + rest
    run.metrics.write_bytes(broken)
    with pytest.raises(RunFileError, match=r"metrics.jsonl', line 2 is not what a run writes"):
        run.cut_after(1)
    assert run.metrics.read_bytes() == broken
    write_report(run.path)


def test_a_run_goes_on_from_a_cut_file(tiny_folder, tmp_path):
    def vowels(outputs, **_):
        return [sum(character in "aeiou" for character in output) / 6 for output in outputs]

    def run(out, **train):
        config = tiny_ppo_config(tiny_folder).evolve(train={"checkpoint_dir": str(out), "epochs": 2, **train})
        solotune.train(reward_fn=vowels, prompts=["un café", "så"], config=config)
        return out / "tiny"

    whole, cut = run(tmp_path / "whole"), run(tmp_path / "cut")
    for name in ("metrics.jsonl", "samples.jsonl"):
        content = (cut / name).read_bytes()
        at = content.rfind("å".encode()) + 1
        (cut / name).write_bytes(content[: at or -20])
    shutil.rmtree(max((cut / "checkpoints").glob("step_*")))
    resumed = run(tmp_path / "cut", resume_from_checkpoint=str(cut))
    assert (resumed / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert [row["round"] for row in read_lines(resumed / "metrics.jsonl")] == [1, 2]
