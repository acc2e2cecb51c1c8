"""Scripts in trlX's style, run unchanged."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from solotune.cli import app
from solotune.runs.folder import read_lines
from tests.compat.hub import fill_hub, save_imdb
from tests.tiny import byte_tokenizer, import_path

SCRIPTS = Path(__file__).parent / "scripts"
FEW_STEPS = {"train.total_steps": 16, "train.eval_interval": 8, "train.checkpoint_interval": 16}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return fill_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def run_script(home, tmp_path):
    """Runs a script of the folder beside, from a folder of its own that has `imdb`, as `solotune trlx` would."""
    save_imdb(tmp_path)

    def run(name, hparams=None, code=0, before="pass", **environment):
        shutil.copy(SCRIPTS / name, tmp_path) if (SCRIPTS / name).exists() else None
        names = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": import_path(), "COLUMNS": "200"}
        start = f"import sys; {before}; from solotune.cli import main; sys.argv[0] = 'solotune'; main()"
        arguments = [json.dumps(hparams)] if hparams is not None else []
        result = subprocess.run(
            [sys.executable, "-c", start, "trlx", name, *arguments],
            env={**os.environ, **names, **environment}, cwd=tmp_path, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert result.returncode == code, result.stdout[-3000:] + result.stderr[-5000:]
        return result.stdout, result.stderr

    return run


def log_records(content, header=7, block=32768):
    """The records of a log in LevelDB's format: blocks of pieces, each with a checksum, a length and a type."""
    position, parts = header, []
    while position + 7 <= len(content):
        left = block - position % block
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        if left < 7 or kind == 0:
            position += left
            continue
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield b"".join(parts)
            parts = []


def of_wandb(folder):
    """Metric -> values of an offline W&B run, read from its own file."""
    from wandb.proto.wandb_internal_pb2 import Record

    values: dict[str, list[float]] = {}
    for data in log_records(next(folder.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            values.setdefault(name, []).append(json.loads(item.value_json))
    return values


def test_the_classic_script(run_script, home, tmp_path):
    """OPT-1.3B by name, delta_kwargs, IMDB, the sentiment pipeline, W&B offline; only the steps are fewer."""
    out, _ = run_script("ppo_sentiments_opt.py", FEW_STEPS, WANDB_MODE="offline", WANDB_SILENT="true")
    run = tmp_path / "ckpts" / "ppo_sentiments_opt"
    rows, samples = read_lines(run / "metrics.jsonl"), read_lines(run / "samples.jsonl")
    assert [row["step"] for row in rows] == [16]
    assert len(samples) == 2 * 16
    assert "1 round of 128 rollouts" in out
    curve = of_wandb(tmp_path)
    means = [sum(s["reward"] for s in samples if s["step"] == step) / 16 for step in (0, 16)]
    assert curve["reward/mean"] == pytest.approx(means)
    assert curve["policy/sqrt_kl"] == pytest.approx([max(row["objective/kl"], 0.0) ** 0.5 for row in rows], abs=1e-6)
    assert {"losses/total_loss", "losses/policy_loss", "losses/value_loss", "kl_ctl_value"} <= curve.keys()
    assert any(name.startswith("samples/") for name in curve), "the table of samples"
    # What it saved loads with PEFT alone, and is on the last two blocks.
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "facebook/opt-1.3b"
    base = AutoModelForCausalLM.from_pretrained(next(home.glob("hub/models--facebook--opt-1.3b/snapshots/*")))
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "tuned"))
    layers = {name.split("layers.")[1][0] for name, _ in tuned.named_parameters() if "lora_" in name}
    assert layers == {"2", "3"}
    assert load_file(tmp_path / "tuned" / "value_head.safetensors")
    assert (run / "checkpoints" / "step_000016" / "hf_model" / "adapter_model.safetensors").exists()


def test_peft_config_and_tensorboard(run_script, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hparams = {**FEW_STEPS, "train.tracker": "tensorboard", "train.logging_dir": "logs", "train.batch_size": 16,
               "method.num_rollouts": 64, "method.gen_kwargs.max_new_tokens": 8}  # fmt: skip
    out, err = run_script("ppo_sentiments_peft.py", hparams)
    assert "evaluated:" in out
    assert "scoring 64" in out + err
    events = EventAccumulator(str(tmp_path / "logs" / "trlx"))
    events.Reload()
    samples = read_lines(tmp_path / "ckpts" / "ppo_sentiments_peft" / "samples.jsonl")
    read = [event.value for event in events.Scalars("reward/mean")]
    steps = sorted({sample["step"] for sample in samples})
    means = [sum(s["reward"] for s in samples if s["step"] == step) / 16 for step in steps]
    assert read == pytest.approx(means)
    assert [event.step for event in events.Scalars("losses/policy_loss")] == [16]


def test_dense_rewards_metadata_metrics_stop_strings_a_sweep_and_a_value_branch(run_script, tmp_path):
    (tmp_path / "rollouts").mkdir()
    hparams = {"train.total_steps": 4, "train.batch_size": 8, "method.num_rollouts": 12, "method.ppo_epochs": 2,
               "train.tracker": None}  # fmt: skip
    out, _ = run_script("ppo_dense_sentiments.py", hparams)
    assert "the last step of each pass learns from 4" in out
    run = tmp_path / "ckpts" / "ppo_dense_sentiments"
    samples = read_lines(run / "samples.jsonl")
    assert {sample["setting"] for sample in samples} == {"temperature=1.0", "temperature=0.7"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["constant"] == 1.0
    last = [s["reward"] for s in samples if s["setting"] == "temperature=1.0" and s["step"] == 4]
    assert summary["reward_after"] == pytest.approx(sum(last) / len(last))
    (logged,) = (tmp_path / "rollouts").glob("run-*")
    assert json.loads((logged / "config.json").read_text())["method"]["num_rollouts"] == 12
    (epoch,) = logged.glob("epoch-*.json")
    rollouts = json.loads(epoch.read_text())
    assert len(rollouts) == 12
    assert byte_tokenizer().decode(rollouts[0]["query_tensor"]) == rollouts[0]["prompt"]
    assert all(len(row["response_tensor"]) <= 10 for row in rollouts)
    assert list((tmp_path / "saved").glob("step_*/hf_model/model.safetensors"))
    branch = load_file(run / "model" / "value_head.safetensors")
    assert any(name.startswith("value_branch.blocks.0") for name in branch)
    AutoModelForCausalLM.from_pretrained(run / "model")


def test_an_encoder_decoder(run_script, tmp_path):
    hparams = {"train.total_steps": 4, "train.tracker": None, "method.num_rollouts": 24, "method.ppo_epochs": 2,
               "method.gen_kwargs.max_new_tokens": 8}  # fmt: skip
    out, err = run_script("ppo_sentiments_t5.py", hparams)
    assert "generated (1, 6)" in out, "the start token and five more"
    assert "tokenizer.padding_side" in out + err
    run = tmp_path / "ckpts" / "ppo_sentiments_t5"
    (row,) = read_lines(run / "metrics.jsonl")
    assert (row["rollout/response_tokens"], row["rollout/finished"]) == (8, 0)
    assert row["rollout/logprob_gap"] < 1e-4
    assert json.loads((run / "summary.json").read_text())["metrics"]["same"] == 1.0
    tuned, saved = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (tmp_path / "tuned", run / "model"))
    assert all(map(torch.equal, tuned.parameters(), saved.parameters()))


OFFLINE_STEPS = {"train.total_steps": 4, "train.eval_interval": 2, "train.batch_size": 8, "train.tracker": None,
                 "train.seq_length": 48}  # fmt: skip


def test_ilql_on_labelled_texts_is_evaluated_at_every_beta(run_script, tmp_path):
    hparams = {**OFFLINE_STEPS, "method.gen_kwargs": {"max_new_tokens": 6, "top_k": 20, "beta": [0, 4]}}
    out, err = run_script("ilql_sentiments.py", hparams)
    assert "sentiments: " in out
    assert "80 of 160 samples have more than train.seq_length = 48 tokens" in (out + err).replace("\n", " ")
    run = tmp_path / "ckpts" / "ilql_sentiments"
    rows = read_lines(run / "samples.jsonl")
    assert {row["setting"] for row in rows} == {"beta=0.0", "beta=4.0"}
    assert all(row["reward"] is None for row in rows)
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == 4
    assert (run / "model" / "ilql_heads.safetensors").exists()


def test_sft_on_texts_saves_what_transformers_load(run_script, tmp_path):
    run_script("sft_sentiments.py", {**OFFLINE_STEPS, "method.gen_kwargs": {"max_new_tokens": 6}})
    summary = json.loads((tmp_path / "ckpts" / "sft_sentiments" / "summary.json").read_text())
    assert summary["metrics"].keys() == {"sentiments"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "reviews-sft")


def test_sft_on_dialogues_with_stop_sequences_and_an_adapter(run_script, tmp_path):
    out, _ = run_script("sft_dialogue.py")
    assert "loss fell: 6" in out
    run = tmp_path / "ckpts" / "dialogue" / "sft_dialogue"
    rows = read_lines(run / "metrics.jsonl")
    assert rows[-1]["objective/loss"] < rows[0]["objective/loss"]
    assert not any("Human:" in row["output"] or "a" in row["output"] for row in read_lines(run / "samples.jsonl"))
    assert (run / "adapter" / "adapter_model.safetensors").exists()


def test_ilql_from_random_weights_and_the_older_dataset_argument(run_script, tmp_path):
    out, err = run_script("ilql_random_init.py", {"train.seed": 3})
    assert "qs: 2" in out
    assert "deprecated" in out + err
    settings = {row["setting"] for row in read_lines(tmp_path / "ckpts" / "ilql_random_init" / "samples.jsonl")}
    assert settings == {"beta=0.0", "beta=1.0", "beta=100.0"}


def test_rejection_sampling(run_script, tmp_path):
    """An RFTConfig, a reward function of exactly three names, and the model as transformers load it."""
    out, _ = run_script("rft_sentiments.py", {"train.epochs": 3, "method.n_generations_per_prompt": 6})
    assert "3 rounds of 6 samples a prompt" in out
    steps = int(re.search(r"trained: RFTTrainer (\d+)", out)[1])
    run = tmp_path / "ckpts" / "rft_sentiments"
    rows = read_lines(run / "metrics.jsonl")
    assert [row["round"] for row in rows] == [1, 2, 3]
    learned = [row for row in rows if row["rollout/selected"] > 0]
    assert rows[-1]["step"] == steps == len(learned) >= 1
    assert all(row["objective/selected_score"] > row["objective/score"] for row in learned)
    assert len(read_lines(run / "samples.jsonl")) == 2 * 8
    AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")


def test_the_lines_of_the_readme(run_script, tmp_path):
    """The README's script says nothing of its 10,000 steps, so the defaults themselves are made shorter."""
    shorter = (
        "import solotune.config as c; default = c.default_ppo_config; "
        "c.default_ppo_config = lambda: default().evolve(train=dict(total_steps=8), method=dict(num_rollouts=32))"
    )
    out, _ = run_script("readme.py", before=shorter)
    (length,) = map(int, re.findall(r"generated torch\.Size\(\[1, (\d+)\]\)", out))
    assert 26 < length <= 26 + 40
    assert "no W&B log" in out
    before, after = tmp_path / "ckpts" / "readme.1", tmp_path / "ckpts" / "readme"
    assert {before.exists(), after.exists()} == {True}
    first = read_lines(before / "samples.jsonl")[0]
    assert first["prompt"] == "", "the default prompt is the BOS, of which a person sees nothing"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output_model")
    assert model.config.model_type == "gpt2"


def test_a_method_a_trainer_and_a_pipeline_of_ones_own(run_script, tmp_path):
    out, _ = run_script("own_parts.py")
    assert "told: y 6 2 ['QUIET', 'STILL'] 0.5" in out
    (first, _second) = read_lines(tmp_path / "ckpts" / "own_parts" / "metrics.jsonl")
    assert first["policy/loss"] == pytest.approx(17.0)


@pytest.mark.parametrize(
    ("body", "said", "unsaid"),
    [
        ("def f():\n    return 1 / 0\nf()\n", ["dying.py\", line 2, in f", "ZeroDivisionError"], ["runpy", "typer"]),
        ("import trlx\ntrlx.train('nowhere/at-all', reward_fn=len, prompts=['a'])\n",
         ["dying.py\", line 2", "nowhere/at-all"], ["runpy", "run.py"]),
        ("from trlx.utils.loading import get_trainer\nget_trainer('AcceleratePPOTrainr')\n",
         ["did you mean AcceleratePPOTrainer"], ["registry.py"]),
        ("from trlx.data.default_configs import TRLConfig, default_ppo_config as d\n"
         "TRLConfig.update(d(), {'method.gamm': 1})\n",
         ["did you mean gamma"], ["validation.py"]),
        ("from trlx.trainer.nemo_ppo_trainer import NeMoPPOTrainer\nNeMoPPOTrainer(config=None)\n",
         ["NeMo is not supported"], ["shims.py"]),
        ("import trlx\nfrom trlx.data.default_configs import default_ppo_config\ndef scored(samples, **_):\n"
         "    return samples['none']\ntrlx.train('gpt2', reward_fn=scored, prompts=['a'])\n",
         ["dying.py\", line 4, in scored", "TypeError", "dying.py\", line 5", "RewardError"],
         ["functions.py", "typer"]),
        ("def f(:\n", ["dying.py\", line 1", "SyntaxError"], ["runpy", "typer"]),
        ("import trlx\ntrlx.train(samples=['a'], rewards=[1.0, 2.0])\n", ["2 rewards for 1 samples"], []),
    ],
    ids=["dies", "no such model", "unknown trainer", "unknown setting", "nemo", "reward dies", "syntax", "offline"],
)  # fmt: skip
def test_a_script_that_dies_shows_its_own_line(run_script, tmp_path, body, said, unsaid):
    (tmp_path / "dying.py").write_text(body)
    _, err = run_script("dying.py", code=1)
    for text in said:
        assert text in err, err
    for text in unsaid:
        assert text not in err, err


def test_options_reach_the_script(tmp_path):
    (tmp_path / "says.py").write_text("import json, sys\njson.dump(sys.argv[1:], open(sys.argv[0] + '.json', 'w'))\n")
    given = ["--help", "--seed", "3", '{"train.seed": 1}']
    result = CliRunner().invoke(app, ["trlx", str(tmp_path / "says.py"), *given])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "says.py.json").read_text()) == given


def test_a_script_that_is_not_there(run_script):
    _, err = run_script("nowhere.py", code=2)
    assert "no script 'nowhere.py'" in err
