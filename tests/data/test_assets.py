"""Assets: found by name, built once, complete or absent, verified before they are opened."""

import hashlib
import io
import subprocess
import tarfile
import threading
import time
import zipfile

import pytest

from solotune.data import assets, fetching, film_snippets
from solotune.data.assets import build_once, cache_dir, resolve
from solotune.errors import DataError, MissingExtraError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOLOTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_other_names_are_left_alone():
    assert resolve("facebook/opt-1.3b") == "facebook/opt-1.3b"
    assert resolve("/some/folder") == "/some/folder"


def test_an_unknown_asset_lists_the_known_ones():
    with pytest.raises(DataError, match=r"asset:gemma'.*asset:film.*asset:gemma-3.*asset:minilm-l6.*asset:smollm2"):
        resolve("asset:gemma")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("SOLOTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "solotune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x" / "solotune"
    monkeypatch.setenv("SOLOTUNE_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"


def test_a_missing_package_names_the_extra(monkeypatch, cache):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(fetching.importlib, "import_module", absent)
    for name, extra in (("asset:minilm-l6", "quickstart"), ("asset:gemma-3-270m", "gemma")):
        with pytest.raises(MissingExtraError, match=rf"solotune\[{extra}\]"):
            resolve(name)
    assert not list(cache.rglob("gemma*"))


def test_a_build_that_fails_leaves_nothing_and_can_be_repeated(tmp_path):
    target = tmp_path / "deep" / "asset"

    def fail(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        build_once(target, fail)
    assert [path.name for path in target.parent.iterdir()] in ([], [".asset.lock"])
    assert build_once(target, lambda folder: (folder / "whole").write_text("x") and None) == target
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert {path.name for path in target.parent.iterdir()} <= {"asset", ".asset.lock"}


def test_of_several_that_want_an_asset_one_builds_it(tmp_path):
    built = []
    at_once = threading.Barrier(4)

    def build(folder):
        built.append(folder)
        time.sleep(0.1)  # the others come while it is being built
        (folder / "file").write_text("x")

    def want():
        at_once.wait()
        build_once(tmp_path / "asset", build)

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def archive_of(members: dict[str, bytes]) -> bytes:
    """A source archive as the real one: a zip with a tarball that holds the two files of snippets."""
    tarball = io.BytesIO()
    with tarfile.open(fileobj=tarball, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as outer:
        outer.writestr("vaderSentiment-0.5/LICENSE.txt", "MIT")
        outer.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", tarball.getvalue())
    return archive.getvalue()


SNIPPETS = {
    "../../escaped.txt": b"bad",
    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": (
        "1\t2.5\t''Fine'' clichés &amp; all    even so\r\n2\t-1.0\tBad.".encode()
    ),
    "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt": b"1\t2.5\t1.0\t[4, 1]\r\n2\t-1.0\t0.5\t[-2, -1, 0, 1]",
}


def expect(monkeypatch, sha256: str) -> None:
    monkeypatch.setattr(film_snippets, "ARCHIVE", film_snippets.ARCHIVE._replace(sha256=sha256))


@pytest.fixture
def index(monkeypatch, cache):
    """pip that gives the archive it is told to, or says what it is told to."""
    gives: dict = {"archive": archive_of(SNIPPETS), "stderr": None, "calls": 0}

    def run(command, **_):
        gives["calls"] += 1
        assert command[1:4] == ["-m", "pip", "download"]
        if gives["stderr"]:
            return subprocess.CompletedProcess(command, 1, "", gives["stderr"])
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/vaderSentiment-0.5.zip", "wb") as file:
            file.write(gives["archive"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetching.subprocess, "run", run)
    expect(monkeypatch, hashlib.sha256(gives["archive"]).hexdigest())
    return gives


def test_snippets_are_fetched_once_and_cleaned(index, tmp_path):
    folder = resolve("asset:film-snippets")
    snippets = film_snippets.read(assets.Path(folder))
    assert [s.text for s in snippets] == ['"Fine" clichés & all - even so', "Bad."]
    assert [s.rating for s in snippets] == [2.5, -1.0]
    assert [s.positive_share for s in snippets] == [1.0, 0.375]
    assert resolve("asset:film-snippets") == folder
    assert index["calls"] == 1
    assert not list(tmp_path.rglob("escaped.txt"))


def test_another_archive_is_refused_with_both_hashes(index, cache):
    expected = film_snippets.ARCHIVE.sha256
    index["archive"] = archive_of({**SNIPPETS, "more": b"x"})
    found = hashlib.sha256(index["archive"]).hexdigest()
    with pytest.raises(DataError, match=f"{found}.*{expected}"):
        resolve("asset:film-snippets")
    assert not list(cache.rglob("*.txt"))


@pytest.mark.parametrize(
    ("pip_says", "we_say"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("ERROR: Could not find a version that satisfies the requirement", "SOLOTUNE_CACHE"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. Got 12ab", "Got 12ab"),
    ],
)
def test_when_pip_fails_the_message_says_what_to_do(index, pip_says, we_say):
    index["stderr"] = pip_says
    with pytest.raises(DataError, match=we_say):
        resolve("asset:film-snippets")


def test_an_archive_without_the_snippets_is_an_error(index, monkeypatch):
    index["archive"] = archive_of({"hutto_ICWSM_2014/other.txt": b""})
    expect(monkeypatch, hashlib.sha256(index["archive"]).hexdigest())
    with pytest.raises(DataError, match=r"lacks .*movieReviewSnippets"):
        resolve("asset:film-snippets")


def test_a_damaged_line_is_named(index):
    folder = assets.Path(resolve("asset:film-snippets"))
    (folder / film_snippets.GROUND_TRUTH).write_text("1\t2.5 no text")
    with pytest.raises(DataError, match="line 1"):
        film_snippets.read(folder)
