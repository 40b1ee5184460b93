"""The manifest of a data set: what its files are, what was counted, of which data it is; written last, it commits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
import pydantic
from upath import UPath

from muonrec.config import Config
from muonrec.data.places import place, read_bytes, size_of

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
ITEMS = "items.parquet"
USERS = "users.parquet"

ManifestT = TypeVar("ManifestT", bound=Config)


class PartCounts(Config):
    """One count for each part of the split."""

    train: int
    valid: int
    test: int


class TargetCounts(Config):
    """One count for each part that has evaluation targets."""

    valid: int
    test: int


class FileEntry(Config):
    """One file of the data set, as committed."""

    num_rows: int
    num_bytes: int
    sha256: str


class BestPossible(Config):
    """Metrics of ranking all items by the true ``P(next item | history)``: no model does better but by luck."""

    ndcg_at_10: float = pydantic.Field(alias="ndcg@10")
    recall_at_10: float = pydantic.Field(alias="recall@10")
    num_users: int

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_by_name=True, serialize_by_alias=True)


class Ancestor(Config):
    """The earlier data set whose users and items kept their rows, the first of each vocabulary."""

    fingerprint: str
    num_users: int
    num_items: int


class ItemMetadata(Config):
    """Where the columns of `ITEMS` that describe an item came from (`muonrec.data.items.METADATA`).

    Attributes:
        fingerprint: sha256 over settings and source.
        source: path, size and sha256 of every input file.
        num_rows: rows of the source that describe an item, of the data set or not.
        num_rejected_by_kind: rows that describe none.
        num_duplicates: rows of an item of the data set after its first, which stands.
        num_items_described: items of the data set of which anything is known; of the others all columns are null.
        num_items_by_column: items that have a value in each column.
    """

    fingerprint: str
    source: dict[str, Any]
    num_rows: int
    num_rejected_by_kind: dict[str, int]
    num_duplicates: int
    num_items_described: int
    num_items_by_column: dict[str, int]


class Manifest(Config):
    """What a data set holds and where it came from; a folder without one is no data set.

    Attributes:
        fingerprint: sha256 over schema version, config and source; equal fingerprints mean equal shards.
        config: the resolved config of the stage.
        source: path, size and sha256 of every input file, or the parameters of the generator.
        num_users, num_items: rows of the vocabularies; with an ancestor, some may have no event here.
        all_targets: whether every event of valid and test is a target, or the first of each user (see `Sequences`).
        num_users_with_target: users with a target, whose history is never empty.
        num_targets: evaluation targets.
        num_tied_targets: targets that share user and second with another event: ``ties`` decided which one it is.
        num_items_unseen_in_training: items of the vocabulary with no event in the train part.
        history_length_quantiles: of the events per user, all parts together.
        time_range_s: first and last timestamp; null without times.
        tied_event_share: share of events that share user and timestamp with another; null without times.
        core_rounds: users, items and events before the k-core and after each of its rounds.
        num_repeats_dropped, num_ties_dropped: events that ``repeats`` and ``ties: drop`` left out, before the k-core.
        num_rejected_by_kind: rows of the source that were no events.
        ancestor: what ``extends`` named; null for a data set of its own.
        older_ancestors: what the ancestor extended in its turn, the nearest first.
        item_metadata: null where none was asked for. It decides nothing of the shards, nor the fingerprint.
        best_possible: of a synthetic source, where it can be known; null otherwise.
        rates: events per second of each phase of the run that wrote it.
    """

    schema_version: int
    fingerprint: str
    num_users: int
    num_items: int
    num_events: int
    num_events_per_part: PartCounts
    all_targets: bool
    num_users_with_target: TargetCounts
    num_targets: TargetCounts
    num_tied_targets: TargetCounts
    num_items_unseen_in_training: int
    num_source_events: int
    num_rejected_by_kind: dict[str, int]
    num_duplicates_dropped: int
    num_repeats_dropped: int
    num_ties_dropped: int
    core_rounds: list[dict[str, int]]
    history_length_quantiles: dict[str, float]
    time_range_s: tuple[int, int] | None
    tied_event_share: float | None
    split: dict[str, Any]
    num_shards: int
    files: dict[str, FileEntry]
    config: dict[str, Any]
    source: dict[str, Any]
    ancestor: Ancestor | None
    item_metadata: ItemMetadata | None = None
    best_possible: BestPossible | None
    rates: dict[str, float]
    older_ancestors: list[Ancestor] = []

    @property
    def ancestors(self) -> list[Ancestor]:
        """All data sets whose rows are the first of this one, the nearest first."""
        return [] if self.ancestor is None else [self.ancestor, *self.older_ancestors]


def describe_file(path: Path) -> FileEntry:
    """Rows, bytes and sha256 of a Parquet file, forced to disk first: the manifest must not outlive it."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return FileEntry(num_rows=pq.read_metadata(path).num_rows, num_bytes=path.stat().st_size, sha256=_sha256(path))


def write_manifest(folder: Path, manifest: Config) -> None:
    """Commit the folder: the manifest appears whole or not at all."""
    partial = folder / f"{MANIFEST}.partial"
    with partial.open("w") as stream:
        stream.write(json.dumps(manifest.model_dump(mode="json", by_alias=True), indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, folder / MANIFEST)


def read_manifest(folder: str | Path | UPath) -> Manifest:
    """Read the manifest of a data set.

    Raises:
        ValueError: the folder has none, or it is damaged or of another schema version.
    """
    return read_committed(folder, Manifest, SCHEMA_VERSION, what="data set")


def read_committed(
    folder: str | Path | UPath, cls: type[ManifestT], schema_version: int | str, *, what: str
) -> ManifestT:
    """Read the manifest that `write_manifest` committed ``folder`` with.

    Args:
        folder: of whatever the data stage writes.
        cls: of the manifest, which has a ``schema_version``.
        schema_version: the only one that is read.
        what: the folder should be, for the messages.

    Raises:
        ValueError: the folder has none, or it is damaged or of another schema version.
    """
    path = place(folder) / MANIFEST
    try:
        text = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        found = "has no manifest.json" if not isinstance(path, Path) or path.parent.is_dir() else "does not exist"
        raise ValueError(f"{folder} is not a {what}: it {found}; run python -m pipeline.data CONFIG") from None
    except OSError as error:
        raise ValueError(f"{error}; see whether the place is reached from here") from None
    try:
        tree = json.loads(text)
        version = tree.get("schema_version") if isinstance(tree, dict) else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run python -m pipeline.data CONFIG again") from None
    if version != schema_version:
        raise ValueError(
            f"{path} has schema version {version}, this muonrec reads {schema_version}; "
            "run python -m pipeline.data CONFIG again"
        )
    try:
        return cls.model_validate(tree)
    except pydantic.ValidationError as error:
        faults = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors())
        raise ValueError(f"{path} is damaged at {faults}; run python -m pipeline.data CONFIG again") from None


def verify_dataset(folder: str | Path | UPath, *, verify_hashes: bool = False) -> Manifest:
    """Check that every file of the manifest is there with its size, and with its sha256 where asked.

    Raises:
        ValueError: names the first file that differs.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest.files, verify_hashes=verify_hashes)
    return manifest


def verify_files(folder: str | Path | UPath, files: Mapping[str, FileEntry], *, verify_hashes: bool = False) -> None:
    """Check the committed ``files`` of ``folder`` as `verify_dataset` does. Raises ValueError."""
    for name, entry in files.items():
        path = place(folder) / name
        try:
            num_bytes = size_of(path)
        except FileNotFoundError:
            raise ValueError(
                f"{path} is missing though the manifest lists it; run python -m pipeline.data CONFIG again"
            ) from None
        except OSError as error:
            raise ValueError(f"{error}; see whether the place is reached from here") from None
        if num_bytes not in (None, entry.num_bytes):
            raise ValueError(
                f"{path} has {num_bytes} bytes but the manifest says {entry.num_bytes}; "
                "copy it again or run python -m pipeline.data CONFIG again"
            )
        if verify_hashes and (found := _sha256(path)) != entry.sha256:
            raise ValueError(
                f"{path} has sha256 {found[:12]}... but the manifest says {entry.sha256[:12]}...; "
                "copy it again or run python -m pipeline.data CONFIG again"
            )


def _sha256(path: Path | UPath) -> str:
    if not isinstance(path, Path):
        return hashlib.sha256(read_bytes(path)).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
