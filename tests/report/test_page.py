"""The page of a run: what it says, that hostile texts stay text, and that half a run folder is enough."""

import json
import re
from html.parser import HTMLParser

import pytest

from solotune.errors import DataError
from solotune.report import write_report
from solotune.report.reading import read_run

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """The parsed page: elements with their attributes, text, and whether every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.stack: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(run) -> tuple[str, Page]:
    html = write_report(run).read_text(encoding="utf-8")
    return html, Page(html)


def test_a_finished_run_shows_its_numbers(make_run):
    html, page = page_of(make_run())
    for said in (
        "0.361 → 0.642",
        "+0.281",
        "KL 5.13",
        "Rounds 25",
        "100 optimizer steps",
        "11 min 42 s",
        "1.48 GB",
        "48 tokens per second",
        "0.452 %",
        "reward training",
        "16 of 32 samples",
        "Evaluation at round 0 and at round 25",
        "Value head: 820,481 trainable",
        "init_kl_coef: 0.05",
        "asset:gemma-3-270m, seed 0",
    ):
        assert said in page.text, said
    assert "Notes" not in html
    assert len([tag for tag, _ in page.elements if tag == "svg"]) == 4
    assert len(html) < 400_000


def test_the_page_is_a_function_of_the_folder(make_run):
    run = make_run()
    assert write_report(run) == run / "report.html"
    first = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == first


def test_nothing_is_loaded_and_nothing_runs(make_run):
    html, page = page_of(make_run())
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img"}
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert (
        "meta",
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"},
    ) in page.elements


def test_accessible_names(make_run):
    _, page = page_of(make_run())
    assert ("html", {"lang": "en"}) in page.elements
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in {"col", "row", "rowgroup"}


HOSTILE = (
    "<script>alert(1)</script></pre></td></table><img src=x onerror=alert(1)>{{ 7*7 }}{% raw %}"
    "\x1b[31mred\x1b[0m\x00\u202eevil\u2066 [red]markup[/red] \ud800 "
    "' onmouseover='x \" onload=\"x & &lt;b&gt; ]]>--><!--"
)


def test_hostile_texts_stay_texts_everywhere(make_run, rewrite):
    run = make_run("<b>{{ 7*7 }}")
    rewrite(run / "samples.jsonl", lambda s: s | {"prompt": HOSTILE, "output": HOSTILE})
    rewrite(run / "metrics.jsonl", lambda m: m | {HOSTILE + "/loss": 1.0})
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"model": HOSTILE, "seed": HOSTILE, "parameter_tree": HOSTILE}
    summary["seconds_by_phase"] |= {HOSTILE: 3.0}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text(HOSTILE.replace("\ud800", ""))
    html, page = page_of(run)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "b'"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    # prompt, 4 x before and after, model, seed, tree, config, phase
    assert page.text.count("<script>alert(1)</script></pre></td></table><img src=x onerror=alert(1)>{{ 7*7 }}") == 14
    assert "49" not in re.sub(r"[\d.,]{3,}", "", page.text)
    assert "\\x1b[31mred\\x1b[0m\\x00\\u202eevil\\u2066 [red]markup[/red] \\ud800" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)


def test_hostile_loss_names_in_a_run_without_scores(make_run):
    run = make_run()
    (run / "metrics.jsonl").write_text(json.dumps({"round": 1, f"{HOSTILE}$a$/loss": 1.0}) + "\n")
    (run / "samples.jsonl").write_text("")
    _, page = page_of(run)
    assert "Loss" in page.text
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_other_algorithm_without_score_or_kl_shows_its_losses(make_run, rewrite):
    run = make_run()
    keep = {"round", "step", "policy/loss", "memory/peak_bytes", "time/round"}
    rewrite(run / "metrics.jsonl", lambda m: {k: v for k, v in m.items() if k in keep})
    (run / "samples.jsonl").unlink()
    _, page = page_of(run)
    assert "Mean over the optimizer steps of each round" in page.text
    assert "policy/loss" in page.text
    assert "samples.jsonl is missing" in page.text
    assert "No evaluation was written" in page.text


def test_cut_last_line_is_left_out_with_a_note(make_run):
    run = make_run()
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: text.rindex("{") + 40])
    (run / "summary.json").unlink()
    _, page = page_of(run)
    assert "The last line of metrics.jsonl (line 25) is cut off" in page.text
    assert "Rounds 24" in page.text


def test_a_round_written_again_after_resuming_counts_once(make_run):
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"round": 25, "step": 100, "objective/score": 0.999}) + "\n")
    html, _ = page_of(run)
    assert "0.999 in round 25." in html
    (run / "summary.json").unlink()
    assert "4 min 46 s in rounds, so far" in page_of(run)[1].text  # 24 x 11.9 s: the new line has no time


def test_of_a_generation_sweep_the_setting_that_ended_highest_is_shown(make_run):
    run = make_run()
    once = read_run(run)
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    shifts = {"beta=0": 0.0, "beta=2": 1.0, "beta=8": 0.5}
    swept = [
        {**line, "setting": setting, "reward": line["reward"] + shift * (line["round"] > 0)}
        for setting, shift in shifts.items()
        for line in lines
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in swept))
    shown = read_run(run)
    assert [row["setting"] for row in shown.after] == ["beta=2"] * len(once.after)
    assert [row["reward"] for row in shown.after] == [row["reward"] + 1.0 for row in once.after]
    before, after = (sum(row["reward"] for row in rows) / len(rows) for rows in (once.before, once.after))
    assert shown.sweep == {
        setting: (pytest.approx(before), pytest.approx(after + shift)) for setting, shift in shifts.items()
    }
    _, page = page_of(run)
    assert f"beta=8 {before:.3f} → {after + 0.5:.3f}. Shown is beta=2, the highest at the end." in page.text
    assert f"{before:.3f} → {after + 1:.3f} {after + 1 - before:+.3f}, evaluation samples" in page.text
    (run / "samples.jsonl").write_text("".join(json.dumps({**line, "reward": None}) + "\n" for line in swept))
    assert "beta=8 - → -. Shown is beta=0, the first." in page_of(run)[1].text


def test_unreadable_lines_in_between_are_counted(make_run):
    run = make_run()
    lines = (run / "samples.jsonl").read_text().splitlines()
    lines[2:2] = ["[1]", '{"round": "x"}', "[" * 100_000, '{"round": 1' + "0" * 400 + "}"]
    (run / "samples.jsonl").write_text("\n".join(lines))
    _, page = page_of(run)
    assert "samples.jsonl: 4 unreadable lines are left out (line 3, 4, 5, 6)." in page.text


def test_running_or_crashed_run_says_so_and_shows_what_there_is(make_run):
    run = make_run()
    (run / "summary.json").unlink()
    _, page = page_of(run)
    assert "summary.json is missing" in page.text
    assert "4 min 58 s in rounds, so far" in page.text  # 25 x 11.9 s
    assert "Reward 0." in page.text
    assert "Sum of the rounds so far" in page.text


def test_damaged_summary_is_said(make_run):
    run = make_run()
    (run / "summary.json").write_text("[]")
    assert "summary.json is not a JSON object" in page_of(run)[1].text


def test_one_evaluation_has_no_after(make_run, rewrite):
    run = make_run()
    rewrite(run / "samples.jsonl", lambda s: s if s["round"] == 0 else None)
    html, page = page_of(run)
    assert "There is one evaluation so far" in page.text
    assert "After" not in page.text
    assert 'data-label="After"' not in html


def test_half_written_last_evaluation_compares_what_matches(make_run, rewrite):
    run = make_run()
    kept = iter(range(1000))
    rewrite(run / "samples.jsonl", lambda s: s if s["round"] < 25 or next(kept) < 5 else None)
    _, page = page_of(run)
    assert "first evaluation has 32 samples and the last 5; 5 have the same prompt" in page.text
    assert "5 of 5 samples" in page.text


def test_pairs_are_matched_by_index(make_run):
    run = make_run()
    samples = [
        {"round": r, "prompt": p, "output": f"{p}{i} at {r}", "reward": r + i / 10}
        for r in (0, 7)
        for p in "PQ"
        for i in range(6)
    ]
    (run / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    _, page = page_of(run)
    for p in "PQ":
        for i in range(4):
            assert f"{p}{i} at 0 {i / 10:.3f} {p}{i} at 7 {7 + i / 10:.3f}" in page.text
        assert f"{p}4 at 0" not in page.text


def test_many_long_outputs_keep_the_page_small(make_run):
    run = make_run()
    long = "word & <tag> " * 1500
    samples = [{"round": r, "prompt": f"{i} {long}", "output": long, "reward": 0.5} for r in (0, 9) for i in range(500)]
    (run / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    html, page = page_of(run)
    assert len(html.encode()) < 400_000
    assert "128 of 500 samples" in page.text
    assert "more characters in samples.jsonl" in page.text


def test_empty_metrics_and_samples_still_make_a_page(tmp_path):
    run = tmp_path / "started"
    run.mkdir()
    (run / "config.yaml").write_text("train: {}\n")
    _, page = page_of(run)
    assert "metrics.jsonl is missing" in page.text
    assert "train: {}" in page.text


def test_no_run_folder_says_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"No run folder at .*metrics\.jsonl, samples\.jsonl"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is not a run folder"):
        write_report(tmp_path)
