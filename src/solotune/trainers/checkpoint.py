"""Saving and restoring everything a run needs to go on: safetensors and JSON, never pickle.

checkpoints/step_000400/  tensors.safetensors   trained tensors, optimizer state, torch's random state
                              state.json           round, step, controller, moments, schedule, other random states
                              hf_model/            what PEFT or transformers load, and the critic
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from solotune.errors import ConfigError

KEEP = 2


@contextlib.contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """A folder to fill that is renamed to `step_N` when the block ends; older ones but the last are removed after that.

    Args:
        folder: the run's `checkpoints`.
        step: optimizer steps so far, in the checkpoint's name.
    """
    target = folder / f"step_{step:06d}"
    aside = folder / f".{target.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    by_age = sorted(_by_step(folder.glob("step_*")), key=lambda path: path.stat().st_mtime_ns)
    for old in by_age[:-KEEP]:
        shutil.rmtree(old)


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a resumed run is about to take again."""
    for path in _by_step(folder.glob("step_*")):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Write what resuming needs into a folder.

    Args:
        step: optimizer steps so far.
        model: its trained tensors are written, the frozen ones are not.
        state: what else there is, JSON.
    """
    tensors = {f"model.{name}": p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    optimizer_state = optimizer.state_dict()
    for index, values in optimizer_state["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value).cpu() for key, value in values.items()}
    tensors |= _torch_random_state()
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
    """The whole checkpoints in a folder that can be resumed, oldest first."""
    return _by_step(path.parent for path in folder.glob("step_*/state.json"))


def newest(folder: Path) -> Path | None:
    """The folder itself where it is a checkpoint, else the newest one in it or in its `checkpoints`; None if there is
    none."""
    if (folder / "state.json").exists():
        return folder
    found = saved(folder / "checkpoints") or saved(folder)
    return found[-1] if found else None


def _by_step(paths: Iterable[Path]) -> list[Path]:
    return sorted((path for path in paths if path.name[5:].isdigit()), key=lambda path: int(path.name[5:]))


def restore(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load a checkpoint into the model, the optimizer and the random generators; returns its `state`.

    Raises:
        ConfigError: it is not there, or belongs to a model with other trained tensors.
    """
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "tensors.safetensors")
    except (OSError, ValueError) as error:
        raise ConfigError(f"checkpoint {str(path)!r} cannot be read: {error}") from error
    trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    stored = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if shapes != {name: tuple(p.shape) for name, p in trained.items()}:
        differing = sorted(set(shapes) ^ set(trained)) or sorted(
            n for n in shapes if shapes[n] != tuple(trained[n].shape)
        )
        raise ConfigError(
            f"checkpoint {str(path)!r} does not fit the model of this recipe: {len(differing)} trained tensors differ, "
            f"such as {differing[0]!r}; resume with the recipe it was made with"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(stored[name])
    _restore_optimizer(optimizer, tensors, content.pop("optimizer"))
    _restore_random_states(tensors, content)
    return content


def _restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], param_groups: list[dict[str, Any]]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    for group in param_groups:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": state, "param_groups": param_groups})


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
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = content.pop("numpy_random")
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
