"""Sweep files: each strategy draws what it says, and what is wrong is named."""

import pytest
import yaml
from optuna import create_study
from optuna.samplers import RandomSampler

from solotune.errors import ConfigError
from solotune.sweep.space import STRATEGIES, UNSUPPORTED, Parameter, read_plan

# In the shape of those that came with trlX: PPO on rewards, ILQL on a metric of the script's.
PPO_SWEEP = """
tune_config:
  mode: "max"
  metric: "reward/mean"
  search_alg: "random"
  scheduler: "fifo"
  num_samples: 32

optimizer.kwargs.lr: {strategy: "loguniform", values: [0.000001, 0.001]}
method.init_kl_coef: {strategy: "uniform", values: [0, 0.2]}
model.num_layers_unfrozen: {strategy: "choice", values: [-1, 2, 6]}
method.num_rollouts: {strategy: "choice", values: [32, 128, 512]}
method.target:
  strategy: "choice"
  values: [null, 1]
"""
ILQL_SWEEP = """
tune_config: {mode: max, metric: metrics/sentiments, search_alg: bayesopt, scheduler: fifo, num_samples: 64}
optimizer.kwargs.lr: {strategy: loguniform, values: [1e-6, 1e-3]}
method.tau: {strategy: uniform, values: [0.6, 0.9]}
method.steps_for_target_q_sync: {strategy: choice, values: [1, 5, 10]}
method.alpha: {strategy: loguniform, values: [1.0e-3, 1]}
"""


@pytest.fixture
def plan_of(tmp_path):
    def read(text):
        (tmp_path / "sweep.yml").write_text(text)
        return read_plan(tmp_path / "sweep.yml")

    return read


def draws(strategy, values, n=400):
    study = create_study(sampler=RandomSampler(seed=0))
    parameter = Parameter("x", strategy, tuple(values))
    distribution = {"x": parameter.distribution()}
    return [parameter.value(study.ask(distribution).params["x"]) for _ in range(n)]


def test_files_in_the_shape_of_trlxs(plan_of):
    plan = plan_of(PPO_SWEEP)
    assert (plan.tune.metric, plan.tune.mode, plan.n_trials, plan.tune.prunes) == ("reward/mean", "max", 32, False)
    assert {p.name: p.values for p in plan.parameters} == {
        "optimizer.kwargs.lr": (1e-6, 1e-3),
        "method.init_kl_coef": (0.0, 0.2),
        "model.num_layers_unfrozen": (-1, 2, 6),
        "method.num_rollouts": (32, 128, 512),
        "method.target": (None, 1),
    }
    assert plan.notes() == []
    plan = plan_of(ILQL_SWEEP)
    assert (plan.tune.search_alg, plan.tune.metric, plan.n_trials) == ("bayesopt", "metrics/sentiments", 64)
    assert [p.values[0] for p in plan.parameters if p.is_log] == [1e-6, 1e-3]


def test_continuous_strategies_stay_in_their_range_and_have_their_shape():
    uniform, log = draws("uniform", [2.0, 4.0]), draws("loguniform", [1e-6, 1e-2])
    assert 2 <= min(uniform) < 2.1
    assert 3.9 < max(uniform) <= 4
    assert min(log) >= 1e-6
    assert max(log) <= 1e-2
    assert 0.4 < sum(x < 1e-4 for x in log) / len(log) < 0.6, "half of the draws lie below the geometric middle"


@pytest.mark.parametrize(
    ("strategy", "values", "possible"),
    [
        ("quniform", [0.5, 1.5, 0.25], {0.5, 0.75, 1.0, 1.25, 1.5}),
        ("randint", [1, 4], {1, 2, 3}),
        ("qrandint", [8, 16, 4], {8, 12, 16}),
        ("lograndint", [1, 6], {1, 2, 3, 4, 5}),
        ("choice", ["a", None, 2, 0.5, True], {"a", None, 2, 0.5, True}),
        ("grid", [1, 2], {1, 2}),
    ],
)
def test_strategies_with_steps_draw_each_of_their_values_and_no_other(strategy, values, possible):
    drawn = draws(strategy, values)
    assert set(drawn) == possible
    assert all(type(x) in {type(y) for y in possible} for x in drawn), "whole numbers stay whole"


def test_lists_and_mappings_can_be_chosen():
    values = [[0.9, 0.95], {"max_new_tokens": 4}, None]
    drawn = draws("choice", values, 50)
    assert all(value in drawn for value in values)
    assert all(value in values for value in drawn)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a.b: {strategy: unifrom, values: [0, 1]}", ["a.b.strategy = 'unifrom'", *STRATEGIES]),
        ("a.b: {strategy: uniform, values: [1]}", ["a.b.values = [1]", "uniform takes 2 numbers: low, high"]),
        ("a.b: {strategy: quniform, values: [0, 1]}", ["a.b.values", "3 numbers", "step"]),
        ("a.b: {strategy: uniform, values: [1, 0]}", ["a.b.values = [1, 0]", "low must be less than high"]),
        ("a.b: {strategy: uniform, values: [0, .inf]}", ["a.b.values", "finite"]),
        ("a.b: {strategy: loguniform, values: [0, 1]}", ["a.b.values = [0, 1]", "greater than 0"]),
        ("a.b: {strategy: randint, values: [0, 1.5]}", ["a.b.values = [0, 1.5]", "must be a whole number"]),
        ("a.b: {strategy: uniform, values: [0, x]}", ["a.b.values", "must be a number"]),
        ("a.b: {strategy: quniform, values: [0, 1, 0.3]}", ["high must be a multiple of step, which is 0.3"]),
        ("a.b: {strategy: qrandint, values: [0, 4, 0]}", ["step must be greater than 0"]),
        ("a.b: {strategy: choice, values: 3}", ["a.b.values = 3", "must be a list"]),
        ("a.b: {strategy: choice, values: []}", ["a.b.values = []", "must be a list"]),
        ("a.b: {strategy: grid, values: [1, 2, 1.0]}", ["1 is given twice"]),
        ("a.b: {strategy: choice, values: [2020-01-01, 1]}", ["datetime", "must be a number, a text"]),
        ("a.b: {strategy: choice, value: [1]}", ["unknown setting a.b.value", "did you mean values"]),
        ("a.b: {strategy: choice}", ["a.b.values is missing"]),
        ("a.b: 3", ["a.b = 3", "must be a mapping"]),
        ("3: {strategy: choice, values: [1]}", ["3 must be the dotted name"]),
        *(
            (f"a.b: {{strategy: {name}, values: [1, 2, 1]}}", [f"{name!r}", "not supported", instead])
            for name, instead in UNSUPPORTED.items()
        ),
    ],
)
def test_a_wrong_parameter_is_named_with_its_value_and_what_is_allowed(plan_of, line, said):
    with pytest.raises(ConfigError) as raised:
        plan_of(f"tune_config: {{mode: max, metric: reward/mean, num_samples: 2}}\n{line}\n")
    for text in [*said, "sweep.yml"]:
        assert text in str(raised.value)


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ("{mode: maximum, metric: m, num_samples: 2}", "tune_config.mode = 'maximum'"),
        ("{mode: max, num_samples: 2}", "tune_config.metric is missing"),
        ("{mode: max, metric: m, num_samples: 0}", "tune_config.num_samples = 0"),
        ("{mode: max, metric: m}", "tune_config.num_samples is missing"),
        ("{mode: max, metric: m, num_samples: 2, serch_alg: random}", "did you mean search_alg"),
        ("{mode: max, metric: m, num_samples: 2, search_alg: hyperopt}", "'random', 'grid', 'bayesopt' or 'bohb'"),
        ("{mode: max, metric: m, num_samples: 2, scheduler: pbt}", "tune_config.scheduler = 'pbt'"),
        ("{mode: max, metric: m, search_alg: grid}", "every parameter must have the strategy grid, which a.b has not"),
    ],
)
def test_a_wrong_tune_config_is_named(plan_of, tune, said):
    with pytest.raises(ConfigError) as raised:
        plan_of(f"tune_config: {tune}\na.b: {{strategy: uniform, values: [0, 1]}}\n")
    assert said in str(raised.value)


def test_all_problems_are_said_at_once(plan_of):
    with pytest.raises(ConfigError) as raised:
        plan_of("a.b: {strategy: x, values: [0, 1]}\nc.d: {strategy: uniform, values: [2, 1]}\n")
    assert all(text in str(raised.value) for text in ("a.b.strategy", "c.d.values", "tune_config is missing"))
    with pytest.raises(ConfigError, match="nothing to search over"):
        plan_of("tune_config: {mode: max, metric: m, num_samples: 2}\n")


def test_grids_are_multiplied_and_what_else_is_drawn_repeats_them(plan_of):
    tune = {"mode": "max", "metric": "m", "num_samples": 3}
    grids = {"a.b": {"strategy": "grid", "values": [1, 2]}, "a.c": {"strategy": "grid", "values": ["x", "y"]}}
    plan = plan_of(yaml.safe_dump({"tune_config": tune, **grids}))
    assert plan.n_trials == 4
    assert "num_samples = 3 has no effect" in plan.notes()[0]
    assert {tuple(plan.fixed(index).values()) for index in range(4)} == {(1, "x"), (1, "y"), (2, "x"), (2, "y")}
    drawn = {"a.d": {"strategy": "uniform", "values": [0, 1]}}
    plan = plan_of(yaml.safe_dump({"tune_config": tune, **grids, **drawn}))
    assert plan.n_trials == 12
    assert [plan.fixed(index) for index in range(4)] == [plan.fixed(index) for index in range(8, 12)]
