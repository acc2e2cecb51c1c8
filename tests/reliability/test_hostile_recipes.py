"""Recipes of every kind of nonsense are accepted or refused with an error of our own: nothing else, no hang."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from solotune.config import PPOConfig, Recipe, TRLConfig, describe_steps, parse_override
from solotune.config.yaml import to_yaml
from solotune.errors import ConfigError
from tests.reliability import hostile
from tests.reliability.hostile import examples, in_time, refused_or

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TEXTS = [path.read_text() for path in FILES]
VALID = [yaml.safe_load(text) for text in TEXTS]
CONFIGS = [{k: v for k, v in values.items() if k not in ("data", "reward")} for values in VALID]


def use(config: TRLConfig) -> None:
    """What every command does with a configuration first."""
    str(config)
    if isinstance(config.method, PPOConfig):
        str(describe_steps(config))


def used(recipe, folder):
    """An accepted recipe can be shown, and written and read again to the same."""
    with in_time():
        use(recipe.config)
        recipe.save_yaml(folder / "again.yaml")
        assert to_yaml(Recipe.load_yaml(folder / "again.yaml").to_dict()) == to_yaml(recipe.to_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


@examples(3000)
@given(values=hostile.mutated(VALID, hostile.VALUES))
def test_mappings(values, folder):
    recipe = refused_or(lambda: Recipe.from_dict(values))
    if recipe is not None:
        used(recipe, folder)


@examples(3000)
@given(content=hostile.yaml_texts(TEXTS))
def test_yaml_files(content, folder):
    path = folder / "given.yaml"
    path.write_bytes(content)
    recipe = refused_or(lambda: Recipe.load_yaml(path))
    if recipe is not None:
        used(recipe, folder)
    assert not Path("/tmp/solotune-was-here").exists()


NAMES = sorted({".".join(map(str, path)) for values in VALID for path in hostile.paths(values)})


@examples(1000)
@given(
    st.builds(
        lambda name, between, value: name + between + value,
        st.sampled_from(NAMES) | hostile.TEXTS,
        st.sampled_from(["=", "=", "=", "==", " = ", ":", ""]),
        st.sampled_from(hostile.YAML_ODDITIES) | hostile.TEXTS,
    )
)
def test_overrides(text):
    if refused_or(lambda: parse_override(text)) is not None:
        recipe = refused_or(lambda: Recipe.load_yaml(FILES[0], [text]))
        if recipe is not None:
            use(recipe.config)


@examples(1000)
@given(
    base=st.sampled_from(CONFIGS),
    changes=st.dictionaries(st.sampled_from(NAMES) | hostile.TEXTS, hostile.VALUES, max_size=3) | hostile.VALUES,
)
def test_changes(base, changes):
    before = copy.deepcopy(base)
    config = refused_or(lambda: TRLConfig.update(base, changes))
    if config is not None:
        use(config)
    if isinstance(changes, dict) and all(isinstance(key, str) for key in changes):
        evolved = refused_or(lambda: TRLConfig.from_dict(base).evolve(**changes))
        assert (evolved is None) == (config is None)
    assert base == before
    refused_or(lambda: TRLConfig.from_dict(changes))
    refused_or(lambda: Recipe.from_dict(changes))


@pytest.mark.parametrize("monster", hostile.MONSTERS)
@pytest.mark.parametrize(
    ("section", "setting"), [("data", "prompts"), ("model", "architecture"), ("method", "gen_kwargs")]
)
def test_values_that_no_memory_holds(monster, section, setting):
    values = {**VALID[0], section: {**VALID[0][section], setting: hostile.MONSTERS[monster]}}
    for make in (
        lambda: Recipe.from_dict(values),
        lambda: Recipe.from_dict(hostile.MONSTERS[monster]),
        lambda: TRLConfig.update(CONFIGS[0], {section: values[section]}),
        lambda: TRLConfig.update(CONFIGS[0], {f"{section}.{setting}": hostile.MONSTERS[monster]}),
        lambda: TRLConfig.from_dict(CONFIGS[0]).evolve(**{section: values[section]}),
    ):
        with in_time(), pytest.raises(ConfigError):
            make()


def test_a_few_lines_that_stand_for_a_billion_values(tmp_path):
    (tmp_path / "laughs.yaml").write_text(hostile.LAUGHS + TEXTS[0])
    with in_time(), pytest.raises(ConfigError, match=r"stand for .* values"):
        Recipe.load_yaml(tmp_path / "laughs.yaml")
    with in_time(), pytest.raises(ConfigError, match=r"stand for .* values"):
        parse_override("data.prompts={" + hostile.LAUGHS.replace("\n", ", ") + "}")


def test_no_divisor_is_looked_for_among_a_quadrillion():
    values = {**CONFIGS[0], "train": {**CONFIGS[0]["train"], "batch_size": 10**15, "minibatch_size": 7}}
    with in_time(), pytest.raises(ConfigError, match="must divide train"):
        TRLConfig.from_dict(values)
