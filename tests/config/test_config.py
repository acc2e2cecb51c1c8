"""Settings: what people mean is understood, everything else is an error that names it; nothing is lost or changed."""

import copy
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from solotune.config import (
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SchedulerConfig,
    SFTConfig,
    TokenizerConfig,
    TrainConfig,
    TRLConfig,
    default_ppo_config,
    describe_steps,
)
from solotune.config.yaml import to_yaml
from solotune.errors import ConfigError

SIZES = dict(total_steps=10, seq_length=64, epochs=2, batch_size=8, checkpoint_interval=5, eval_interval=5)
LORA = {"delta_type": "lora", "modified_modules": "attention", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05}


def train(**changes) -> TrainConfig:
    return TrainConfig(**{**SIZES, **changes})


# ---- numbers and words as people write them ------------------------------------------------------------------------


def test_yaml_exponents_without_a_dot_are_numbers(tmp_path):
    config = default_ppo_config().to_dict()
    text = yaml.safe_dump({**config, "optimizer": None}).replace(
        "optimizer: null", "optimizer: {name: adamw, kwargs: {lr: 1e-4}}"
    )
    (tmp_path / "c.yaml").write_text(text.replace("init_kl_coef: 0.001", "init_kl_coef: 5e-2"))
    loaded = TRLConfig.load_yaml(tmp_path / "c.yaml")
    assert loaded.optimizer.kwargs["lr"] == 1e-4
    assert loaded.method.init_kl_coef == 0.05


@pytest.mark.parametrize("value", [8, 8.0, "8e0", np.int64(8), np.float32(8)])
def test_a_whole_number_in_any_spelling_is_an_int(value):
    size = train(batch_size=value).batch_size
    assert size == 8
    assert type(size) is int


@pytest.mark.parametrize("value", ["x", "8", True, 2.5, float("nan"), float("inf"), None, [8], 0, -1])
def test_what_is_no_positive_whole_number_is_refused(value):
    with pytest.raises(ConfigError, match=r"^train\.batch_size = .*must be"):
        train(batch_size=value)


@pytest.mark.parametrize(("value", "meant"), [(1, 1.0), ("1e-4", 1e-4), (np.float32(0.5), 0.5)])
def test_numbers_are_floats(value, meant):
    gamma = PPOConfig(gamma=value).gamma
    assert gamma == meant
    assert type(gamma) is float


@pytest.mark.parametrize("value", [True, "1", float("nan"), 1.5, -0.1])
def test_what_is_no_number_in_range_is_refused(value):
    with pytest.raises(ConfigError, match=r"method\.gamma"):
        PPOConfig(gamma=value)


@pytest.mark.parametrize("name", ["horizon", "init_kl_coef", "vf_coef", "ref_mean"])
def test_numbers_are_finite(name):
    with pytest.raises(ConfigError, match=rf"method\.{name} = inf: must be a finite number"):
        PPOConfig(**{name: float("inf")})


def test_names_of_optimizers_and_schedulers_ignore_case_and_are_checked():
    assert OptimizerConfig("AdamW_8bit_BNB").name == "adamw_8bit_bnb"
    assert SchedulerConfig("Linear").name == "linear"
    with pytest.raises(
        ConfigError, match=r"optimizer\.name = 'adamv'.*did you mean adamw\?|optimizer\.name.*did you mean adam"
    ):
        OptimizerConfig("adamv")
    with pytest.raises(ConfigError, match=r"scheduler\.name = 'cosine': .*did you mean cosine_annealing\?"):
        SchedulerConfig("cosine")


def test_fields_are_in_trlx_order():
    config = TrainConfig(1000, 48, 4, 8, 100, 50, "PromptPipeline", "AcceleratePPOTrainer", {}, "project", "run")
    assert (config.total_steps, config.seq_length, config.epochs, config.run_name) == (1000, 48, 4, "run")
    ppo = PPOConfig(
        "PPOConfig", 2, 64, 32, 0.1, 6, 1000, 1, 0.9, 0.1, 0.3, 0.5, None, 0.0, 1.0, 5, {"max_new_tokens": 7}
    )
    assert (ppo.ppo_epochs, ppo.chunk_size, ppo.lam, ppo.cliprange_value, ppo.cliprange_reward) == (2, 32, 0.9, 0.3, 5)
    sections = [f.name for f in dataclasses.fields(TRLConfig)]
    assert sections == ["method", "model", "optimizer", "scheduler", "tokenizer", "train"]


# ---- unknown, missing, contradicting -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "wrong", "right"),
    [
        ("train", "batchsize", "batch_size"),
        ("train", "seq_len", "seq_length"),
        ("model", "num_layer_unfrozen", "num_layers_unfrozen"),
        ("tokenizer", "pading_side", "padding_side"),
        ("optimizer", "kwarg", "kwargs"),
        ("scheduler", "kwarg", "kwargs"),
        ("method", "init_kl_coeff", "init_kl_coef"),
    ],
)
def test_an_unknown_setting_is_named_with_its_section_and_the_nearest(section, wrong, right):
    config = default_ppo_config()
    message = rf"unknown setting {section}\.{wrong} in section {section}: did you mean {right}\?"
    with pytest.raises(ConfigError, match=message):
        config.evolve(**{section: {wrong: 1}})
    with pytest.raises(ConfigError, match=message):
        TRLConfig.update(config, {f"{section}.{wrong}": 1})
    with pytest.raises(ConfigError, match=message):
        setattr(getattr(config, section), wrong, 1)


def test_every_problem_of_every_section_is_said_at_once():
    values = default_ppo_config().to_dict()
    values["train"] |= {"batch_size": 0, "sead": 1}
    values["method"]["gamma"] = "big"
    del values["tokenizer"], values["model"]["model_path"]
    with pytest.raises(ConfigError) as caught:
        TRLConfig.from_dict(values)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    for part in (
        "train.batch_size = 0",
        "train.sead",
        "method.gamma = 'big'",
        "tokenizer is missing",
        "model.model_path is",
    ):
        assert sum(part in line for line in lines) == 1


def test_direct_construction_says_one_line_a_problem():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(batch_size="x", **{k: v for k, v in SIZES.items() if k not in ("batch_size", "epochs")})
    assert sorted(str(caught.value).splitlines()) == [
        "train.batch_size = 'x': must be a whole number",
        "train.epochs is missing",
    ]
    with pytest.raises(ConfigError, match=r"train\.total_steps = 'x'"):
        TrainConfig("x", *list(SIZES.values())[1:])
    config = default_ppo_config()
    with pytest.raises(ConfigError, match=r"^train = 3: must be a mapping of settings, or a TrainConfig"):
        TRLConfig(config.method, config.model, config.optimizer, config.scheduler, config.tokenizer, 3)


def test_unknown_sections_and_flat_names_are_pointed_to_their_place():
    config = default_ppo_config()
    with pytest.raises(ConfigError, match=r"unknown section lr: did you mean optimizer\.kwargs\.lr\?"):
        TRLConfig.update(config, {"lr": 1})
    with pytest.raises(ConfigError, match=r"unknown section trian: did you mean train\?"):
        TRLConfig.update(config, {"trian.seed": 1})
    with pytest.raises(ConfigError, match=r"train = 3: must be a mapping"):
        TRLConfig.update(config, {"train": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"minibatch_size": 5}}, r"train\.minibatch_size = 5: must divide train\.batch_size, which is 32"),
        ({"method": {"num_rollouts": 100}}, r"method\.num_rollouts = 100: .*train\.batch_size.*96 or 128"),
        ({"method": {"chunk_size": 48}}, r"method\.num_rollouts = 128: .*method\.chunk_size, which is 48.*96 or 144"),
        ({"method": {"num_rollouts": 16}}, r"method\.num_rollouts = 16: .*e\.g\. 32"),
        ({"train": {"seq_length": 40}}, r"max_new_tokens = 40: must be less than train\.seq_length, which is 40"),
        ({"method": {"gen_kwargs": {"max_new_tokens": None}}}, r"method\.gen_kwargs\.max_new_tokens is missing"),
        (
            {"method": {"gen_experience_kwargs": {"top_k": 0}}},
            r"method\.gen_experience_kwargs\.max_new_tokens is missing",
        ),
        (
            {"method": {"gen_kwargs": {"max_new_tokens": [8, 9], "temperature": [0.5, 1.0], "eos_token_id": [1, 2]}}},
            r"method\.gen_kwargs has lists for max_new_tokens and temperature: .*one list",
        ),
        ({"method": {"gen_experience_kwargs": {"max_new_tokens": [8, 9]}}}, r"gen_experience_kwargs\.max_new_tokens"),
        ({"method": {"name": "PPO2"}}, r"method\.name = 'PPO2': no such method; .*PPOConfig"),
        ({"model": {"num_layers_unfrozen": 0}}, r"model\.num_layers_unfrozen = 0: nothing would train"),
        ({"model": {"num_layers_unfrozen": -2}}, r"model\.num_layers_unfrozen = -2: must be at least -1"),
        ({"train": {"tracker": "wanb"}}, r"train\.tracker = 'wanb': .*did you mean wandb\?"),
        ({"train": {"run_name": 2024}}, r"train\.run_name = 2024: must be text \(in YAML, put it in quotes\)"),
    ],
)
def test_contradicting_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        default_ppo_config().evolve(**changes)


@pytest.mark.parametrize(("rollouts", "chunk", "batch"), [(128, 128, 32), (64, 16, 4), (128, 256, 128), (8, 1, 8)])
def test_sizes_of_trlx_configs_are_accepted(rollouts, chunk, batch):
    sizes = dict(num_rollouts=rollouts, chunk_size=chunk)
    config = default_ppo_config().evolve(train=dict(batch_size=batch), method=sizes)
    assert (config.method.num_rollouts, config.method.chunk_size, config.train.batch_size) == (rollouts, chunk, batch)


def test_contradictions_after_assignment_are_found_by_check():
    config = default_ppo_config()
    config.train.batch_size = 24  # as trlX scripts do; the rollouts may be assigned next
    with pytest.raises(ConfigError, match="num_rollouts"):
        config.check()
    config.method.num_rollouts = 48
    config.method.chunk_size = 48
    config.check()
    config.train.minibatch_size = 7
    with pytest.raises(ConfigError, match="minibatch_size"):
        config.check()
    with pytest.raises(ConfigError, match=r"train\.batch_size = 'x'"):
        config.train.batch_size = "x"
    assert config.train.batch_size == 24


# ---- model ---------------------------------------------------------------------------------------------------------


def test_lora_settings_of_both_generations():
    assert ModelConfig("m", num_layers_unfrozen=2, delta_kwargs=LORA).delta_kwargs == LORA
    peft = {"peft_type": "LORA", "r": 8, "target_modules": ("q_proj",)}
    assert ModelConfig("m", peft_config=peft).peft_config == {**peft, "target_modules": ["q_proj"]}
    with pytest.raises(ConfigError, match=r"model\.delta_kwargs and model\.peft_config are both given"):
        ModelConfig("m", peft_config=peft, delta_kwargs=LORA)
    with pytest.raises(ConfigError, match=r"model\.num_layers_unfrozen = 0: model\.delta_kwargs puts LoRA on the last"):
        ModelConfig("m", num_layers_unfrozen=0, delta_kwargs=LORA)
    default_ppo_config().evolve(model=dict(num_layers_unfrozen=0, peft_config=peft))  # trains: PEFT ignores it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta_type": "adapter"}, r"model\.delta_kwargs\.delta_type = 'adapter': must be lora"),
        ({"delta_type": None}, r"model\.delta_kwargs\.delta_type = None: must be lora"),
        ({"lora_a": 0.5}, r"unknown setting model\.delta_kwargs\.lora_a .*did you mean lora_alpha\?"),
        ({"lora_r": 0}, r"model\.delta_kwargs\.lora_r = 0: must be at least 1"),
        ({"lora_dropout": 1}, r"model\.delta_kwargs\.lora_dropout = 1: must be at least 0 and less than 1"),
        ({"modified_modules": "atention"}, r"modified_modules = 'atention': .*did you mean attention\?"),
        ({"modified_modules": []}, r"modified_modules = \[\]: must be one of all, attention, mlp, or a list"),
    ],
)
def test_delta_kwargs_are_checked_key_by_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig("m", delta_kwargs={**LORA, **changes})


def test_a_peft_mapping_has_to_name_its_type():
    with pytest.raises(ConfigError, match=r"model\.peft_config\.peft_type"):
        ModelConfig("m", peft_config={"r": 8})


@pytest.mark.parametrize("value", ["", "  ", 3, None, {"a": 1}])
def test_model_path_is_a_name_or_a_model(value):
    with pytest.raises(ConfigError, match=r"model\.model_path = .*: must be a model's name or folder"):
        ModelConfig(value)


def test_model_and_peft_objects_are_kept_as_they_are_and_saved_readably(tmp_path):
    from peft import LoraConfig
    from transformers import GPT2Config

    architecture, lora = GPT2Config(n_layer=2), LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    config = default_ppo_config().evolve(model=dict(model_path=architecture, peft_config=lora))
    assert config.model.model_path is architecture
    assert config.to_dict()["model"]["peft_config"] is lora
    config.save_yaml(tmp_path / "c.yaml")
    loaded = TRLConfig.load_yaml(tmp_path / "c.yaml")
    assert loaded.model.model_path == "<GPT2Config>"
    assert loaded.model.architecture["n_layer"] == 2
    assert loaded.model.peft_config["r"] == 4
    assert loaded.model.peft_config["target_modules"] == ["c_attn"]
    assert json.loads(str(config))["train"]["batch_size"] == 32


def test_paths_may_be_path_objects(tmp_path):
    assert ModelConfig(tmp_path).model_path == str(tmp_path)
    assert TokenizerConfig(tmp_path).tokenizer_path == str(tmp_path)
    assert train(checkpoint_dir=tmp_path).checkpoint_dir == str(tmp_path)


# ---- copies and round trips ----------------------------------------------------------------------------------------


def test_no_configuration_of_the_caller_is_changed_or_shared():
    config = default_ppo_config().evolve(model=dict(delta_kwargs=LORA))
    before = copy.deepcopy(config)
    values = config.to_dict()
    unchanged = copy.deepcopy(values)
    changes = {"train.seed": 1, "method": {"gen_kwargs": {"top_k": 5}}, "model": {"delta_kwargs": {"lora_r": 2}}}
    changes_before = copy.deepcopy(changes)

    built = TRLConfig.from_dict(values)
    built.optimizer.kwargs["betas"].append(1)
    built.model.delta_kwargs["lora_r"] = 99
    updated = TRLConfig.update(values, changes)
    updated.method.gen_kwargs["top_k"] = 7
    evolved = config.evolve(train=dict(seed=5), optimizer=dict(kwargs=dict(momentum=0.5)))
    evolved.optimizer.kwargs["betas"].append(1)
    TRLConfig.update(config, changes).model.delta_kwargs["lora_r"] = 3
    config.to_dict()["optimizer"]["kwargs"]["betas"].clear()

    assert config == before
    assert values == unchanged
    assert changes == changes_before


def test_update_takes_dotted_and_nested_settings_in_order():
    config = default_ppo_config()
    updated = TRLConfig.update(
        config,
        {"train.seed": 4, "train": {"epochs": 7}, "optimizer.kwargs.lr": 1e-5, "method": {"gen_kwargs.min_p": 0.1}},
    )
    assert (updated.train.seed, updated.train.epochs) == (4, 7)
    assert updated.optimizer.kwargs == {**config.optimizer.kwargs, "lr": 1e-5}
    assert updated.method.gen_kwargs == {**config.method.gen_kwargs, "min_p": 0.1}
    assert TRLConfig.update(config.to_dict(), {"train.seed": 1, "train": {"seed": 2}}).train.seed == 2


def test_keys_with_dots_inside_free_dicts_are_kept():
    peft = {"peft_type": "LORA", "rank_pattern": {"model.layers.0": 4}}
    assert default_ppo_config().evolve(model=dict(peft_config=peft)).model.peft_config == peft


def test_sections_may_be_given_as_objects_and_are_not_lost():
    config = default_ppo_config()
    sections = {name: getattr(config, name) for name in config.to_dict()}
    updated = TRLConfig.update(sections, {"train.seed": 4})
    assert updated == config.evolve(train=dict(seed=4))
    assert config.train.seed == 1000


def test_a_section_object_replaces_a_section():
    config = default_ppo_config().evolve(
        train=train(), method=PPOConfig(num_rollouts=16, gen_kwargs={"max_new_tokens": 3})
    )
    assert config.train == train()
    assert config.method.gen_kwargs == {"max_new_tokens": 3}


def test_default_ppo_config_is_trlx_s(tmp_path):
    config = default_ppo_config()
    assert (config.model.model_path, config.model.num_layers_unfrozen) == ("lvwerra/gpt2-imdb", 2)
    assert (config.method.init_kl_coef, config.method.target, config.method.lam) == (0.001, None, 0.95)
    assert config.optimizer.kwargs == {"lr": 3e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-6}
    config.save_yaml(tmp_path / "c.yaml")
    assert TRLConfig.load_yaml(tmp_path / "c.yaml") == config
    assert TRLConfig.from_dict(config.to_dict()) == config


trainer_kwargs = st.dictionaries(
    st.text(max_size=5), st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5), max_size=3
)


@settings(max_examples=30, deadline=None)
@given(extra=trainer_kwargs, name=st.text(min_size=1, max_size=10), seed=st.integers(0, 2**40), lr=st.floats(1e-12, 1))
def test_a_configuration_survives_yaml(extra, name, seed, lr, tmp_path_factory):
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    config = default_ppo_config().evolve(
        train=dict(trainer_kwargs=extra, run_name=name, tags=[name, "1e5"], seed=seed),
        model=dict(model_extra_configs=extra),
        optimizer=dict(kwargs=dict(lr=lr)),
    )
    config.save_yaml(path)
    assert TRLConfig.load_yaml(path) == config


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", r"c\.yaml is not valid YAML: .*line 1"),
        ("train: {seed: 1, seed: 2}", r"c\.yaml is not valid YAML: 'seed' is given twice"),
        ("- a", r"c\.yaml holds \['a'\]: must be a mapping"),
        ("", r"c\.yaml holds None: must be a mapping"),
        ("x: !!python/object/apply:os.getcwd []", r"c\.yaml is not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message.replace(".*", r"(?s:.*)")):
        TRLConfig.load_yaml(tmp_path / "c.yaml")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.yaml"):
        TRLConfig.load_yaml(tmp_path / "missing.yaml")


def test_problems_in_a_file_name_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text(to_yaml(default_ppo_config().to_dict()).replace("seed: 1000", "sead: 1000"))
    with pytest.raises(ConfigError, match=r"c\.yaml: unknown setting train\.sead"):
        TRLConfig.load_yaml(tmp_path / "c.yaml")


# ---- steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "epochs", "rounds", "steps", "ended_by"),
    [
        (10000, 100, 100, 1600, "train.epochs = 100"),
        (10000, 10000, 625, 10000, "train.total_steps = 10,000"),
        (20, 100, 2, 20, "train.total_steps = 20"),
        (1, 1, 1, 1, "train.total_steps = 1"),
        (16, 1, 1, 16, "train.total_steps = 16"),
    ],
)
def test_steps_are_counted_as_in_trlx(total, epochs, rounds, steps, ended_by):
    plan = describe_steps(default_ppo_config().evolve(train=dict(total_steps=total, epochs=epochs)))
    assert (plan.rounds, plan.rollouts, plan.steps_per_round, plan.total_steps) == (rounds, 128, 16, steps)
    assert plan.ended_by == ended_by
    line = str(plan)
    assert "\n" not in line
    assert ended_by in line
    assert f"{rounds:,} round" in line
    assert f"{steps:,} optimizer step" in line
    assert ("last round stops after" in line) == (steps % 16 != 0)


def test_steps_are_counted_for_what_samples_only():
    config = default_ppo_config().evolve(method=SFTConfig())
    with pytest.raises(ConfigError, match="counted by the samples it is given"):
        describe_steps(config)


def test_configuration_does_not_import_torch():
    heavy = "{'torch', 'transformers', 'datasets', 'peft'}"
    code = f"import sys, solotune.config, solotune.cli; print({heavy} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )
