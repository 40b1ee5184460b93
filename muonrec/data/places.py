"""Places of files: a path on this machine, or the URL of an object store or server that fsspec reads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import pyarrow as pa
import pydantic
from upath import UPath


def place(where: str | Path | UPath) -> Path | UPath:
    """A ``UPath`` for ``scheme://...`` (``s3``, ``gs``, ``abfs``, ``http``, ``memory``, ...), else a ``Path``.

    Raises:
        ValueError: fsspec does not know the scheme, or its package is not installed.
    """
    if isinstance(where, Path | UPath):
        return where
    if "://" not in where:
        return Path(where)
    try:
        url = UPath(where)
        url.fs  # noqa: B018  # made, and so imported, on first access
    except (ImportError, ValueError) as error:
        raise ValueError(f"{where} cannot be opened: {error}") from None
    return url


# In a config.
Place: TypeAlias = Annotated[
    Path | UPath,
    pydantic.PlainValidator(lambda where: place(_checked(where))),
    pydantic.PlainSerializer(str, return_type=str),
]


def read_bytes(path: Path | UPath) -> bytes:
    """The whole of a file, by one request.

    Raises:
        OSError: it is not there, or what came is not all of it; names the place.
    """
    if isinstance(path, Path):
        return path.read_bytes()
    try:
        return bytes(path.fs.cat_file(path.path))
    except FileNotFoundError:
        raise
    except Exception as error:  # every file system has its own
        raise OSError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def parquet_of(path: Path | UPath) -> Any:
    """What pyarrow reads ``path`` from: the file itself here, a copy in memory from elsewhere."""
    return path if isinstance(path, Path) else pa.BufferReader(read_bytes(path))


def size_of(path: Path | UPath) -> int | None:
    """Bytes of a file, or None where a server does not say.

    Raises:
        FileNotFoundError: there is none.
    """
    if isinstance(path, Path):
        return path.stat().st_size
    try:
        size = path.fs.info(path.path)["size"]
    except FileNotFoundError:
        raise
    except Exception as error:
        raise OSError(f"{path} cannot be reached: {type(error).__name__}: {error}") from error
    return None if size is None else int(size)


def names_in(folder: UPath) -> list[str]:
    """Names of what lies directly in a folder of an object store; none where there is no such folder.

    Raises:
        ValueError: the file system cannot be written to, so that nothing can be put there.
    """
    if folder.protocol in ("http", "https"):
        raise ValueError(f"{folder} can only be read: pass a folder or an object store as data.output")
    folder.fs.invalidate_cache()  # another process may have written there since
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted({path.name for path in folder.iterdir()})
    return []


def publish(folder: Path, output: UPath, *, commit: str) -> None:
    """Put the files of ``folder`` at ``output`` in place of those of an earlier `publish`; ``commit`` comes last.

    No rename is atomic there, so the old commit goes first: a reader finds a whole set of files or no commit. While it
    lasts, ``<commit>.partial`` lists what belongs to either, so that the next `publish` knows what a killed one left.
    Two at once would mix; nothing there can stop them.

    Raises:
        OSError: a file did not arrive whole.
    """
    ours = sorted(path.name for path in folder.iterdir() if path.name != commit)
    before = sorted(published(output, commit=commit).intersection(names_in(output)) - {f"{commit}.partial"})
    partial = output / f"{commit}.partial"
    partial.write_text(json.dumps({"files": sorted({*ours, *before} - {commit})}))
    for name in [commit, *before]:  # the commit first
        (output / name).unlink(missing_ok=True)
    for name in [*ours, commit]:
        output.fs.put_file(str(folder / name), (output / name).path)
        if (found := size_of(output / name)) not in (None, size := (folder / name).stat().st_size):
            raise OSError(f"{output / name} has {found} bytes after {size} were written; run the stage again")
    partial.unlink(missing_ok=True)


def published(output: UPath, *, commit: str) -> set[str]:
    """Names of the files that an earlier `publish` put at ``output`` or was about to."""
    names: set[str] = set()
    for listing in (commit, f"{commit}.partial"):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            names |= {listing, *json.loads(read_bytes(output / listing)).get("files", [])}
    return names


@contextlib.contextmanager
def written(path: Path | UPath) -> Iterator[Any]:
    """A binary stream to a file that appears at ``path`` when the block ends, whole."""
    if isinstance(path, UPath):
        with path.open("wb") as stream:
            yield stream
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        yield stream
    partial.replace(path)


def _checked(where: Any) -> str | Path | UPath:
    if not isinstance(where, str | Path | UPath):
        raise ValueError(f"{where!r} is no path; write a path or a URL")
    return where
