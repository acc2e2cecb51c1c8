"""A sweep of a script that answers at once: what is tried, what counts, and what a crash leaves."""

import csv
import importlib.util
import json
import os
import signal
import sys
import time

import pytest
from typer.testing import CliRunner

from solotune.cli import app
from solotune.errors import ConfigError, MissingExtraError, TrainingError
from solotune.sweep import study


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in open(f"/proc/{pid}/status").read()


def settings_of(rows):
    return [row.settings["method.x"] for row in rows]


def test_the_best_trial_is_the_best_of_all_and_everything_is_written_down(folder, capsys):
    folder.write(num_samples=2, more="method.k: {strategy: choice, values: [[1, 2], 3]}\n")
    rows = folder.sweep()
    assert [call["x"] for call in folder.calls()] == settings_of(rows), "what is in the table is what main got"
    for row in rows:
        assert row.value == -((row.settings["method.x"] - 2) ** 2)
        assert row.settings["method.k"] in ([1, 2], 3)
    best = json.loads((folder.path / "out" / "sweep.json").read_text())["best"]
    assert best["value"] == max(row.value for row in rows)
    with (folder.path / "out" / "sweep.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["reward/mean"]) for row in read] == [row.value for row in rows]
    assert (folder.path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"--set method.x={best['settings']['method.x']}" in said
    assert f"best: trial {best['trial']}" in said
    assert len({call["hparams"]["train.checkpoint_dir"] for call in folder.calls()}) == 2, "a folder for each trial"


def test_the_smallest_can_be_wanted(fake):
    fake.write(mode="min", num_samples=8)
    values = [row.value for row in fake.sweep()]
    assert json.loads((fake.path / "out" / "sweep.json").read_text())["best"]["value"] == min(values) < max(values)


@pytest.mark.parametrize(("search_alg", "trials"), [("random", 3), ("bayesopt", 12)])
def test_the_seed_decides_what_is_tried(fake, search_alg, trials):
    fake.write(search_alg=search_alg, num_samples=trials)
    tried = [settings_of(fake.sweep(out, seed=4)) for out in ("a", "b")]
    assert tried[0] == tried[1]
    assert len(set(tried[0])) == trials
    assert not set(settings_of(fake.sweep("c", seed=5))) & set(tried[0])


def test_bayesian_search_goes_where_results_are_good(fake):
    fake.write(search_alg="bayesopt", num_samples=32, values="[-50, 50]")
    tried = settings_of(fake.sweep(seed=2))
    drawn, proposed = (sum(abs(x - 2) for x in xs) / 10 for xs in (tried[:10], tried[-10:]))
    assert proposed < 0.5 * drawn, "the mean distance from the best"


def test_killed_and_taken_up_again_it_tries_the_same_and_repeats_nothing(folder, request):
    # The second trial hangs until the sweep has been killed.
    waits = """
    end = time.time() + 60
    while len(open("calls.jsonl").readlines()) == 2 and not os.path.exists("killed") and time.time() < end:
        time.sleep(0.02)
"""
    folder.write(waits + '    return {"reward/mean": -((x - 2) ** 2)}\n', num_samples=3)
    killed = folder.start("sweep", "--config", "easy.yml", "easy.py", "--out", "out")
    wait_for(lambda: len(folder.calls()) == 2)
    killed.kill()
    killed.communicate()
    orphan = folder.calls()[-1]["pid"]
    wait_for(lambda: not is_alive(orphan), 5)
    (folder.path / "killed").touch()
    rows = folder.sweep()
    tried = [call["x"] for call in folder.calls()]
    assert [row.state for row in rows] == ["complete"] * 3
    assert tried == [tried[0], tried[1], tried[1], tried[3]], "only the second ran twice"
    assert settings_of(rows) == [tried[0], *tried[2:]]
    assert folder.sweep() == rows
    folder.write(num_samples=4)
    assert settings_of(folder.sweep())[:3] == settings_of(rows), "more samples go on from there"
    assert len(folder.calls()) == 5, "a finished trial is not run again"
    fake = request.getfixturevalue("fake")
    assert settings_of(fake.sweep("whole"))[:4] == settings_of(folder.sweep()), "as if nothing had happened"


def test_ctrl_c_stops_the_trial_and_the_same_command_goes_on(folder):
    folder.write(
        '    time.sleep(0 if os.path.exists("killed") else 60)\n    return {"reward/mean": x}\n', num_samples=2
    )
    sweep = folder.start("sweep", "--config", "easy.yml", "easy.py", "--out", "out")
    wait_for(lambda: folder.calls())
    sweep.send_signal(signal.SIGINT)
    said, _ = sweep.communicate(timeout=20)
    assert sweep.returncode == 130, said
    assert "the same command goes on from here" in said
    assert not is_alive(folder.calls()[0]["pid"])
    (folder.path / "killed").touch()
    rows = folder.sweep()
    assert [row.state for row in rows] == ["complete"] * 2
    assert [call["x"] for call in folder.calls()] == [settings_of(rows)[0], *settings_of(rows)]


def test_a_trial_that_fails_is_named_and_the_sweep_goes_on(folder, capsys):
    ends = {
        1: 'raise RuntimeError("one is not\\nto be [bold]had[/bold]")',
        2: "os.kill(os.getpid(), 9)",
        3: 'return {"reward/mean": float("nan")}',
        4: 'return {"reward/meen": 1.0}',
        5: "raise SystemExit(3)",
    }
    body = "".join(f"    if x == {x}: {end}\n" for x, end in ends.items()) + '    return {"reward/mean": x}\n'
    folder.write(body, values="[0, 1, 2, 3, 4, 5, 6]", strategy="grid")
    rows = {row.settings["method.x"]: row for row in folder.sweep()}
    assert [x for x, row in rows.items() if row.state == "complete"] == [0, 6]
    for x, said in {
        1: "to be [bold]had[/bold]",
        2: "killed by SIGKILL",
        3: "its last reward/mean is not a finite number",
        4: "it reported no reward/mean: did you mean reward/meen",
        5: "exit code 3, and nothing in its log",
    }.items():
        assert (rows[x].state, rows[x].value) == ("fail", None)
        assert said in rows[x].error
    log = (folder.path / "out" / rows[1].folder / "log.txt").read_text()
    assert "easy.py" in log
    assert "RuntimeError: one is not" in log
    assert "solotune" not in log, "the traceback is the script's alone"
    assert "failed: killed by SIGKILL" in capsys.readouterr().out


def test_when_the_first_three_fail_it_stops_and_can_be_put_right(folder):
    folder.write("    return 1 / 0\n")
    with pytest.raises(TrainingError, match=r"first 3 trials all failed.*ZeroDivisionError.*--retry-failed"):
        folder.sweep()
    assert len(folder.calls()) == 3
    folder.write()
    rows = folder.sweep(retry_failed=True)
    assert [row.state for row in rows] == ["complete"] * 4
    tried = [call["x"] for call in folder.calls()]
    assert tried[3:6] == tried[:3], "with the same settings"
    assert len(set(tried)) == 4


@pytest.mark.parametrize(
    ("script", "said"),
    [("x = 1\n", r"no function main\(hparams\)"), ("import nothing_at_all\n", "No module named 'nothing_at_all'")],
)
def test_a_script_that_cannot_start_stops_the_sweep_at_once(folder, script, said):
    folder.write(script=script, num_samples=1)
    with pytest.raises(TrainingError, match=said):
        folder.sweep()
    folder.write(num_samples=1)
    assert [row.state for row in folder.sweep()] == ["complete"], "it costs no trial"


def test_a_grid_is_tried_whole(fake):
    fake.write(strategy="grid", values="[0, 1]", more="method.k: {strategy: grid, values: [a, b, null]}\n")
    tried = [tuple(row.settings.values()) for row in fake.sweep()]
    assert sorted(tried, key=str) == sorted([(x, k) for x in (0, 1) for k in ("a", "b", None)], key=str)


def test_several_jobs_run_at_a_time(folder):
    wait = "    while len(open('calls.jsonl').readlines()) < 2: time.sleep(0.02)\n"  # for the other trial to be there
    folder.write(wait + '    return {"reward/mean": x}\n', num_samples=2)
    assert [row.state for row in folder.sweep(jobs=2)] == ["complete"] * 2


@pytest.mark.parametrize("scheduler", ["hyperband", "fifo"])
def test_hyperband_stops_trials_that_fall_behind(fake, monkeypatch, scheduler):
    monkeypatch.setattr(study.Child, "answers", lambda self, x: [x * step for step in range(10)])
    values = str([*range(12, 0, -1)])
    fake.write(strategy="grid", values=values, scheduler=scheduler)
    rows = fake.sweep()
    assert (rows[0].state, rows[0].value) == ("complete", 12 * 9)
    stopped = [row for row in rows if row.state == "pruned"]
    early = [row for row in stopped if row.value < 9 * row.settings["method.x"]]  # before the last report
    assert (len(early) > 3) == (scheduler == "hyperband")
    assert len(rows) == 12


def test_what_a_sweep_compares_cannot_change_when_it_is_taken_up(fake):
    folder = fake
    folder.write(num_samples=1)
    folder.sweep()
    for changes, said in (({"values": "[0, 5]"}, r"parameters: was .*\[0.0, 4.0\].*is .*\[0.0, 5.0\]"),
                          ({"metric": "x"}, 'metric: was "reward/mean", is "x"'),
                          ({"mode": "min"}, 'mode: was "max", is "min"')):  # fmt: skip
        folder.write(**{"num_samples": 2, **changes})
        with pytest.raises(ConfigError, match=said):
            folder.sweep()
    (folder.path / "else").mkdir()
    (folder.path / "else" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no sweep's: choose another with --out"):
        folder.sweep("else")


def test_two_sweeps_in_one_folder(folder):
    folder.write("    time.sleep(60)\n")
    other = folder.start("sweep", "--config", "easy.yml", "easy.py", "--out", "out")
    wait_for(lambda: folder.calls())
    with pytest.raises(ConfigError, match="another process runs the sweep"):
        folder.sweep()
    other.kill()
    other.communicate()


def test_without_optuna(folder, monkeypatch):
    folder.write()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else find(name, *rest)
    )
    with pytest.raises(MissingExtraError, match=r"pip install 'solotune\[sweep\]'"):
        folder.sweep()


def test_trlxs_command_and_its_options(fake, monkeypatch):
    fake.write(num_samples=1)
    monkeypatch.setattr(sys, "argv", sys.argv)
    options = ["--num_gpus", "1", "--num_cpus", "4", "-y", "--server_address", "ray://host:1"]
    result = CliRunner().invoke(app, ["trlx", "-m", "trlx.sweep", "--config", "easy.yml", *options, "easy.py"])
    assert result.exit_code == 0, result.output
    assert "without effect here: --num_gpus, --num_cpus, -y, --server_address" in result.stdout
    assert (fake.path / "runs" / "easy-easy" / "sweep.json").exists()
    result = CliRunner().invoke(app, ["trlx", "-m", "http.server"])
    assert result.exit_code == 2
    assert "no module 'http.server' of trlX's" in result.stderr


def test_through_accelerate_launch(folder):
    config = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\n"
    (folder.path / "accelerate.yml").write_text(config)
    folder.write('    return {"reward/mean": float("ACCELERATE_MIXED_PRECISION" in os.environ)}\n', num_samples=1)
    (row,) = folder.sweep(accelerate_config=folder.path / "accelerate.yml")
    assert row.value == 1.0, "accelerate's own variables are there"
