"""The `method` section: checked, found by name, and open to methods of one's own."""

import dataclasses

import pydantic.dataclasses
import pytest

from solotune.config import (
    ILQLConfig,
    MethodConfig,
    PPOConfig,
    RFTConfig,
    SFTConfig,
    TRLConfig,
    default_ppo_config,
    get_method,
    register_method,
)
from solotune.errors import ConfigError


@dataclasses.dataclass
@register_method
class PlainMethod(MethodConfig):
    tau: float
    repeats: int = 3


@register_method("named")
@pydantic.dataclasses.dataclass
class PydanticMethod(MethodConfig):
    tau: float


@pytest.mark.parametrize(
    ("given_value", "meant"),
    [
        ("running", "running"),
        ("ref", "ref"),
        ("ignored", "ignored"),
        ("ignore", "ignored"),
        (None, "ignored"),
        (False, "ignored"),
    ],
)
def test_reward_scalings_seen_in_the_wild(given_value, meant):
    assert PPOConfig(scale_reward=given_value).scale_reward == meant


def test_an_unsupported_reward_scaling_is_refused():
    with pytest.raises(ConfigError, match=r"method\.scale_reward = 'whiten': must be 'running', 'ref' or 'ignored'"):
        PPOConfig(scale_reward="whiten")


@pytest.mark.parametrize("off", [None, 0, False])
def test_reward_clipping_is_switched_off_as_in_trlx(off):
    assert PPOConfig(cliprange_reward=off).cliprange_reward is None


# ---- generation arguments ------------------------------------------------------------------------------------------


def test_generation_arguments_of_the_own_sampler_are_converted_and_the_others_kept():
    kwargs = {"max_new_tokens": 4.0, "top_k": 0.0, "temperature": "1e0", "eos_token_id": -1, "penalty_alpha": 0.6}
    kept = PPOConfig(gen_kwargs=kwargs).gen_kwargs
    assert kept == {"max_new_tokens": 4, "top_k": 0, "temperature": 1.0, "eos_token_id": -1, "penalty_alpha": 0.6}
    assert [type(kept[name]) for name in ("max_new_tokens", "top_k", "temperature")] == [int, int, float]
    assert kwargs["top_k"] == 0.0
    assert type(kwargs["top_k"]) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", "many"),
        ("min_new_tokens", -1),
        ("min_new_tokens", 41),
        ("top_k", 2.5),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("temperature", 0),
        ("temperature", [0.5, 0]),
        ("do_sample", 1),
    ],
)
@pytest.mark.parametrize("setting", ["gen_kwargs", "gen_experience_kwargs"])
def test_a_generation_argument_out_of_range_is_named(setting, name, value):
    with pytest.raises(ConfigError, match=rf"^method\.{setting}\.{name} = .*: must be"):
        PPOConfig(**{setting: {"max_new_tokens": 40, name: value}})


def test_methods_that_sweep_at_evaluation_take_lists():
    assert ILQLConfig(gen_kwargs={"max_new_tokens": 8, "temperature": [1, 2]}).gen_kwargs["temperature"] == [1.0, 2.0]
    with pytest.raises(ConfigError, match=r"method\.gen_kwargs\.temperature = 0"):
        SFTConfig(gen_kwargs={"max_new_tokens": 8, "temperature": [1, 0]})


# ---- methods of one's own ------------------------------------------------------------------------------------------


def test_methods_are_found_by_name_in_any_case():
    assert get_method("ppoconfig") is PPOConfig
    assert get_method("PLAINMETHOD") is PlainMethod
    assert get_method("Named") is PydanticMethod
    assert {get_method(c.__name__) for c in (ILQLConfig, SFTConfig, RFTConfig)} == {ILQLConfig, SFTConfig, RFTConfig}
    with pytest.raises(ConfigError, match=r"did you mean PPOConfig\?"):
        get_method("PPOConfg")


@pytest.mark.parametrize("cls", [PlainMethod, PydanticMethod])
def test_methods_of_ones_own_are_validated_and_round_trip(cls, tmp_path):
    name = "named" if cls is PydanticMethod else "plainmethod"
    assert type(cls(name, 1).tau) is float
    with pytest.raises(ConfigError, match=r"method\.tau = 'x': must be"):
        cls(name, "x")
    values = {**default_ppo_config().to_dict(), "method": {"name": name, "tau": 2}}
    config = TRLConfig.from_dict(values)
    assert type(config.method) is cls
    config.save_yaml(tmp_path / "c.yaml")
    assert TRLConfig.load_yaml(tmp_path / "c.yaml") == config
    with pytest.raises(ConfigError, match=r"unknown setting method\.tao .*did you mean tau\?"):
        config.evolve(method=dict(tao=1))


def test_a_method_with_the_name_of_another_is_refused():
    with pytest.raises(ConfigError, match=r"method\.name = 'ILQLConfig': names ILQLConfig, this is PPOConfig"):
        PPOConfig(name="ILQLConfig")
    with pytest.raises(ConfigError, match=r"start_percentile = 0\.9: must be at most"):
        RFTConfig(start_percentile=0.9, end_percentile=0.8)
