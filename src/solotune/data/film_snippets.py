"""10,605 sentence-long film reviews, each rated from -4 (very negative) to 4 (very positive) by about 15 to 20 people.

Source: C. J. Hutto and E. Gilbert, "VADER: a parsimonious rule-based model for sentiment analysis of social media
text", ICWSM 2014 (MIT licence); the snippets are those of Pang and Lee. The source archive of `vaderSentiment==0.5`
on the Python package index holds them. They are fetched with pip, verified, and kept in the cache.
"""

import html
import json
import re
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from solotune.data.fetching import Archive, fetch
from solotune.errors import DataError

ROWS, MEAN_WORDS = 10_605, 19  # for an estimate before they are fetched
ARCHIVE = Archive(
    "vaderSentiment==0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    "2.4 MB",
    source=True,
)
GROUND_TRUTH = "movieReviewSnippets_GroundTruth.txt"
INDIVIDUAL_RATINGS = "movieReviewSnippets_anonDataRatings.txt"
_TARBALL = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_LICENSE = "vaderSentiment-0.5/LICENSE.txt"
_MEMBERS = "hutto_ICWSM_2014"


class Snippet(NamedTuple):
    """One film-review snippet: its text, the mean of its ratings (-4 .. 4), and the share of its raters who rate it
    above 0, those who rate it 0 counting half (0 .. 1)."""

    text: str
    rating: float
    positive_share: float


def download(folder: Path) -> None:
    """Fill `folder` with the two files of film snippets and their licence.

    Raises:
        DataError: pip is missing or cannot reach the index, or the archive is not the expected one.
    """
    with tempfile.TemporaryDirectory(prefix="solotune-") as temporary:
        archive = fetch(ARCHIVE, "the film snippets", Path(temporary))
        with zipfile.ZipFile(archive) as outer:
            (folder / "LICENSE.txt").write_bytes(outer.read(_LICENSE))
            # Members are read by their full names and written to names of ours: no path in the archive is followed.
            with outer.open(_TARBALL) as stream, tarfile.open(fileobj=stream, mode="r:gz") as inner:
                wanted = {f"{_MEMBERS}/{name}": name for name in (GROUND_TRUTH, INDIVIDUAL_RATINGS)}
                for member in inner:
                    if member.name in wanted and member.isfile():
                        source = inner.extractfile(member)
                        assert source is not None
                        (folder / wanted.pop(member.name)).write_bytes(source.read())
        if wanted:
            raise DataError(f"{ARCHIVE.file} lacks {', '.join(sorted(wanted))} although its sha256 is right")


def read(folder: Path) -> list[Snippet]:
    """The snippets in the order of the file, texts cleaned by `clean`.

    Raises:
        DataError: a line does not have the published form.
    """
    # UTF-8 with CRLF line ends; the last line has none, which is why counting newlines gives 10,604.
    ratings = {}
    for line in (folder / INDIVIDUAL_RATINGS).read_text(encoding="utf-8").splitlines():
        number, _mean, _deviation, individual = line.split("\t")
        ratings[number] = json.loads(individual)
    snippets = []
    for index, line in enumerate((folder / GROUND_TRUTH).read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) != 3 or fields[0] not in ratings:
            raise DataError(
                f"{folder / GROUND_TRUTH}, line {index}: expected id, mean rating and text separated by tabs, "
                f"and individual ratings under that id; got {line[:80]!r}. Delete the folder to fetch it again"
            )
        individual = ratings[fields[0]]
        positive_share = sum((rating > 0) + 0.5 * (rating == 0) for rating in individual) / len(individual)
        snippets.append(Snippet(clean(fields[2]), float(fields[1]), positive_share))
    return snippets


def clean(text: str) -> str:
    """Undo what the corpus did to its texts: '' for quotation marks, HTML entities, dashes blanked out."""
    text = html.unescape(text).replace("''", '"')
    text = re.sub(r"(?<=\S)\s{3,}(?=\S)", " - ", text)  # "all comics    even those": a dash used to be there
    return re.sub(r"\s+", " ", text).strip()
