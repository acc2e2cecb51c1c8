"""A checkpoint is whole or not there; a damaged one is named, and the one before it is used."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import solotune
from solotune.errors import CheckpointError
from solotune.runs import checkpoint
from tests.tiny import tiny_ppo_config


def vowels(outputs, **_):
    return [sum(character in "aeiou" for character in output) / 6 for output in outputs]


def run(folder, out, **train):
    config = tiny_ppo_config(folder).evolve(train={"checkpoint_dir": str(out), "epochs": 4, **train})
    solotune.train(reward_fn=vowels, prompts=["a film", "so"], config=config)
    return out / "tiny"


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """A run that nothing happened to."""
    return run(tiny_folder, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "tiny")
    return tmp_path / "tiny"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "a flipped bit in the tensors": lambda c: flip(c / "tensors.safetensors"),
    "a flipped bit in the state": lambda c: flip(c / "state.json"),
    "a flipped bit in the saved model": lambda c: flip(c / "hf_model" / "adapter_model.safetensors"),
    "a missing file": lambda c: (c / "tensors.safetensors").unlink(),
    "a file cut short": lambda c: (c / "tensors.safetensors").write_bytes(b"123"),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "a manifest of nothing": lambda c: (c / "manifest.json").write_text("{}"),
    "a manifest that is none": lambda c: (c / "manifest.json").write_text("[1"),
    "a manifest that names files elsewhere": lambda c: (c / "manifest.json").write_text('{"../../config.yaml": "x"}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_intact_checkpoint_is_used_and_the_run_ends_the_same(tiny_folder, whole, copy, damage, caplog):
    *_, before, newest = checkpoint.saved(copy / "checkpoints")
    DAMAGES[damage](newest)
    with caplog.at_level("WARNING"):
        assert checkpoint.newest(copy) == before
    assert str(newest) in caplog.text
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.newest(newest)
    resumed = run(tiny_folder, copy.parent, resume_from_checkpoint=str(copy))
    one, other = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def write(folder):
    with checkpoint.writing(folder, 99) as aside:
        for name in ("a", "b", "c"):
            (aside / name).write_text(name)


def test_a_disk_that_is_full_leaves_what_was_there(copy, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (copy / "checkpoints").rglob("*")}
    for failing in range(1, 6):
        calls = []

        def full(path, calls=calls, failing=failing):
            calls.append(path)
            if len(calls) == failing:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoint, "_to_disk", full)
        with pytest.raises(CheckpointError, match=r"step_000099.*No space left.*last good one is .*step_"):
            write(copy / "checkpoints")
    monkeypatch.undo()
    assert {path: path.stat().st_mtime_ns for path in (copy / "checkpoints").rglob("*")} == before


def test_keep_checkpoints(tiny_folder, tmp_path):
    folder = run(tiny_folder, tmp_path, keep_checkpoints=3)
    assert len(checkpoint.saved(folder / "checkpoints")) == 3
    manifest = json.loads((checkpoint.newest(folder) / "manifest.json").read_text())
    assert {"state.json", "tensors.safetensors", "hf_model/adapter_model.safetensors"} <= manifest.keys()
