"""The marker of a checkpoint: every file with its size and SHA-256, written when all of them are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

MARKER = "COMMITTED"
SCHEMA_VERSION = 2
_BLOCK_BYTES = 1 << 20


class UnusableCheckpoint(ValueError):
    """A checkpoint that is unfinished, damaged, of another schema version, hostile or of another model."""


class FileRecord(NamedTuple):
    """What a file held when it was written."""

    num_bytes: int
    sha256: str


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and SHA-256 of each file, read in blocks."""
    return {name: _record(folder / name) for name in names}


def write_marker(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Make ``folder`` a checkpoint: the marker appears whole or not at all."""
    partial = folder / f"{MARKER}.tmp"
    tree = {
        "schema_version": SCHEMA_VERSION,
        "files": {name: record._asdict() for name, record in sorted(files.items())},
    }
    partial.write_text(json.dumps(tree, indent=1))
    partial.rename(folder / MARKER)


def read_marker(folder: Path) -> dict[str, FileRecord]:
    """The files of a checkpoint.

    Raises:
        UnusableCheckpoint: there is no marker, it cannot be read, or it is of another schema version.
    """
    try:
        tree = json.loads((folder / MARKER).read_bytes())
        version = tree["schema_version"]
        if version == SCHEMA_VERSION:
            files = {name: FileRecord(**record) for name, record in tree["files"].items()}
            if elsewhere := [name for name in files if Path(name).name != name]:
                raise ValueError(f"it lists {elsewhere}, which lie elsewhere")
            return files
    except FileNotFoundError:
        raise UnusableCheckpoint(f"{folder} is not a finished checkpoint (no {MARKER} in it)") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableCheckpoint(f"{folder} is damaged: its {MARKER} cannot be read: {error!r}") from None
    raise UnusableCheckpoint(
        f"{folder} has checkpoint schema {version!r}, this version of muonrec reads {SCHEMA_VERSION}; load it with the "
        "version that wrote it"
    )


def find_faults(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """What is wrong with the files, a text each, none if they are as they were written."""
    return [f"{name} {fault}" for name, record in files.items() if (fault := _fault(folder / name, record))]


def _fault(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return "is missing"
    if (num_bytes := path.stat().st_size) != record.num_bytes:
        return f"has {num_bytes:,} bytes, was written with {record.num_bytes:,}"
    return None if _record(path) == record else "was altered: its SHA-256 is another"


def _record(path: Path) -> FileRecord:
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return FileRecord(num_bytes, digest.hexdigest())
