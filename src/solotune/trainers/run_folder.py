"""The files a run leaves behind: configuration, metrics, samples, summary."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import nn

from solotune.errors import ConfigError
from solotune.rollout.records import Rollouts

log = logging.getLogger("solotune")

LOCK_FILE = ".lock"
OWN_FILES = (
    *("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints", "reward_failure.jsonl"),
    LOCK_FILE,
)


class RunFolder:
    """A run's folder. One process writes, and no other run may; the others get `writes=False` and leave no file.

    Args:
        path: `<checkpoint_dir>/<name>`; an existing run there is moved to `<name>.1`, `.2`, ... unless it is continued.
        writes: whether this process writes.
        continued: keep what is there (`--resume`).
    """

    def __init__(self, path: Path, writes: bool = True, continued: bool = False):
        self.path, self._writes = path, writes
        self._lock: FileLock | None = None
        if not writes:
            return
        if not continued and path.exists() and any(path.iterdir()):
            _refuse_other_files(path)
            earlier = self._locked()
            log.info("the earlier run is now %s", _move_aside(path))
            earlier.release()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            raise ConfigError(f"run folder {str(path)!r} cannot be made: {error}; choose another with --out") from error

    def _locked(self) -> FileLock:
        """The folder's lock, taken; the system takes it back when the process ends, however it does.

        Raises:
            ConfigError: another run holds it.
        """
        lock = FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"another run is writing into {str(self.path)!r}: wait for its end, or choose another folder with "
                "--out (train.run_name from Python)"
            ) from None
        return lock

    def release(self) -> None:
        """Let another run write here."""
        if self._lock is not None:
            self._lock.release()

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def append(self, path: Path, rows: list[dict[str, Any]]) -> None:
        """Append one JSON line a row. Numbers that are not finite become null: JSON has no NaN."""
        if not self._writes:
            return
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows)
            file.flush()

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a whole JSON file at once: readers see the old one or the new one."""
        if not self._writes:
            return
        aside = (self.path / name).with_name(f".{Path(name).name}.partial")
        aside.write_text(json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, self.path / name)

    def save_failure(self, model: nn.Module, rollouts: Rollouts) -> Path:
        """Statistics of the trained tensors (norm, largest number, share that is finite) as JSON, and a round's
        rollouts as safetensors beside it; returns the folder."""
        folder = self.path / "failure"
        if self._writes:
            folder.mkdir(exist_ok=True)
            trained = {name: p.detach().float() for name, p in model.named_parameters() if p.requires_grad}
            statistics = {
                name: {
                    "norm": float(p.norm()),
                    "largest": float(p.abs().max()),
                    "finite": float(p.isfinite().float().mean()),
                }
                for name, p in trained.items()
            }
            self.write_json("failure/tensors.json", statistics)
            tensors = {name: x.cpu().contiguous() for name, x in rollouts._asdict().items() if x is not None}
            save_file(tensors, folder / "rollouts.safetensors")
        return folder

    def cut_after(self, round_index: int) -> None:
        """Drop the lines of rounds after `round_index`: they are about to be written again."""
        if not self._writes:
            return
        for path in (self.metrics, self.samples):
            if path.exists():
                aside = path.with_name(f".{path.name}.partial")
                aside.unlink(missing_ok=True)
                self.append(aside, [row for row in read_lines(path) if row["round"] <= round_index])
                os.replace(aside, path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that a crash cut short is left out."""
    *lines, last = path.read_text(encoding="utf-8").split("\n")  # a text may hold other line separators
    rows = [json.loads(line) for line in lines]
    with contextlib.suppress(json.JSONDecodeError):
        rows.append(json.loads(last))
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _refuse_other_files(path: Path) -> None:
    if not any((path / name).exists() for name in OWN_FILES):
        raise ConfigError(
            f"the folder {str(path)!r} holds files that are no run's: choose another with --out (or train.run_name and "
            "train.checkpoint_dir)"
        )


def _move_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)
    return aside
