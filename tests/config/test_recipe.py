"""Recipes: a configuration, the prompts and the reward in one file, and settings replaced from the command line."""

import copy
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solotune.config import (
    DataConfig,
    Recipe,
    RewardConfig,
    RewardTrainingConfig,
    default_ppo_config,
    describe_steps,
    parse_override,
)
from solotune.config.yaml import parse_yaml, read_yaml, to_yaml
from solotune.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING = {"base": "encoder", "data": "asset:film-snippets"}


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(default_ppo_config(), DataConfig(["a film", {"prompt": "1e5", "year": 1999}]), RewardConfig("f.py:g"))


@pytest.fixture
def file(recipe, tmp_path) -> Path:
    recipe.save_yaml(tmp_path / "r.yaml")
    return tmp_path / "r.yaml"


def test_a_recipe_survives_yaml_and_versions_are_no_setting(recipe, tmp_path):
    recipe.save_yaml(tmp_path / "r.yaml", versions={"torch": "2.13.0"})
    assert read_yaml(tmp_path / "r.yaml")["versions"] == {"torch": "2.13.0"}
    loaded = Recipe.load_yaml(tmp_path / "r.yaml")
    assert loaded == recipe
    assert "versions" not in loaded.to_dict()
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_prompts_stay_the_texts_they_are(recipe, file):
    assert Recipe.load_yaml(file).data.prompts == ["a film", {"prompt": "1e5", "year": 1999}]


def test_no_recipe_of_the_caller_is_changed_or_shared(recipe):
    values = recipe.to_dict()
    before = copy.deepcopy(values)
    built = Recipe.from_dict(values)
    built.data.prompts[1]["year"] = 0
    built.config.optimizer.kwargs["lr"] = 9.0
    assert values == before


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("method.lam=0.9", "config.method.lam", 0.9),
        ("optimizer.kwargs.lr=1e-3", "config.optimizer.kwargs.lr", 1e-3),
        ("optimizer.kwargs.betas=[0.5, 0.9]", "config.optimizer.kwargs.betas", [0.5, 0.9]),
        ("method.cliprange_reward=null", "config.method.cliprange_reward", None),
        ("method.gen_kwargs={top_k: 5}", "config.method.gen_kwargs.top_k", 5),
        ("train.run_name=a=b", "config.train.run_name", "a=b"),
        ("train.run_name='1e5'", "config.train.run_name", "1e5"),
        ("train.gradient_checkpointing=true", "config.train.gradient_checkpointing", True),
        ("data.eval_repeats=3", "data.eval_repeats", 3),
        ("reward.transform=sigmoid", "reward.transform", "sigmoid"),
    ],
)
def test_an_override_replaces_one_setting_and_no_other(file, recipe, override, path, value):
    loaded = Recipe.load_yaml(file, [override])
    place = loaded
    for name in path.split("."):
        place = place[name] if isinstance(place, dict) else getattr(place, name)
    assert place == value
    section = path.removeprefix("config.").split(".")[0]
    before, after = recipe.to_dict(), loaded.to_dict()
    assert {k: v for k, v in after.items() if k != section} == {k: v for k, v in before.items() if k != section}
    changed = [k for k in before[section] if before[section][k] != after[section][k]]
    assert changed == [path.removeprefix("config.").split(".")[1]]


@settings(max_examples=60, deadline=None)
@given(
    value=st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.integers()),
    name=st.from_regex(r"[a-z_]+\.[a-z_]+(\.[a-z_]+)?", fullmatch=True),
)
def test_an_override_says_in_yaml_what_a_file_would_say(name, value):
    text = to_yaml({"v": value}).removeprefix("v:").strip("\n")
    assert parse_override(f"{name}={text}") == {name: value}


def test_the_last_override_wins(file):
    assert Recipe.load_yaml(file, ["train.seed=1", "train.seed=2"]).config.train.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.sead=1", r"unknown setting train\.sead in section train: did you mean seed\?"),
        ("trian.seed=1", r"unknown section trian: did you mean train\?"),
        ("data.prompt=x", r"unknown setting data\.prompt in section data: did you mean prompts\?"),
        ("reward.training.base=x", r"reward\.training\.data is missing"),
        ("reward.clasifier=x", r"unknown setting reward\.clasifier in section reward: did you mean classifier\?"),
        ("train.seed.x=1", r"train\.seed = \{'x': 1\}: must be a whole number"),
        ("train.seed", r"override 'train\.seed': must be section\.setting=value"),
        ("seed=1", r"override 'seed=1': must be section\.setting=value"),
        ("train.=1", r"override 'train\.=1': must be section\.setting=value"),
        ("train.tags=[", r"the value of 'train\.tags=\[' is not valid YAML"),
        ("train.seed=many", r"train\.seed = 'many': must be a whole number"),
    ],
)
def test_an_override_that_cannot_be_is_named(file, override, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.load_yaml(file, [override])


def test_a_section_that_is_missing_or_unknown_is_named(file):
    text = file.read_text()
    file.write_text(text.replace("\ndata:", "\ndatas:"))
    with pytest.raises(ConfigError) as caught:
        Recipe.load_yaml(file)
    assert "unknown section datas: did you mean data?" in str(caught.value)
    assert "section data is missing" in str(caught.value)
    assert str(caught.value).startswith(f"{file}:")


@pytest.mark.parametrize("prompts", ["", 3, ["a", 3], {"prompt": "a"}])
def test_prompts_of_another_kind_are_refused(prompts):
    with pytest.raises(ConfigError, match=r"data\.prompts = .*must be"):
        DataConfig(prompts)


def test_prompts_are_a_list_a_file_or_a_name(tmp_path):
    assert DataConfig(("a", "b")).prompts == ["a", "b"]
    assert DataConfig(tmp_path / "p.txt").prompts == str(tmp_path / "p.txt")
    assert DataConfig("asset:film-snippets", eval_prompts=["a"]).eval_prompts == ["a"]
    assert DataConfig("name").eval_prompts is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"no reward is given: exactly one of reward\.function, reward\.classifier, reward\.model"),
        ({"function": "f.py:g", "model": "m"}, r"reward\.function and reward\.model are given: exactly one of"),
        ({"model": "m", "training": TRAINING}, r"reward\.model and reward\.training are given"),
        ({"function": "f.py"}, r"reward\.function = 'f\.py': must be file\.py:name"),
        ({"function": ":g"}, r"reward\.function = ':g': must be file\.py:name"),
        ({"classifier": "c"}, r"reward\.label is missing"),
        ({"function": "f.py:g", "label": "POSITIVE"}, r"reward\.label = 'POSITIVE': belongs to reward\.classifier"),
        ({"model": "m", "transform": "softmax"}, r"reward\.transform = 'softmax': must be one of 'none' or 'sigmoid'"),
        ({"training": {**TRAINING, "objectiv": "pairs"}}, r"reward\.training\.objectiv .*did you mean objective\?"),
        ({"training": {**TRAINING, "epochs": 0}}, r"reward\.training\.epochs = 0: must be at least 1"),
        ({"training": {**TRAINING, "rating_min": 4}}, r"reward\.training\.rating_min = 4\.0: must be less than"),
    ],
)
def test_a_reward_that_cannot_be_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        RewardConfig(**settings)


def test_a_reward_model_s_score_passes_a_sigmoid_unless_told_otherwise():
    assert RewardConfig(model="m").transform == "sigmoid"
    assert RewardConfig(training=TRAINING).transform == "sigmoid"
    assert RewardConfig(model="m", transform="none").transform == "none"
    assert RewardConfig(function="f.py:g").transform == "none"
    assert RewardConfig(classifier="c", label="POSITIVE").transform is None


def test_reward_training_is_read_into_its_class(file):
    overrides = ["reward.function=null", "reward.transform=null", "reward.training={base: b, data: d, lr: 1e-5}"]
    training = Recipe.load_yaml(file, overrides).reward.training
    assert training == RewardTrainingConfig("b", "d", lr=1e-5)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_recipes_are_valid_and_say_where_they_were_measured(path):
    recipe = Recipe.load_yaml(path)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("hardware", "command", "time", "memory"):
        assert word in header


def test_the_classic_recipe_is_the_classic_experiment():
    recipe = Recipe.load_yaml(RECIPES / "opt-1.3b-imdb.yaml")
    config, method = recipe.config, recipe.config.method
    plan = describe_steps(config)
    assert (plan.rounds, plan.rollouts, plan.steps_per_round, plan.total_steps) == (625, 128, 16, 10000)
    assert plan.ended_by == "train.total_steps = 10,000"
    assert (method.ppo_epochs, method.init_kl_coef, method.target, method.horizon) == (4, 0.05, 6, 10000)
    assert (method.gamma, method.lam, method.cliprange, method.cliprange_value) == (1, 0.95, 0.2, 0.2)
    assert method.gen_kwargs["max_new_tokens"] == 40
    assert (config.train.seq_length, config.train.batch_size, config.model.num_layers_unfrozen) == (128, 32, 2)
    assert config.optimizer.kwargs["lr"] == 1e-4
    assert config.optimizer.kwargs["betas"] == [0.9, 0.95]
    lora = {"delta_type": "lora", "modified_modules": "attention", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
    assert config.model.delta_kwargs == lora
    assert (len(recipe.data.eval_prompts), recipe.data.eval_repeats, recipe.data.prompt_words) == (4, 16, 4)
    assert (recipe.reward.classifier, recipe.reward.label) == ("lvwerra/distilbert-imdb", "POSITIVE")


def test_the_recipe_in_the_readme_is_one():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    recipe = Recipe.from_dict(parse_yaml(text, "README.md"))
    recipe.config.check()
    assert recipe.reward.function == "cats.py:count_cats"
