"""Files and folders that are whole or not there, and errors that name them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from solotune.errors import RunFileError


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """What the disk says while the block writes `path`, as an error of ours.

    Raises:
        RunFileError: the disk is full, the folder is read-only, or the like.
    """
    try:
        yield
    except RunFileError:
        raise
    except (OSError, SafetensorError) as error:
        raise RunFileError(f"{str(path)!r} could not be written: {error}") from error


def write_whole(path: Path, content: str) -> None:
    """Write a file at once: readers see the old one or the new one, and a link in its place is replaced, not followed.

    Raises:
        RunFileError: it cannot be written; what was there stays.
    """
    aside = path.with_name(f".{path.name}.partial")
    with named(path):
        try:
            remove(aside)
            with aside.open("x", encoding="utf-8", newline="\n") as file:
                file.write(content)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill that becomes `target` when the block ends, in the place of an older one.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    aside, replaced = (target.with_name(f".{target.name}.{what}") for what in ("partial", "replaced"))
    try:
        remove(aside)
        aside.mkdir(parents=True)
        yield aside
        if target.exists():  # never a moment without either
            remove(replaced)
            os.replace(target, replaced)
            os.replace(aside, target)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if replaced.exists() and not target.exists():
            with contextlib.suppress(OSError):
                os.replace(replaced, target)
        raise


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder with all that is in it, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def links_out(folder: Path) -> Path | None:
    """A link below a folder that leads out of it, or None: writing to one would change files elsewhere."""
    inside = folder.resolve()
    links = (path for path in folder.rglob("*") if path.is_symlink())
    return next((path for path in links if not path.resolve().is_relative_to(inside)), None)
