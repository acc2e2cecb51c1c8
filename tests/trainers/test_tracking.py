"""The same numbers under trlX's names."""

import pytest

from solotune.errors import MissingExtraError
from solotune.trainers.evaluation import Evaluation
from solotune.trainers.tracking import available_tracker, evaluation_names, round_names


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
