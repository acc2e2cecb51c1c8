"""The files a run leaves behind: configuration, metrics, samples, summary."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from solotune.errors import ConfigError
from solotune.rollout.records import Rollouts
from solotune.runs.files import links_out, named, whole_folder, write_whole
from solotune.runs.lines import append_lines, as_lines, finite, not_a_runs, read_lines

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
        try:
            if not continued and path.exists() and any(path.iterdir()):
                _refuse_other_files(path)
                earlier = self._locked()
                log.info("the earlier run is now %s", _move_aside(path))
                earlier.release()
            path.mkdir(parents=True, exist_ok=True)
        except ConfigError:
            raise
        except OSError as error:
            raise ConfigError(f"run folder {str(path)!r} cannot be made: {error}; choose another with --out") from error
        if (link := links_out(path)) is not None:
            raise ConfigError(
                f"{str(link)!r} is a link to {str(link.resolve())!r}, outside of the run's folder: going on there "
                "would write to it; put the file itself in its place, or choose another folder with --out"
            )
        self._lock = self._locked()

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
        except OSError as error:
            raise ConfigError(f"run folder {str(self.path)!r} cannot be locked: {error}") from error
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
        """Append one JSON line a row, all of them or none.

        Raises:
            RunFileError: the disk is full, or the like.
        """
        if self._writes:
            append_lines(path, rows)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a whole JSON file at once: readers see the old one or the new one.

        Raises:
            RunFileError: the disk is full, or the like.
        """
        if self._writes:
            write_whole(self.path / name, json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """A folder to fill that becomes `name` when the block ends; what was there stays where that fails.

        Raises:
            RunFileError: the disk is full, or the like.
        """
        if not self._writes:
            yield self.path / name
            return
        with named(self.path / name), whole_folder(self.path / name) as aside:
            yield aside

    def save_failure(self, model: nn.Module, rollouts: Rollouts | None = None) -> Path:
        """Statistics of the trained tensors (norm, largest number, share that is finite) as JSON, and a round's
        rollouts, where it had any, as safetensors beside it; returns the folder. Where the disk fails too, that is one
        log line: what is reported here is the error to be told."""
        folder = self.path / "failure"
        if self._writes:
            try:
                self._write_failure(folder, model, rollouts)
            except (OSError, SafetensorError) as error:
                log.warning("%s could not be written: %s", folder, error)
        return folder

    def _write_failure(self, folder: Path, model: nn.Module, rollouts: Rollouts | None) -> None:
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
        if rollouts is not None:
            tensors = {name: x.cpu().contiguous() for name, x in rollouts._asdict().items() if x is not None}
            save_file(tensors, folder / "rollouts.safetensors")

    def cut_after(self, round_index: int) -> None:
        """Drop the lines of rounds after `round_index`: they are about to be written again.

        Raises:
            RunFileError: a line is none of a run's, or the disk is full, or the like.
        """
        if not self._writes:
            return
        for path in (self.metrics, self.samples):
            if path.exists():
                rows = read_lines(path)
                for number, row in enumerate(rows, start=1):
                    if not isinstance(row.get("round"), int):
                        raise not_a_runs(path, number, row)
                kept = [row for row in rows if row["round"] <= round_index]
                write_whole(path, as_lines(kept))


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
