"""The curves hold the run's numbers, are deterministic, and can share a page."""

import re
import xml.etree.ElementTree as ET

import pytest

from solotune.errors import DataError
from solotune.report import curves
from solotune.report.reading import read_run

DRAWN = [curves.reward_svg, curves.kl_svg, curves.losses_svg, curves.memory_svg, curves.histogram_svg]


@pytest.mark.parametrize("draw", DRAWN)
def test_svg_is_well_formed_labelled_and_deterministic(make_run, draw):
    run = read_run(make_run())
    svg = draw(run)
    assert svg == draw(run)
    root = ET.fromstring(svg.replace("xlink:href", "href"))
    assert root.get("role") == "img"
    assert len(root.get("aria-label") or "") > 20
    assert "<style" not in svg
    assert "<!DOCTYPE" not in svg


def test_ids_are_unique_across_the_svgs_and_references_resolve(make_run):
    run = read_run(make_run())
    page = "".join(draw(run) for draw in DRAWN)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', page)) <= set(ids)


def test_no_colour_is_fixed(make_run):
    run = read_run(make_run())
    for draw in DRAWN:
        assert re.findall(r"#[0-9a-fA-F]{6}\b", draw(run)) == []


@pytest.mark.parametrize("draw", DRAWN)
def test_nothing_to_draw_is_an_empty_string(make_run, draw):
    run = make_run()
    (run / "metrics.jsonl").write_text('{"round": 1, "policy/lr": 0.1}\n')
    (run / "samples.jsonl").write_text("")
    assert draw(read_run(run)) == ""


def test_values_that_cannot_be_drawn_are_left_out(make_run, rewrite):
    run = make_run(rounds=4)
    bad = [float("nan"), float("inf"), "high", None]
    rewrite(run / "metrics.jsonl", lambda m: m | {"objective/score": bad[m["round"] - 1] if m["round"] > 1 else 0.5})
    rewrite(run / "samples.jsonl", lambda s: s | {"reward": float("nan")})
    assert "Training score: 0.500 in round 1." in curves.reward_svg(read_run(run))
    assert curves.histogram_svg(read_run(run)) == ""


def test_equal_rewards_have_a_histogram(make_run, rewrite):
    run = make_run()
    rewrite(run / "samples.jsonl", lambda s: s | {"reward": 1.0})
    assert "32 samples before, mean reward 1.000" in curves.histogram_svg(read_run(run))


def test_a_long_run_stays_small(make_run):
    assert len(curves.reward_svg(read_run(make_run(rounds=10_000)))) < 60_000


def test_loss_names_are_not_read_as_mathematics(make_run):
    run = make_run()
    (run / "metrics.jsonl").write_text('{"round": 1, "_$x_1^2$/loss": 0.1}\n')
    root = ET.fromstring(curves.losses_svg(read_run(run)).replace("xlink:href", "href"))
    assert "$x_1^2$/loss" in [element.text for element in root.iter("text")]


def test_png_of_one_and_of_several_seeds(make_run, tmp_path):
    runs = [make_run(f"seed{seed}", seed=seed) for seed in range(3)]
    one = curves.write_curve_png(runs[:1], tmp_path / "one.png").read_bytes()
    several = curves.write_curve_png(runs, tmp_path / "several.png").read_bytes()
    again = curves.write_curve_png(runs, tmp_path / "again.png").read_bytes()
    assert one.startswith(b"\x89PNG")
    assert several == again != one
    assert len(several) < 400_000


def test_png_without_runs_is_refused(tmp_path):
    with pytest.raises(DataError, match="at least one"):
        curves.write_curve_png([], tmp_path / "none.png")
