"""A disk that fails at the n-th operation: what is left is judged by the tests."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError

REASONS = [errno.ENOSPC, errno.EIO, errno.EROFS]


class Disk:
    """Counts opening for writing, writes, fsyncs, renames, new folders and removals below `folder`; the `failing`-th
    (from 1) fails with `reason`, after half of it was done where halves exist. `again`: those after it fail as well."""

    def __init__(self, folder: Path, failing: int = 0, reason: int = errno.ENOSPC, again: bool = False):
        self.folder, self.failing, self.reason, self.again = str(folder), failing, reason, again
        self.count = 0

    def error(self, path: object) -> OSError | None:
        """What this operation fails with, if it does."""
        if isinstance(path, str | os.PathLike) and not os.fspath(path).startswith(self.folder):
            return None
        self.count += 1
        fails = self.count == self.failing or (self.again and 0 < self.failing < self.count)
        return OSError(self.reason, os.strerror(self.reason), str(path)) if fails else None


class _File:
    """An open file whose writes are counted."""

    def __init__(self, file: Any, disk: Disk, path: object):
        self._file, self._disk, self._path = file, disk, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: Any) -> int:
        if (error := self._disk.error(self._path)) is not None:
            self._file.write(content[: len(content) // 2])
            raise error
        return self._file.write(content)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)


@contextlib.contextmanager
def failing_disk(folder: Path, failing: int = 0, reason: int = errno.ENOSPC, again: bool = False) -> Iterator[Disk]:
    """While the block runs, the disk below `folder` is such a one."""
    disk = Disk(folder, failing, reason, again)
    opened, serialized = io.open, safetensors.torch.serialize_file

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+"):
            return opened(file, mode, *args, **kwargs)
        if (error := disk.error(file)) is not None:
            raise error
        found = opened(file, mode, *args, **kwargs)
        return _File(found, disk, file) if str(file).startswith(disk.folder) else found

    def serialize_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        serialized(tensors, filename, *args, **kwargs)
        if (error := disk.error(filename)) is not None:
            os.truncate(filename, os.path.getsize(filename) // 2)
            raise SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})")

    def counted(function: Any) -> Any:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            if (error := disk.error(path)) is not None:
                raise error
            return function(path, *args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", open_)
        patch.setattr(io, "open", open_)
        patch.setattr(safetensors.torch, "serialize_file", serialize_file)
        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield disk
