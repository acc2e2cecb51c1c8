"""Nothing of a checkpoint, a model, a recipe or a data set is unpickled or run, but a reward function's own file."""

import ast
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from solotune.config import DataConfig, Recipe, TokenizerConfig
from solotune.data.prompts import Prompts, load_prompts
from solotune.data.ratings import load_feedback
from solotune.errors import SolotuneError
from solotune.models.loading import build_policy, load_tokenizer
from solotune.rewards.base import load_base
from solotune.rewards.classifier import load_classifier, load_reward_model
from solotune.trainers.ppo import PPOTrainer
from tests.tiny import tiny_lm, tiny_ppo_config

SOURCE = Path(__file__).parents[2] / "src"
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "torch.load", "numpy.load", "np.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "pandas.read_pickle",
    "os.system", "os.popen", "eval", "exec", "compile", "__import__", "execfile",
}  # fmt: skip
RUNS_CODE = {  # what is there to run a person's file, and says so
    ("solotune/rewards/functions.py", "spec.loader.exec_module"),
    ("solotune/compat/script.py", "runpy.run_path"),
    ("solotune/compat/script.py", "_run_module"),
    ("solotune/compat/script.py", "runpy.run_module"),
    ("solotune/sweep/trial.py", "spec.loader.exec_module"),
}


def named(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def test_the_code_has_no_call_that_unpickles_or_runs_texts():
    seen = set()
    for path in sorted(SOURCE.rglob("*.py")):
        where = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module or ""}
                assert not {module.split(".")[0] for module in modules} & FORBIDDEN_MODULES, where
            if not isinstance(node, ast.Call):
                continue
            name = named(node.func)
            assert name not in FORBIDDEN_CALLS, f"{where}:{node.lineno}: {name}"
            if name == "yaml.load":
                assert [ast.unparse(argument) for argument in node.args[1:]] == ["_Loader"], f"{where}:{node.lineno}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("shell") != "True"
            assert keywords.get("allow_pickle") != "True"
            assert keywords.get("use_safetensors", "True") == "True"
            assert keywords.get("trust_remote_code", "False") != "True"
            if name.endswith(("exec_module", "run_path", "run_module")):
                seen.add((where, name))
    assert seen == RUNS_CODE


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.fixture
def payload(tmp_path, monkeypatch):
    """Bytes that must not be unpickled, and a guard on every door to it."""

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    content = pickle.dumps(Payload(tmp_path / "ran"))
    with monkeypatch.context() as patch:
        for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
            patch.setattr(module, name, refuse)
        yield content
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def pickled_model(tiny_folder, payload, tmp_path):
    """A model's folder, whose weights are there as pickles only."""
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "critic.bin", "training_args.bin"):
        (folder / name).write_bytes(payload)
    return folder


def test_models(pickled_model, tiny_folder, tmp_path):
    config = tiny_ppo_config(tiny_folder)
    (pickled_model / "reward_model.json").write_text(json.dumps({"fingerprint": "x", "offset": 0.0}))
    for load in (
        lambda: build_policy(config.evolve(model={"model_path": str(pickled_model)})),
        lambda: load_classifier(str(pickled_model), "good"),
        lambda: load_reward_model(pickled_model),
        lambda: load_base(str(pickled_model), torch.device("cpu")),
    ):
        with pytest.raises(SolotuneError, match="safetensors"):
            load()


def test_an_adapter_beside_a_model(pickled_model, tiny_folder):
    """transformers itself adds an adapter that lies in a model's folder."""
    shutil.copy(tiny_folder / "model.safetensors", pickled_model)
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(tiny_folder)}
    (pickled_model / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
    with pytest.raises(SolotuneError, match="safetensors"):
        build_policy(tiny_ppo_config(tiny_folder).evolve(model={"model_path": str(pickled_model)}))


def test_a_trlx_adapter(pickled_model, tiny_folder):
    from solotune.compat.trlx.models.modeling_ppo import AutoModelForCausalLMWithHydraValueHead

    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(tiny_folder)}
    (pickled_model / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
    with pytest.raises(SolotuneError, match="safetensors"):
        AutoModelForCausalLMWithHydraValueHead.from_pretrained(str(pickled_model))


@pytest.fixture
def model_with_code(tiny_folder, tmp_path):
    """A model's folder with Python files for its configuration and its tokenizer, which leave a file when they run."""
    folder = tmp_path / "with_code"
    shutil.copytree(tiny_folder, folder)
    (folder / "own.py").write_text(
        f"""from pathlib import Path
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
Path({str(tmp_path / "ran")!r}).touch()
class OwnConfig(OPTConfig): model_type = "own"
class OwnLM(OPTForCausalLM): config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""
    )
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLM"}
    changes = {
        "config.json": {"model_type": "own", "auto_map": maps},
        "tokenizer_config.json": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}},
    }
    for name, change in changes.items():
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, **change}))
    return folder


def test_code_that_comes_with_a_model_runs_only_where_a_setting_says_so_and_is_told(
    model_with_code, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    given = str(model_with_code)
    config = tiny_ppo_config(model_with_code)
    trusted = config.evolve(model={"model_extra_configs": {"trust_remote_code": True}})
    for is_meta in (False, True):
        with pytest.raises(SolotuneError, match="trust_remote_code"):
            build_policy(config, meta=is_meta)
    with pytest.raises(SolotuneError, match="trust_remote_code"):
        load_tokenizer(config.tokenizer)
    assert not (tmp_path / "ran").exists()
    assert "run with your rights" not in caplog.text
    for is_meta in (False, True):
        caplog.clear()
        build_policy(trusted, meta=is_meta)
        assert (tmp_path / "ran").exists()
        assert f"model.model_extra_configs.trust_remote_code is true: Python files in {given!r} run" in caplog.text
    caplog.clear()
    load_tokenizer(TokenizerConfig(given, tokenizer_extra_configs={"trust_remote_code": True}))
    assert f"tokenizer.tokenizer_extra_configs.trust_remote_code is true: Python files in {given!r} run" in caplog.text


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_checkpoints(tiny_folder, payload, tmp_path, name):
    prompts = Prompts(["a film"])
    trainer = PPOTrainer(
        tiny_ppo_config(tiny_folder),
        lambda outputs: [0.0] * len(outputs),
        prompts,
        prompts,
        accelerator=Accelerator(cpu=True),
    )
    trainer.save(tmp_path)
    (folder,) = tmp_path.glob("step_*")
    (folder / name).write_bytes(payload)
    hashes = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
              for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(hashes))
    with pytest.raises(SolotuneError, match="cannot be read"):
        trainer.load(folder)


@pytest.mark.parametrize(
    "suffix", [".yaml", ".json", ".jsonl", ".csv", ".parquet", ".txt", ".pkl", ".pt", ".bin", ".npy"]
)
def test_recipes_and_data(payload, tmp_path, suffix):
    path = tmp_path / "data" / f"given{suffix}"
    path.parent.mkdir()
    path.write_bytes(payload)
    columns = {"text_column": "text", "rating_column": "rating", "chosen_column": "c", "rejected_column": "r"}
    for load in (
        lambda: Recipe.load_yaml(path),
        lambda: load_prompts(DataConfig(prompts=str(path))),
        lambda: load_prompts(DataConfig(prompts=str(path.parent))),  # as a dataset
        lambda: load_feedback(str(path), "ratings", low=-1, high=1, **columns),
    ):
        with pytest.raises(SolotuneError):
            load()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/object/new:pathlib.Path", "!!python/name:eval"]
)
def test_yaml_tags(tmp_path, tag):
    (tmp_path / "recipe.yaml").write_text(f"train: {tag} ['{tmp_path / 'ran'}']\n")
    with pytest.raises(SolotuneError, match="not valid YAML"):
        Recipe.load_yaml(tmp_path / "recipe.yaml")
    assert not (tmp_path / "ran").exists()


def test_the_guard_lets_safetensors_through(tmp_path, payload):
    tiny_lm().save_pretrained(tmp_path / "model")
    assert build_policy(tiny_ppo_config(tmp_path / "model")) is not None
