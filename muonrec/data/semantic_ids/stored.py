"""Semantic IDs on disk: a Parquet file with a row per item, and the manifest that commits it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from upath import UPath

from muonrec.config import Config
from muonrec.data.manifest import (
    ITEMS,
    FileEntry,
    describe_file,
    read_committed,
    verify_dataset,
    verify_files,
    write_manifest,
)
from muonrec.data.places import place
from muonrec.data.replacement import replaced_folder
from muonrec.data.semantic_ids.config import SemanticIdsConfig
from muonrec.data.semantic_ids.ids import SemanticIds
from muonrec.data.shards import read_table, write_table

SCHEMA_VERSION = "semantic-ids-1"  # no data set's, so that each reader refuses the other's folder
IDS = "semantic_ids.parquet"
SETTING = "data.semantic_ids.output"

IDS_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("raw_id", pa.string(), nullable=False),
        pa.field("codes", pa.list_(pa.field("code", pa.int32(), nullable=False)), nullable=False),
        pa.field("is_collided", pa.bool_(), nullable=False),
        pa.field("is_reassigned", pa.bool_(), nullable=False),
    ]
)


class Level(Config):
    """One level of codes, as stored.

    Attributes:
        codebook_size: codes there are.
        num_used: codes that some item has.
        perplexity: exp of the entropy of the codes in nats, over items: as many codes, equally used, are as telling.
    """

    codebook_size: int
    num_used: int
    perplexity: float


class SemanticIdsManifest(Config):
    """What a set of semantic IDs holds and where it came from; a folder without one holds none.

    Attributes:
        fingerprint: sha256 over schema version, settings and what the codes were made of.
        items_sha256: of the raw ids of the item vocabulary, in order: the items that the codes are of.
        levels: as stored, an extra one included.
        num_items_collided: items that shared their codes with others before that was resolved; afterwards none does.
        num_collisions: items less different tuples of codes, before: as many had to be told apart from another.
        largest_collision: items of the commonest tuple of codes, before.
        num_collisions_after: what `num_collisions` is of the stored codes; 0.
        num_items_reassigned: items whose stored code on the last level is not the one nearest to them.
        num_items_unknown: items of which the source says nothing, so that they have the same codes before.
        reconstruction_error: share of the vectors' variance that the codes do not tell, before; null without vectors.
        reconstruction_error_after: the same of the codes as stored.
        source: path, size and sha256 of every input file, and the fingerprints of what it has of the data set: of its
            events or of what is known of its items.
        seconds: that each phase of making them took.
    """

    schema_version: str
    fingerprint: str
    items_sha256: str
    num_items: int
    levels: list[Level]
    num_items_collided: int
    num_collisions: int
    largest_collision: int
    num_collisions_after: int
    num_items_reassigned: int
    num_items_unknown: int
    reconstruction_error: float | None
    reconstruction_error_after: float | None
    files: dict[str, FileEntry]
    config: dict[str, Any]
    source: dict[str, Any]
    seconds: dict[str, float]


def write_semantic_ids(
    output: Path | UPath,
    ids: SemanticIds,
    raw_ids: Sequence[str],
    *,
    is_collided: np.ndarray,
    is_reassigned: np.ndarray,
    **known: Any,
) -> SemanticIdsManifest:
    """Commit ``ids`` at ``output``, in place of earlier ones once they are complete.

    Args:
        output: a folder, or an object store's.
        ids: of every item.
        raw_ids: the item vocabulary.
        is_collided: bool ``[num_items]``: which items shared their codes before.
        is_reassigned: bool ``[num_items]``: which have another code on the last level than the nearest.
        known: the fields of `SemanticIdsManifest` that do not follow from these.

    Raises:
        ValueError: ``output`` holds other things.
    """
    codes = pa.FixedSizeListArray.from_arrays(pa.array(ids.codes.reshape(-1), pa.int32()), ids.codes.shape[1])
    columns = [
        pa.array(np.arange(len(raw_ids))),
        pa.array(raw_ids, pa.string()),
        codes.cast(IDS_SCHEMA.field("codes").type),
        pa.array(is_collided),
        pa.array(is_reassigned),
    ]
    with replaced_folder(output, setting=SETTING, key_file=IDS) as folder:
        write_table(folder / IDS, pa.table(columns, IDS_SCHEMA.names).to_batches(), IDS_SCHEMA)
        manifest = SemanticIdsManifest(
            schema_version=SCHEMA_VERSION,
            items_sha256=items_sha256(raw_ids),
            num_items=len(raw_ids),
            levels=[_level(column, size) for column, size in zip(ids.codes.T, ids.codebook_sizes, strict=True)],
            num_items_collided=int(is_collided.sum()),
            num_collisions_after=len(raw_ids) - len(np.unique(ids.codes, axis=0)),
            num_items_reassigned=int(is_reassigned.sum()),
            files={IDS: describe_file(folder / IDS)},
            **known,
        )
        write_manifest(folder, manifest)
    return manifest


def load_semantic_ids(
    folder: str | Path | UPath,
    *,
    dataset: str | Path | UPath | None = None,
    config: SemanticIdsConfig | None = None,
    verify_hashes: bool = False,
) -> SemanticIds:
    """Read the codes of every item, in the order of the item vocabulary.

    Args:
        folder: what ``python -m pipeline.data`` wrote with ``data.semantic_ids``, or the URL of a copy.
        dataset: the data set whose items they must be of; None: not compared.
        config: the settings they must have been made with, wherever files lie; None: not compared.
        verify_hashes: also compare the sha256 of the file (the size is always compared).

    Raises:
        ValueError: no semantic IDs, damaged ones, or those of other items or settings.
    """
    folder = place(folder)
    manifest = verify_semantic_ids(folder, verify_hashes=verify_hashes)
    if dataset is not None and (found := items_sha256(load_raw_ids(dataset))) != manifest.items_sha256:
        raise ValueError(
            f"{folder} holds semantic IDs of other items ({manifest.items_sha256[:12]}...) than {dataset} has "
            f"({found[:12]}...); run python -m pipeline.data CONFIG again"
        )
    if config is not None:
        found_settings = SemanticIdsConfig.model_validate(manifest.config).deciding_settings()
        if differing := list(_differing(config.deciding_settings(), found_settings, "data.semantic_ids")):
            raise ValueError(
                f"{folder} was made with other settings: {', '.join(differing)}; run python -m pipeline.data CONFIG "
                "again, or pass another data.semantic_ids.output"
            )
    table = read_table(folder / IDS)
    codes = table.column("codes").combine_chunks().flatten().to_numpy().astype(np.int64)
    if codes.size != manifest.num_items * len(manifest.levels):
        raise ValueError(
            f"{folder / IDS} holds {codes.size} codes but the manifest counts {manifest.num_items} items of "
            f"{len(manifest.levels)} levels; run python -m pipeline.data CONFIG again"
        )
    return SemanticIds(codes.reshape(manifest.num_items, -1), tuple(level.codebook_size for level in manifest.levels))


def verify_semantic_ids(folder: str | Path | UPath, *, verify_hashes: bool = False) -> SemanticIdsManifest:
    """Check the files of a set of semantic IDs, as `muonrec.data.manifest.verify_dataset` does. Raises ValueError."""
    manifest = read_committed(folder, SemanticIdsManifest, SCHEMA_VERSION, what="set of semantic IDs")
    verify_files(folder, manifest.files, verify_hashes=verify_hashes)
    return manifest


def load_raw_ids(dataset: str | Path | UPath) -> list[str]:
    """The item vocabulary of a data set, in order. Raises ValueError."""
    verify_dataset(dataset)
    ids: list[str] = read_table(place(dataset) / ITEMS, ["raw_id"]).column(0).to_pylist()
    return ids


def items_sha256(raw_ids: Sequence[str]) -> str:
    """Sha256 of a vocabulary, in order."""
    return hashlib.sha256(json.dumps(list(raw_ids)).encode()).hexdigest()


def _differing(asked: Any, found: Any, path: str) -> Iterator[str]:
    """The settings that differ; of another choice, its name alone."""
    if isinstance(asked, dict) and isinstance(found, dict):
        same_choice = asked.get("name") == found.get("name")
        for name in sorted(asked.keys() | found.keys()) if same_choice else ["name"]:
            yield from _differing(asked.get(name), found.get(name), f"{path}.{name}")
    elif asked != found:
        yield f"{path} (asked {asked!r}, found {found!r})"


def _level(codes: np.ndarray, codebook_size: int) -> Level:
    counts = np.unique(codes, return_counts=True)[1]
    shares = counts / counts.sum()
    perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
    return Level(codebook_size=codebook_size, num_used=len(counts), perplexity=round(perplexity, 3))
