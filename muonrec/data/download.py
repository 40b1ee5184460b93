"""Fetch public data sets from their official places: terms first, resumed where it broke off, checked if possible."""

from __future__ import annotations

import hashlib
import http.client
import logging
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from muonrec.runlog import Progress

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
_SECONDS_BETWEEN_ATTEMPTS = 2.0
_TIMEOUT_S = 60.0
_CHUNK_BYTES = 2**18


class Place(NamedTuple):
    """Where a family of data sets is published, and what its publishers ask of those who use it.

    Attributes:
        name: of the family.
        url: folder of the logs.
        items_url: folder of the metadata of the items.
        licence: what the publishers call their terms, or that they state none.
        terms_url: where their own words are.
        conditions: what they ask, in short and in our words.
        asks_acceptance: whether use is granted under conditions only, so that they must be accepted before a download.
    """

    name: str
    url: str
    items_url: str
    licence: str
    terms_url: str
    conditions: tuple[str, ...]
    asks_acceptance: bool = False

    def terms(self, file: str) -> str:
        """What to show before ``file`` is downloaded."""
        name = Path(file).name
        lines = [f"{name} of {self.name}. {self.licence}", *(f"  - {condition}" for condition in self.conditions)]
        return "\n".join([*lines, f"  This is a summary in our words; those of the publishers are at {self.terms_url}"])


def _amazon(year: int, cite: str, url: str, items_url: str, terms_url: str) -> Place:
    conditions = (
        f"offered by its authors for research; cite {cite}",
        "do not redistribute it: no right to do so is granted; muonrec downloads it at your request",
        "reviews and product texts belong to those who wrote them",
    )
    return Place(f"Amazon Reviews {year}", url, items_url, "No licence is stated.", terms_url, conditions)


# By the format of the source. A file is asked for by its name below the URL.
PLACES: dict[str, Place] = {
    "amazon_2014": _amazon(
        2014,
        "He & McAuley 2016 and McAuley et al. 2015",
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/",
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/",
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
    ),
    "amazon_2018": _amazon(
        2018,
        "Ni, Li & McAuley 2019",
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/categoryFilesSmall/",
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/metaFiles2/",
        "https://nijianmo.github.io/amazon/",
    ),
    "amazon_2023": _amazon(
        2023,
        "Hou et al. 2024",
        "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main/benchmark/",
        "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main/raw/meta_categories/",
        "https://amazon-reviews-2023.github.io/",
    ),
    "movielens": Place(
        "MovieLens (GroupLens, University of Minnesota)",
        "https://files.grouplens.org/datasets/movielens/",
        "https://files.grouplens.org/datasets/movielens/",
        "Its usage licence grants use for research under conditions:",
        "https://grouplens.org/datasets/movielens/ and in the README of the archive",
        (
            "no commercial or revenue-bearing use without permission of a faculty member of GroupLens",
            "100K, 1M and 10M: do not redistribute it without separate permission; 20M, 25M, 32M and latest: you may, "
            "transformed or not, under these same conditions",
            "acknowledge it in publications; cite Harper & Konstan 2015",
            "state or imply no endorsement by the university or GroupLens",
            "no warranty of any kind: it comes as it is",
        ),
        asks_acceptance=True,
    ),
}

# As GroupLens publishes them beside the archives (`<archive>.md5`). Of the Amazon files none is published.
MD5 = {
    "ml-100k.zip": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m.zip": "c4d9eecfca2ab87c1945afe126590906",
    "ml-10m.zip": "ce571fd55effeba0271552578f2648bd",
    "ml-20m.zip": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m.zip": "6b51fb2759a8657d3bfcbfc42b592ada",
}


def fetch(format_name: str, file: str, path: Path, *, setting: str = "data.source", accept_terms: bool = False) -> None:
    """Bring ``file`` of a public data set to ``path``, unless it is there.

    Of a zip archive, which is kept beside ``path``, the member with the name of ``path`` is taken. Offline, put the
    file at ``path``, or the archive beside it: then nothing is asked of the network.

    Args:
        format_name: of the source, a key of `PLACES`.
        file: its name at the official place, such as ``ml-1m.zip`` or ``reviews_Beauty_5.json.gz``.
        path: where it is wanted.
        setting: that asks for it, ``data.source`` or ``data.items``.
        accept_terms: the terms are accepted; else they are asked for on a terminal, where the publishers ask for it.

    Raises:
        ValueError: the terms are not accepted, the file differs from its checksum, the archive is damaged or lacks the
            member.
        OSError: there is no such file, or the connection broke off too often; what has come is kept for the next run.
    """
    if path.exists():
        return
    name = Path(file).name
    is_archive = name.endswith(".zip")
    if not is_archive and Path(name).suffix != path.suffix:
        raise ValueError(f"{setting}.path {path} is to hold {name}: let it end in {Path(name).suffix!r} too")
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.with_name(name) if is_archive else path
    if not target.exists():
        place = PLACES[format_name]
        logger.warning("%s", place.terms(file))
        if place.asks_acceptance and not accept_terms and not _ask(f"Download {name} under these terms? [y/N] "):
            raise ValueError(
                f"the terms of {name} are not accepted, so it is not downloaded; if you accept what is shown above, "
                f"set {setting}.accept_terms=true"
            )
        url = (place.items_url if setting == "data.items" else place.url) + file
        logger.info("downloading %s to %s", url, target)
        download(url, target, md5=MD5.get(name))
    if is_archive:
        _extract(target, path)


def _ask(question: str) -> bool:
    """Whether somebody at the terminal says yes; where there is none, nobody does."""
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def download(url: str, path: Path, *, md5: str | None = None) -> None:
    """Download ``url`` to ``path``, which appears whole or not at all; an earlier, broken attempt is continued.

    Raises:
        ValueError: the content has another checksum.
        OSError: the server refuses, or the connection broke off too often.
    """
    partial = path.with_name(f"{path.name}.part")
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _append(url, partial)
            break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code != 416:
                raise OSError(
                    f"{url} is refused: {error.code} {error.reason}; check data.source.download, or fetch it by hand "
                    f"and put it at {path}"
                ) from None
            num_bytes = partial.stat().st_size if partial.exists() else 0
            if attempt == _ATTEMPTS:
                raise OSError(
                    f"{url} broke off {attempt} times, the last at {num_bytes} bytes ({error}); start again to go on "
                    f"from there, or fetch it by hand and put it at {path}"
                ) from None
            logger.warning("%s broke off at %d bytes (%s): going on", url, num_bytes, error)
            time.sleep(_SECONDS_BETWEEN_ATTEMPTS)
    _version_path(partial).unlink(missing_ok=True)
    if md5 is not None:
        with partial.open("rb") as stream:
            found = hashlib.file_digest(stream, "md5").hexdigest()
        if found != md5:
            partial.unlink()
            raise ValueError(
                f"{url} has md5 {found}, expected {md5}: removed. Start again; if it stays so, the file was changed at "
                f"its place, and one that you trust can be put at {path}"
            )
    partial.replace(path)


def _append(url: str, partial: Path) -> None:
    """Ask for what ``partial`` lacks, or for all where the server has another version by now or cannot resume."""
    version_path = _version_path(partial)
    version = version_path.read_text() if version_path.exists() else ""
    num_bytes = partial.stat().st_size if partial.exists() and version else 0
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "muonrec"})
    if num_bytes:
        request.add_header("Range", f"bytes={num_bytes}-")
        request.add_header("If-Range", version)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is more here than there: not the same file
            version_path.unlink()
        raise
    with response:
        if response.status != 206:
            num_bytes = 0
            tag = response.headers.get("ETag", "")
            version_path.write_text(tag if tag.startswith('"') else response.headers.get("Last-Modified", ""))
        length = response.headers.get("Content-Length")
        total = None if length is None else num_bytes + int(length)
        with (
            partial.open("ab" if num_bytes else "wb") as stream,
            Progress(f"downloading {partial.stem}", "bytes", total=total, done=num_bytes) as progress,
        ):
            while chunk := response.read(_CHUNK_BYTES):
                stream.write(chunk)
                progress.advance(len(chunk))
    if total is not None and (found := partial.stat().st_size) != total:
        raise ConnectionError(f"{found} of {total} bytes came")


def _version_path(partial: Path) -> Path:
    """Holds the server's name for the version of which ``partial`` is a part."""
    return partial.with_name(f"{partial.name}.version")


def _extract(archive: Path, path: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as members:
            names = [name for name in members.namelist() if name.rpartition("/")[2] == path.name]
            if len(names) != 1:
                found = ", ".join(name for name in members.namelist() if not name.endswith("/"))
                raise ValueError(
                    f"{archive} has {len(names)} files named {path.name}; it holds {found}: "
                    "let data.source.path end in one of those names"
                )
            partial = path.with_name(f"{path.name}.part")
            with members.open(names[0]) as member, partial.open("wb") as stream:
                shutil.copyfileobj(member, stream)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is damaged ({error}); remove it and start again") from None
    partial.replace(path)
