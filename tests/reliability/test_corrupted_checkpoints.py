"""A thousand ways to spoil a checkpoint: it is taken for what it was, or refused with an error of the project's own.

SOLOTUNE_SOAK=1 (`make soak`) does all thousand, otherwise 250, and trains a round from those that are taken although
their content was changed and hashed anew.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from solotune.data.prompts import Prompts
from solotune.errors import SolotuneError
from solotune.runs import checkpoint
from solotune.runs.folder import RunFolder
from solotune.trainers.ppo import PPOTrainer
from tests.reliability.hostile import SOAK, in_time
from tests.tiny import tiny_ppo_config

PROMPTS = Prompts(["a film", "so"])
COUNT = 1000 if SOAK else 250
JUNK = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2.5,
    -0.0,
    10**400,
    -(10**18),
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
    "1",
    [],
    {},
    [1],
    [[]],
    {"a": 1},
    ["a"] * 625,
    "\ud800",
    "__class__",
    2**63,
    625,
]
TEXTS = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"NaN",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"a": 1}{',
    b"\x00" * 64,
    b"1" + b"0" * 10_000,
    b'{"../../../outside/keep": "x"}',
    b'{"/etc/passwd": "x"}',
    b'{"a\\u0000b": "x"}',
    b'{"state.json": null}',
    b'{"state.json": ["x"]}',
    b'{"' + b"a" * 100_000 + b'": "x"}',
    b"\x08" + b"\x00" * 7 + b"{}      ",
]


def vowels(outputs, **_):
    return [sum(character in "aeiou" for character in output) / 6 for output in outputs]


@pytest.fixture(scope="module")
def trainer(tiny_folder):
    config = tiny_ppo_config(tiny_folder, method={"target": 3.0, "init_kl_coef": 0.1, "scale_reward": "ref"})
    return PPOTrainer(config, vowels, PROMPTS, PROMPTS, accelerator=Accelerator(cpu=True))


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """A checkpoint of a real run after its first round."""
    trainer.run = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    trainer.evaluate_and_record()
    trainer.train_round()
    trainer.save_checkpoint()
    found = checkpoint.newest(trainer.run.path)
    trainer.run = None
    for path in (found / "hf_model").iterdir():  # a few files of each kind are enough, and a thousand copies faster
        if path.name != "adapter_model.safetensors":
            checkpoint.remove(path)
    hashed_anew(found)
    return found


def state_of(trainer) -> str:
    """Everything that a checkpoint restores, as one hash."""
    state = {name: value for name, value in trainer.state().items() if name != "seconds_by_phase"}  # a clock goes on
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    optimizer = trainer.optimizer.optimizer.state_dict()
    digest.update(repr((optimizer["param_groups"], random.getstate(), torch.get_rng_state().tolist())).encode())
    moments = [v for s in optimizer["state"].values() for _, v in sorted(s.items())]
    for tensor in [*trainer.parameters, *moments]:
        digest.update(tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()


def hashed_anew(folder: Path) -> None:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    hashes = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (folder / "manifest.json").write_text(json.dumps(hashes))


def spoil_files(folder: Path, draw: random.Random) -> str:
    """Files changed as disks, people and attackers change them; the manifest knows nothing of it, or is the one hit."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    file = draw.choice([*files, folder / "manifest.json", folder / "state.json", folder / "tensors.safetensors"])
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content))
    how = draw.choice(
        [
            "flip",
            "flip",
            "cut",
            "empty",
            "delete",
            "swap",
            "append",
            "text",
            "text",
            "link",
            "folder",
            "pipe",
            "zeros",
            "loop",
        ]
    )
    match how:
        case "flip":
            for _ in range(draw.choice([1, 1, 3, 50])):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
        case "cut":
            file.write_bytes(content[:at])
        case "empty":
            file.write_bytes(b"")
        case "swap":
            other = draw.choice(files)
            file_content, other_content = file.read_bytes(), other.read_bytes()
            file.write_bytes(other_content)
            other.write_bytes(file_content)
        case "append":
            file.write_bytes(content + draw.choice([b" ", b"\n", b"\x00", b"{}", content]))
        case "text":
            file.write_bytes(draw.choice(TEXTS))
        case "zeros":
            content[at : at + 4096] = bytes(min(4096, len(content) - at))
            file.write_bytes(content)
        case _:
            file.unlink()
    match how:
        case "link":
            file.symlink_to(
                draw.choice([folder.parent / "outside" / "keep", folder / "nowhere", Path("/dev/zero"), *files])
            )
        case "loop":
            file.symlink_to(file)
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
    return f"{how} {file.name}"


def places(value, prefix=()):
    found = [prefix] if prefix else []
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*prefix, key))
    return found


def spoil_state(folder: Path, draw: random.Random) -> str:
    """Other values in state.json, with hashes that say that they are right."""
    state = json.loads((folder / "state.json").read_text())
    said = []
    for _ in range(draw.choice([1, 1, 2])):
        *path, last = draw.choice(places(state))
        owner = state
        for key in path:
            owner = owner[key]
        how = draw.choice(["replace", "replace", "replace", "remove", "deep", "add"])
        if how == "remove":
            del owner[last]
        elif how == "add" and isinstance(owner, dict):
            owner[draw.choice(["optimizer", "step", "_step_count", "__class__", "x"])] = draw.choice(JUNK)
        else:
            owner[last] = draw.choice(JUNK)
        said.append(f"{how} {(*path, last)}")
        if how == "deep":
            content = json.dumps(state).replace("{", '{"deep": ' + "[" * 3000 + "]" * 3000 + ", ", 1)
            (folder / "state.json").write_text(content)
            break
    else:
        (folder / "state.json").write_text(json.dumps(state))
    if draw.random() < 0.1:
        (folder / "state.json").write_bytes(draw.choice(TEXTS))
    hashed_anew(folder)
    return ", ".join(said)


def spoil_tensors(folder: Path, draw: random.Random) -> str:
    """Tensors of other shapes, types, names and values, with hashes that say that they are right."""
    path = folder / "tensors.safetensors"
    if draw.random() < 0.3:  # the file itself: its header, mostly
        content = bytearray(path.read_bytes())
        for _ in range(draw.choice([1, 2, 20])):
            content[draw.randrange(draw.choice([8, 64, 2000, len(content)]))] ^= 1 << draw.randrange(8)
        path.write_bytes(draw.choice([content, content, content[: draw.randrange(len(content))], draw.choice(TEXTS)]))
        hashed_anew(folder)
        return "bytes"
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    how = draw.choice(["drop", "rename", "type", "shape", "longer", "empty", "values", "extra", "swap", "scalar"])
    match how:
        case "drop":
            del tensors[name]
        case "rename":
            del tensors[name]
            tensors[
                draw.choice(["x", "optimizer.x", "optimizer.9999.step", "optimizer.-1.step", "optimizer..", name + "x"])
            ] = tensor
        case "type":
            kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
            tensors[name] = tensor.to(draw.choice(kinds))
        case "shape":
            tensors[name] = tensor.reshape(-1)
        case "longer":
            tensors[name] = torch.cat([tensor.reshape(-1)] * 2)
        case "empty":
            tensors[name] = tensor.reshape(-1)[:0]
        case "values":
            tensors[name] = torch.full_like(tensor, draw.choice([0, 1, 255]))
        case "extra":
            tensors[draw.choice(["model.x", "optimizer.0.x", "random.cuda", "y"])] = tensor
        case "swap":
            other = draw.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other], tensor.clone()
        case _:
            tensors[name] = torch.tensor(1.0)
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    hashed_anew(folder)
    return f"{how} {name}"


def test_a_thousand_of_them(trainer, whole, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("kept")
    trainer.load(whole)
    original, counts = state_of(trainer), {}
    for case in range(COUNT):
        draw = random.Random(case)
        spoil = draw.choice([spoil_files, spoil_state, spoil_tensors])
        folder = tmp_path / "step_000004"
        shutil.copytree(whole, folder)
        what = f"case {case}: {spoil(folder, draw)}"
        answer = "taken"
        with in_time():
            try:
                trainer.load(folder)
                if spoil is spoil_files:
                    assert state_of(trainer) == original, f"{what} was taken for another state"
                elif SOAK and state_of(trainer) != original:
                    one_round(trainer)
            except SolotuneError as error:
                answer = str(error)
            except Exception as error:
                raise AssertionError(what) from error
        if answer != "taken":
            assert str(folder) in answer, what
            assert len(answer) < 3000, what
            answer = "refused"
        else:
            trainer.load(whole)
            assert state_of(trainer) == original, what
        counts[spoil.__name__, answer] = counts.get((spoil.__name__, answer), 0) + 1
        checkpoint.remove(folder)
        assert sorted(os.listdir(tmp_path)) == ["outside"], what
        assert os.listdir(outside) == ["keep"], what
    assert (outside / "keep").read_text() == "kept"
    assert min(counts[kind.__name__, "refused"] for kind in (spoil_files, spoil_state, spoil_tensors)) > COUNT // 7
    trainer.load(whole)
    assert state_of(trainer) == original


def one_round(trainer):
    """A round from a state that was taken; what it may still say is an error of the project's own."""
    saved = copy.deepcopy(trainer.state())
    with contextlib.suppress(SolotuneError):
        trainer.train_round()
    assert saved["data_order"] == trainer.state()["data_order"]
