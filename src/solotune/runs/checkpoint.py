"""Saving and restoring everything a run needs to go on: safetensors and JSON, never pickle.

checkpoints/step_000400/  tensors.safetensors   trained tensors, optimizer state, torch's random state
                              state.json           round, step, controller, moments, schedule, other random states
                              hf_model/            what PEFT or transformers load, and the critic
                              manifest.json        sha256 of each of these files
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import math
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from solotune.errors import CheckpointError, ConfigError, SolotuneError
from solotune.runs.files import named, remove, whole_folder
from solotune.runs.saved_state import check_state, is_like

KEEP = 2
MANIFEST = "manifest.json"

log = logging.getLogger("solotune")


@contextlib.contextmanager
def writing(folder: Path, step: int, keep: int = KEEP) -> Iterator[Path]:
    """A folder to fill that becomes `step_N` when the block ends: whole, with a hash of every file, or not at all.

    The files reach the disk before the folder gets its name; older checkpoints but the last are removed after that.

    Args:
        folder: the run's `checkpoints`.
        step: optimizer steps so far, in the checkpoint's name.
        keep: how many checkpoints stay, this one included.
    Raises:
        CheckpointError: the disk is full, the folder is read-only, or the like; earlier checkpoints are untouched.
    """
    target = folder / f"step_{step:06d}"
    try:
        with whole_folder(target) as aside:
            yield aside
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            hashes = {path.relative_to(aside).as_posix(): _sha256(path) for path in files}
            (aside / MANIFEST).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
            for path in [*files, aside / MANIFEST, aside]:
                _to_disk(path)
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        left = newest(folder) if folder.is_dir() else None
        raise CheckpointError(
            f"the checkpoint {str(target)!r} could not be written: {error}; "
            + (f"the last good one is {str(left)!r}" if left is not None else "there is none yet")
        ) from error
    try:
        by_age = sorted(_by_step(folder.glob("step_*")), key=lambda path: path.stat().st_mtime_ns)
        for old in by_age[:-keep]:
            shutil.rmtree(old)
    except OSError as error:  # the new one is there
        log.warning("an older checkpoint in %s could not be removed: %s", folder, error)


def drop_after(folder: Path, step: int, before: float = math.inf) -> None:
    """Remove the checkpoints of later steps, and below `before`: a resumed run is about to take them again, or they
    lie in the middle of a round that is over.

    Raises:
        RunFileError: one cannot be removed.
    """
    for path in _by_step(folder.glob("step_*")):
        if step < int(path.name[5:]) < before:
            with named(path):
                remove(path)


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """What training changes in a model, by name: what it says itself, or its trained tensors."""
    said: Any = getattr(model, "changing_tensors", None)
    return said() if said is not None else {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    state_tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write what resuming needs into a folder.

    Args:
        step: optimizer steps so far.
        model: the tensors that training changes are written, the frozen ones are not.
        state: what else there is, JSON.
        state_tensors: what of it are tensors.
    """
    tensors = {f"model.{name}": p.detach().cpu() for name, p in _changing(model).items()}
    optimizer_state = optimizer.state_dict()
    for index, values in optimizer_state["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value).cpu() for key, value in _flat(values)}
    tensors |= _torch_random_state()
    tensors |= {f"trainer.{name}": tensor for name, tensor in (state_tensors or {}).items()}
    content = {
        **state,
        "step": step,
        "optimizer": optimizer_state["param_groups"],
        "python_random": random.getstate(),
        "numpy_random": _numpy_random_state(),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "tensors.safetensors")
    (folder / "state.json").write_text(json.dumps(content), encoding="utf-8")


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were made to be resumed, oldest first."""
    return _by_step(path.parent for path in folder.glob("step_*/state.json"))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: each is there, and has the hash it was written with."""
    try:
        if not _is_own_file(path, MANIFEST):
            return f"there is no {MANIFEST}"
        hashes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if not _is_own_file(path, name) or _sha256(path / name) != expected:
                return f"{name[:200]!r} is not what was written"
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"[:300]
    missing = {"state.json", "tensors.safetensors"} - hashes.keys()
    return f"{', '.join(sorted(missing))} is not in {MANIFEST}" if missing else None


def newest(folder: Path) -> Path | None:
    """The newest intact checkpoint of a run's folder, or of its `checkpoints`; None if there is none.

    A folder that is a checkpoint itself is that one or nothing else.

    Raises:
        CheckpointError: it is a checkpoint, and damaged.
    """
    if (folder / "state.json").exists() or folder.name.startswith("step_"):
        if folder.exists() and (reason := damage(folder)) is not None:
            raise CheckpointError(f"checkpoint {str(folder)!r} is damaged: {reason}; give its run's folder for another")
        return folder if folder.exists() else None
    for half in (*folder.glob("checkpoints/.step_*.replaced"), *folder.glob(".step_*.replaced")):
        whole = half.with_name(half.name.removesuffix(".replaced")[1:])
        if not whole.exists():  # killed between the two renames of `whole_folder`
            with contextlib.suppress(OSError):  # a disk that is still broken: the ones before it count
                os.replace(half, whole)
    for path in reversed(saved(folder / "checkpoints") or saved(folder)):
        reason = damage(path)
        if reason is None:
            return path
        log.warning("checkpoint %s is damaged (%s): trying the one before it", path, reason)
    return None


def _is_own_file(folder: Path, name: str) -> bool:
    """Whether it is a file inside the folder: no link to elsewhere, no pipe that would be waited for."""
    return (folder / name).resolve().is_relative_to(folder.resolve()) and (folder / name).is_file()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _by_step(paths: Iterable[Path]) -> list[Path]:
    return sorted((path for path in paths if path.name[5:].isdecimal()), key=lambda path: int(path.name[5:]))


def restore(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load a checkpoint into the model, the optimizer and the random generators; returns its `state`, with its tensors
    under "tensors".

    Raises:
        ConfigError: it belongs to a model with other trained tensors.
        CheckpointError: it cannot be read, or holds something else than `save` wrote.
    """
    with reading(path):
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "tensors.safetensors")
    with reading(path):
        trained = {f"model.{name}": p for name, p in _changing(model).items()}
        stored = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
        kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
        expected = {name: (tuple(p.shape), p.dtype) for name, p in trained.items()}
        if kinds != expected:
            differing = sorted(set(kinds) ^ set(expected)) or sorted(n for n in kinds if kinds[n] != expected[n])
            raise ConfigError(
                f"checkpoint {str(path)!r} does not fit the model of this recipe: {len(differing)} trained tensors "
                f"differ, such as {differing[0]!r}; resume with the recipe it was made with"
            )
        content = check_state(content)
        optimizer_state = _optimizer_state(optimizer, tensors, content.pop("optimizer"))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(stored[name])
        optimizer.load_state_dict(optimizer_state)
        _restore_random_states(tensors, content)
    of_trainer = {name.removeprefix("trainer."): x for name, x in tensors.items() if name.startswith("trainer.")}
    return {**content, "tensors": of_trainer}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is raised by content that `save` did not write, as an error of ours.

    Raises:
        CheckpointError: anything but an error of ours.
    """
    try:
        yield
    except ConfigError as error:
        if str(path) in str(error):
            raise
        raise ConfigError(f"checkpoint {str(path)!r}: {error}") from error
    except SolotuneError:
        raise
    except Exception as error:  # JSON of any form: no list of classes is complete
        said = str(error).splitlines()[0][:500] if str(error) else ""
        raise CheckpointError(
            f"checkpoint {str(path)!r} cannot be read, it is not what a run saves: {type(error).__name__}: {said}; "
            "resume from another one"
        ) from error


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """An optimizer's numbers of one parameter by name; 8-bit ones keep theirs a dict deeper, `outer/inner`, and share
    some between parameters, which safetensors does not write."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{inner}", torch.as_tensor(x).clone()) for inner, x in value.items())
        else:
            yield key, value


def _optimizer_state(optimizer: Optimizer, tensors: dict[str, Tensor], saved_groups: Any) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes, checked against the optimizer: torch itself would fail at the next step.

    Raises:
        ValueError: it is that of another optimizer.
    """
    groups = optimizer.state_dict()["param_groups"]
    if not isinstance(saved_groups, list) or len(saved_groups) != len(groups):
        raise ValueError("its optimizer has other groups of parameters")
    merged = []
    for own, saved in zip(groups, saved_groups, strict=True):
        if not isinstance(saved, dict) or own["params"] != saved.get("params"):
            raise ValueError("its optimizer has other parameters")
        if odd := saved.keys() ^ own.keys():
            raise ValueError(f"its optimizer has or lacks {', '.join(sorted(odd))}"[:200])
        for name, value in own.items():
            if not is_like(saved[name], value):
                raise ValueError(f"its optimizer has {name} = {saved[name]!r}"[:200])
        group = {**saved, "betas": tuple(saved["betas"])} if "betas" in saved else saved
        if isinstance(optimizer, torch.optim.Adam | torch.optim.SGD):  # torch checks ranges where one is made
            taken = inspect.signature(type(optimizer)).parameters.keys() & optimizer.defaults.keys()
            type(optimizer)([torch.zeros(1)], **{name: group[name] for name in taken - {"fused"}})
        merged.append(group)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            shape = parameters[int(index)].shape  # an IndexError where there is no such parameter
            if key in _LIKE_PARAMETER and not (tensor.shape == shape and tensor.is_floating_point()):
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, the parameter has {tuple(shape)}")
            is_adam = isinstance(optimizer, torch.optim.Adam)
            if key == "step" and not (tensor.numel() == 1 and 0 <= float(tensor) < math.inf):
                raise ValueError(f"{name} is no number of steps")
            if key == "step" and is_adam and not (tensor.dim() == 0 and tensor.is_floating_point()):
                raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, no float")
            outer, slash, inner = key.partition("/")
            entry = state.setdefault(int(index), {})
            if slash:
                entry.setdefault(outer, {})[inner] = tensor
            else:
                entry[outer] = tensor
    if len({frozenset(values) for values in state.values()}) > 1 or (
        isinstance(optimizer, torch.optim.Adam) and any(not values.keys() >= _ADAM for values in state.values())
    ):
        raise ValueError("its optimizer lacks tensors")
    return {"state": state, "param_groups": merged}


_LIKE_PARAMETER = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
_ADAM = {"step", "exp_avg", "exp_avg_sq"}


def _torch_random_state() -> dict[str, Tensor]:
    states = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _numpy_random_state() -> list[Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return [kind, np.asarray(keys).tolist(), position, has_gauss, cached]


def _restore_random_states(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    version, internal, gauss = content.pop("python_random")
    random.setstate((version, tuple(internal), None if gauss is None else float(gauss)))
    kind, keys, position, has_gauss, cached = content.pop("numpy_random")
    if not 0 <= position <= 624:  # numpy would read beyond its array
        raise ValueError(f"numpy's random state is at {position}, which must be 0 to 624")
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
