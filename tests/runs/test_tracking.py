"""The same numbers under trlX's names."""

import math
import re
from types import SimpleNamespace

import pytest

from solotune.errors import MissingExtraError
from solotune.runs.evaluation import Evaluation
from solotune.runs.lines import read_lines
from solotune.runs.tracking import VALUES_FILE, available_tracker, evaluation_names, mlflow_name, round_names, start


def test_a_rounds_metrics_keep_their_names_and_get_trlxs():
    metrics = {"objective/kl": 4.0, "rollout/response_tokens": 16.0, "policy/loss": 1.0, "value/loss": 3.0,
               "objective/kl_coef": 0.1, "time/sample": 2.0, "time/score": 1.0, "policy/approx_kl": 0.2}  # fmt: skip
    named = round_names(metrics, vf_coef=0.5)
    assert metrics.items() <= named.items()
    assert (named["policy/sqrt_kl"], named["policy/kl_per_token"]) == (2.0, 0.5)
    assert (named["losses/total_loss"], named["losses/policy_loss"], named["kl_ctl_value"]) == (2.5, 1.0, 0.1)
    assert named["time/rollout_time"] == 3.0
    assert round_names({"objective/kl": -0.1, "rollout/response_tokens": 0.0}, 1.0)["policy/sqrt_kl"] == 0.0


def test_an_evaluation_of_a_sweep_says_its_setting():
    evaluation = Evaluation(0.5, 1.5, [], {"length": 7.0})
    assert evaluation_names(evaluation)["reward/mean"] == 0.5
    swept = evaluation_names(evaluation, "@beta=2")
    assert swept == {
        "eval/reward@beta=2": 0.5,
        "eval/kl@beta=2": 1.5,
        "reward/mean@beta=2": 0.5,
        "metrics/length@beta=2": 7.0,
    }


def test_a_tracker_that_is_not_installed():
    assert available_tracker(None) is None
    with pytest.raises(MissingExtraError, match=r"'nowhere'.*pip install"):
        available_tracker("nowhere")


class Recorder:
    """A tracker, and what it was given."""

    def __init__(self, name):
        self.name, self.got = name, []

    def log(self, values, step=None, **_options):
        self.got.append((values, step))


def started(monkeypatch, tracker, is_main_process=True):
    """An accelerator whose `init_trackers` opens `tracker`, after `start`."""
    accelerator = SimpleNamespace(trackers=[], is_main_process=is_main_process)
    accelerator.init_trackers = lambda *_, **__: accelerator.trackers.append(tracker)
    settings = {"entity_name": None, "group_name": None, "tags": [], "project_name": "p"}
    train = SimpleNamespace(tracker=tracker and tracker.name, **settings)
    start(accelerator, SimpleNamespace(train=train, to_dict=dict), "run")
    return accelerator.trackers


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_mlflow_gets_names_it_takes_and_other_trackers_ours(monkeypatch, name):
    named = evaluation_names(Evaluation(0.5, 1.5, [], {"length (words)": 7.0}), "@temperature=0.7")
    recorder = Recorder(name)
    (tracker,) = started(monkeypatch, recorder)
    tracker.log(named, step=3)
    ((got, step),) = recorder.got
    assert (list(got.values()), step) == (list(named.values()), 3), "nothing falls together"
    if name == "wandb":
        assert got == named
    else:  # MLflow: alphanumerics, underscores, dashes, periods, spaces and slashes
        assert all(re.fullmatch(r"[\w./ -]+", key) for key in got)
        assert "reward/mean_at_temperature_0.7" in got


def test_ordinary_names_are_mlflows_too():
    for name in ("reward/mean", "policy/approx_kl", "time/round", "values/clipfrac"):
        assert mlflow_name(name) == name


def test_the_values_file_gets_every_number_from_one_process(monkeypatch, tmp_path):
    monkeypatch.setenv(VALUES_FILE, str(tmp_path / "values.jsonl"))
    (tracker,) = started(monkeypatch, None)
    tracker.log({"reward/mean": 0.5}, step=4)
    tracker.log({"reward/mean": math.nan, "x": 1}, step=8)
    expected = [{"step": 4, "reward/mean": 0.5}, {"step": 8, "reward/mean": None, "x": 1}]
    assert read_lines(tmp_path / "values.jsonl") == expected
    assert started(monkeypatch, None, is_main_process=False) == []
