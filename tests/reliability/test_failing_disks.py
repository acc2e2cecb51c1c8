"""Disks that are full, read-only or broken at any operation: the last good state stays, the error names the file."""

import errno
import os
import resource
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import solotune
from solotune.data.prompts import Prompts
from solotune.errors import CheckpointError, RunFileError, SolotuneError
from solotune.report import write_report
from solotune.runs import checkpoint
from solotune.runs.folder import RunFolder
from solotune.trainers.ppo import PPOTrainer
from tests.reliability.faults import REASONS, failing_disk
from tests.reliability.hostile import SOAK
from tests.tiny import tiny_ppo_config

PROMPTS = Prompts(["a film", "so"])


def vowels(outputs, **_):
    return [sum(character in "aeiou" for character in output) / 6 for output in outputs]


@pytest.fixture
def trainer(tiny_folder, tmp_path):
    config = tiny_ppo_config(tiny_folder, train={"keep_checkpoints": 2})
    trainer = PPOTrainer(config, vowels, PROMPTS, PROMPTS, accelerator=Accelerator(cpu=True))
    trainer.run = RunFolder(tmp_path / "run")
    trainer.evaluate_and_record()
    trainer.train_round()
    return trainer


def tensors_of(trainer):
    return [p.detach().clone() for p in trainer.parameters]


@pytest.mark.parametrize("again", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("is_replayed", [False, True], ids=["a new checkpoint", "one that is taken again"])
def test_a_checkpoint_at_every_operation(trainer, again, is_replayed):
    """After each failure the newest checkpoint is whole, and is the one before or the new one."""
    states = {}

    def save(step, shift):
        trainer.steps_done = step
        with torch.no_grad():
            trainer.parameters[0].fill_(shift)
        trainer.save_checkpoint()

    save(4, 4.0)
    save(8, 8.0)
    step = 8 if is_replayed else 12
    failing = 1
    while True:
        reason = REASONS[failing % 3]
        with failing_disk(trainer.run.path, failing, reason, again) as disk:
            try:
                save(step, 12.0)
            except CheckpointError as error:
                states[failing] = str(error)
        trainer.load(trainer.run.path)  # raises where the newest is not whole
        value = float(trainer.parameters[0].flatten()[0].detach())
        assert value in (8.0, 12.0), failing
        if failing in states:
            assert f"step_{step:06d}" in states[failing]
            assert os.strerror(reason) in states[failing]
            assert "the last good one is" in states[failing]
        else:
            assert value == 12.0, "what did not fail is there"
        assert len(checkpoint.saved(trainer.run.checkpoints)) >= 1
        if disk.count < failing:
            break
        failing += 1 if SOAK else 5
        save(4, 4.0) if not is_replayed else None
        for path in trainer.run.checkpoints.glob("step_000012"):
            checkpoint.remove(path)
        save(8, 8.0)
    assert failing > 30, "a checkpoint is written in many operations"
    assert len(states) > (failing if SOAK else failing // 5) // 2
    left = [path.name for path in trainer.run.checkpoints.iterdir()]
    assert not [name for name in left if "partial" in name or "replaced" in name]


def test_a_limit_on_the_size_of_files(trainer):
    """The kernel's own refusal, which reaches writers in Rust (safetensors, tokenizers) as well."""
    trainer.save_checkpoint()
    whole = checkpoint.newest(trainer.run.path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.steps_done += 4
    sizes = sorted({path.stat().st_size for path in whole.rglob("*") if path.is_file()})
    for size in sizes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
        try:
            with pytest.raises(CheckpointError, match=r"step_000008.*(?i:file too large|os error 27).*step_000004"):
                trainer.save_checkpoint()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert checkpoint.newest(trainer.run.path) == whole
    trainer.save_checkpoint()
    assert checkpoint.newest(trainer.run.path).name == "step_000008"


ROWS = [{"round": r, "step": 4 * r, "prompt": "é", "output": "x" * 50, "reward": 0.5, "kl": 1.0} for r in range(3)]
OPERATIONS = {
    "append": (
        lambda run: run.append(run.metrics, [{"round": 3, "step": 12}, {"round": 4, "step": 16}]),
        "metrics.jsonl",
    ),
    "write_json": (lambda run: run.write_json("summary.json", {"rounds": 2}), "summary.json"),
    "cut_after": (lambda run: run.cut_after(0), "metrics.jsonl"),
    "write_report": (lambda run: write_report(run.path), "report.html"),
    "whole": (lambda run: filled(run), "adapter"),
}


def filled(run):
    with run.whole("adapter") as folder:
        for name in ("a", "b"):
            (folder / name).write_text("new")


def contents(run):
    return {
        path.relative_to(run.path).as_posix(): path.read_bytes()
        for path in sorted(run.path.rglob("*"))
        if path.is_file() and ".partial" not in str(path) and ".replaced" not in str(path)
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    run = RunFolder(tmp_path_factory.mktemp("prepared") / "run")
    for path in (run.metrics, run.samples):
        run.append(path, ROWS)
    run.write_json("summary.json", {"rounds": 1})
    (run.path / "report.html").write_text("an earlier page")
    (run.path / "adapter").mkdir()
    (run.path / "adapter" / "a").write_text("old")
    return run.path


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_file_of_a_run_is_the_old_one_or_the_new_one(prepared, tmp_path, name):
    operation, file = OPERATIONS[name]

    def copy(number):
        shutil.copytree(prepared, tmp_path / str(number) / "run")
        return RunFolder(tmp_path / str(number) / "run", continued=True)

    run = copy(0)
    old = contents(run)
    with failing_disk(run.path) as disk:
        operation(run)
    new = contents(run)
    assert disk.count >= 2
    assert new != old
    for failing in range(1, disk.count + 1):
        run, failure = copy(failing), None
        with failing_disk(run.path, failing, REASONS[failing % 3]):
            try:
                operation(run)
            except RunFileError as error:
                failure = str(error)
        found = contents(run)
        assert all(content in (old.get(key), new.get(key)) for key, content in found.items()), failing
        if failure is None:  # such as an older file that could not be removed
            assert found == new
        else:
            assert str(run.path) in failure
            assert file in failure or name == "cut_after"  # one file after the other
            assert os.strerror(REASONS[failing % 3]) in failure
            assert found == old or name == "cut_after"
            operation(run)  # the disk is well again
            assert contents(run) == new


def run(folder, out, **train):
    config = tiny_ppo_config(folder).evolve(train={"checkpoint_dir": str(out), "epochs": 3, **train})
    solotune.train(reward_fn=vowels, prompts=["a film", "so"], config=config)
    return out / "tiny"


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    return run(tiny_folder, tmp_path_factory.mktemp("whole"))


def test_a_run_on_such_a_disk_says_so_and_goes_on_to_the_same_end(tiny_folder, whole, tmp_path):
    with failing_disk(tmp_path) as disk:
        run(tiny_folder, tmp_path / "counted")
    failed = 0
    for share in (0.02, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99) if SOAK else (0.35, 0.8):
        out = tmp_path / f"{share}"
        with failing_disk(tmp_path, int(share * disk.count), errno.ENOSPC, again=True):
            try:
                run(tiny_folder, out)
                said = None
            except SolotuneError as error:
                said = str(error)
        if said is not None:
            failed += 1
            assert "No space left" in said
            assert str(out) in said
        there = checkpoint.newest(out / "tiny") if (out / "tiny").is_dir() else None
        resumed = run(tiny_folder, out, **({"resume_from_checkpoint": str(out / "tiny")} if there else {}))
        one, other = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (whole, resumed))
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
        assert (resumed / "report.html").is_file()
    assert failed >= 2


def test_a_page_that_cannot_be_written_costs_only_the_page(tiny_folder, whole, tmp_path, monkeypatch, caplog):
    real = os.replace

    def replace(source, target, **kwargs):
        if str(target).endswith("report.html"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, target, **kwargs)

    monkeypatch.setattr(os, "replace", replace)
    with caplog.at_level("WARNING"):
        folder = run(tiny_folder, tmp_path)
    assert "report.html' could not be written: [Errno 28] No space left on device" in caplog.text
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "summary.json").is_file()
    assert not (folder / "report.html").exists()
