"""Tokens and keys from the environment are in no file of a run, and a recipe with one in it is refused."""

import pytest
import yaml
from typer.testing import CliRunner

from solotune.cli import app
from solotune.config import Recipe, TRLConfig
from solotune.errors import ConfigError
from tests.tiny import tiny_ppo_config

MARKER = "5ec2e7" * 8
VARIABLES = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY",
             "COMET_API_KEY", "MLFLOW_TRACKING_PASSWORD", "GITHUB_TOKEN", "MY_PASSWORD"]  # fmt: skip


@pytest.fixture(scope="module")
def values(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "reward.py").write_text(
        "def vowels(outputs, **_):\n    return [o.count('a') / 6 for o in outputs]\n"
        "def failing(outputs, **_):\n    raise ValueError('no')\n"
    )
    values = tiny_ppo_config(tiny_folder).evolve(train={"epochs": 1}).to_dict()
    values["data"] = {"prompts": ["a film", "so"]}
    values["reward"] = {"function": f"{folder / 'reward.py'}:vowels"}
    return values


@pytest.mark.parametrize(("tracker", "function"), [(None, "failing"), ("wandb", "vowels")])
def test_no_file_of_a_run_has_one(values, tmp_path, monkeypatch, tracker, function):
    if tracker is not None:
        pytest.importorskip(tracker)
    reward = values["reward"]["function"].replace("vowels", function)
    logs = tmp_path / "logs"
    logs.mkdir()
    train = {**values["train"], "tracker": tracker, "rollout_logging_dir": str(logs)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "train": train, "reward": {"function": reward}}))
    for index, name in enumerate(VARIABLES):
        monkeypatch.setenv(name, f"{MARKER}{index:x}"[-40:])
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == (1 if function == "failing" else 0), result.output[-2000:]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    if tracker is not None:
        assert any("wandb" in str(path) for path in files)
    for path in files:
        assert MARKER[:20].encode() not in path.read_bytes(), path
    assert MARKER[:20] not in result.output


@pytest.mark.parametrize(
    ("section", "change", "place"),
    [
        ("model", {"model_extra_configs": {"token": "abc"}}, "model.model_extra_configs.token"),
        (
            "model",
            {"model_extra_configs": {"a": {"b": [{"HF_TOKEN": "abc"}]}}},
            "model.model_extra_configs.a.b.0.HF_TOKEN",
        ),
        ("model", {"model_path": "https://me:hunter2@hub.example/x"}, "model.model_path"),
        ("model", {"model_path": "https://hub.example/x?token=hunter2"}, "model.model_path"),
        ("tokenizer", {"tokenizer_path": "https://me:hunter2@hub.example/x"}, "tokenizer.tokenizer_path"),
        ("tokenizer", {"tokenizer_extra_configs": {"use_auth_token": "abc"}}, "tokenizer_extra_configs.use_auth_token"),
        ("train", {"trainer_kwargs": {"wandb_api_key": "abc"}}, "train.trainer_kwargs.wandb_api_key"),
        ("train", {"tags": ["hf_" + "a1" * 17]}, "train.tags.0"),
        ("method", {"gen_kwargs": {"max_new_tokens": 6, "token": "abc"}}, "method.gen_kwargs.token"),
        ("data", {"prompts": "s3://key:hunter2@bucket/x.json"}, "data.prompts"),
        ("data", {"eval_prompts": "https://x/y.json?access_token=hunter2"}, "data.eval_prompts"),
        ("reward", {"function": "https://me:hunter2@x/reward.py:f"}, "reward.function"),
        ("reward", {"function": None, "classifier": "https://me:hunter2@x/y", "label": "good"}, "reward.classifier"),
    ],
)
def test_a_recipe_with_one_is_refused_and_the_secret_is_not_repeated(values, section, change, place):
    changed = {**values, section: {**values[section], **change}}
    with pytest.raises(ConfigError, match="secrets do not belong") as error:
        Recipe.from_dict(changed)
    assert place in str(error.value)
    assert not any(secret in str(error.value) for secret in ("hunter2", "abc", "a1a1"))


def test_what_only_looks_like_one_is_accepted(values):
    texts = ["see https://me:hunter2@example.org", "token=3", "my password: sk-" + "a" * 30]
    harmless = {"data": {"prompts": texts}, "train": {**values["train"], "tags": ["token", "sk-learn", "hf_hub"]}}
    assert Recipe.from_dict({**values, **harmless}).data.prompts == texts
    extra = {"pad_token": "<pad>", "eos_token": "</s>", "additional_special_tokens": ["<a>"], "token": None}
    gen = {"max_new_tokens": 6, "eos_token_id": 3, "pad_token_id": 3}
    config = TRLConfig.from_dict({k: v for k, v in values.items() if k not in ("data", "reward")})
    assert config.evolve(tokenizer={"tokenizer_extra_configs": extra}, method={"gen_kwargs": gen}) is not None
