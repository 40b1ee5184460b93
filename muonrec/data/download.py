"""Fetch public data sets from their official places: terms first, resumed where it broke off, checked if possible."""

from __future__ import annotations

import hashlib
import http.client
import logging
import shutil
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
    """Where a family of data sets is published, and what its publishers ask of those who use it."""

    url: str
    terms: str


_AMAZON_TERMS = (
    "No licence is stated; the authors offer the data for research and ask to be cited ({cite}; {page}). "
    "Do not redistribute it: muonrec downloads it at your request and keeps no copy elsewhere."
)

# By the format of the source. A file is asked for by its name below the URL.
PLACES: dict[str, Place] = {
    "amazon_2014": Place(
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/",
        _AMAZON_TERMS.format(
            cite="He & McAuley 2016", page="https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html"
        ),
    ),
    "amazon_2018": Place(
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/categoryFilesSmall/",
        _AMAZON_TERMS.format(cite="Ni, Li & McAuley 2019", page="https://nijianmo.github.io/amazon/"),
    ),
    "amazon_2023": Place(
        "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main/benchmark/",
        _AMAZON_TERMS.format(cite="Hou et al. 2024", page="https://amazon-reviews-2023.github.io/"),
    ),
    "movielens": Place(
        "https://files.grouplens.org/datasets/movielens/",
        "MovieLens (GroupLens, University of Minnesota): no commercial or revenue-bearing use without permission, "
        "acknowledge the data set in publications (Harper & Konstan 2015), imply no endorsement. 100K, 1M and 10M: you "
        "may not redistribute the data without separate permission. 20M, 25M, 32M and latest: you may redistribute it, "
        "transformed or not, under these same conditions. The full text is the README in the archive and at "
        "https://files.grouplens.org/datasets/movielens/",
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


def fetch(format_name: str, file: str, path: Path) -> None:
    """Bring ``file`` of a public data set to ``path``, unless it is there.

    Of a zip archive, which is kept beside ``path``, the member with the name of ``path`` is taken. Offline, put the
    file at ``path``, or the archive beside it: then nothing is asked of the network.

    Args:
        format_name: of the source, a key of `PLACES`.
        file: its name at the official place, such as ``ml-1m.zip`` or ``reviews_Beauty_5.json.gz``.
        path: where it is wanted.

    Raises:
        ValueError: the file differs from its checksum, the archive is damaged or lacks the member.
        OSError: there is no such file, or the connection broke off too often; what has come is kept for the next run.
    """
    if path.exists():
        return
    name = Path(file).name
    is_archive = name.endswith(".zip")
    if not is_archive and Path(name).suffix != path.suffix:
        raise ValueError(f"data.source.path {path} is to hold {name}: let it end in {Path(name).suffix!r} too")
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.with_name(name) if is_archive else path
    if not target.exists():
        place = PLACES[format_name]
        logger.warning("%s", place.terms)
        logger.info("downloading %s to %s", place.url + file, target)
        download(place.url + file, target, md5=MD5.get(name))
    if is_archive:
        _extract(target, path)


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
