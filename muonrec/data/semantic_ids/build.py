"""The part of the data stage that makes semantic IDs of a data set's items."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from upath import UPath

from muonrec.data.manifest import Manifest, verify_dataset
from muonrec.data.replacement import check_replaceable, put_right
from muonrec.data.semantic_ids.collisions import find_collisions, reassign_last
from muonrec.data.semantic_ids.config import (
    FILES,
    Cooccurrence,
    Embeddings,
    IdsSource,
    ReadyMade,
    ResidualKMeans,
    RqVae,
    SemanticIdsConfig,
    Text,
)
from muonrec.data.semantic_ids.cooccurrence import cooccurrence_vectors
from muonrec.data.semantic_ids.embeddings import read_embeddings
from muonrec.data.semantic_ids.ids import SemanticIds
from muonrec.data.semantic_ids.quantised import Quantised
from muonrec.data.semantic_ids.ready_made import read_ready_made
from muonrec.data.semantic_ids.stored import (
    IDS,
    SCHEMA_VERSION,
    SETTING,
    SemanticIdsManifest,
    items_sha256,
    load_raw_ids,
    verify_semantic_ids,
    write_semantic_ids,
)
from muonrec.data.semantic_ids.texts import encode_texts, item_texts
from muonrec.data.shards import load_items, load_sequences
from muonrec.data.text import describe_sources, source_files
from muonrec.runlog import Progress

logger = logging.getLogger(__name__)


def build_semantic_ids(config: SemanticIdsConfig, dataset: Path | UPath) -> SemanticIdsManifest:
    """Make the semantic IDs of ``config`` for the items of ``dataset``, unless they are there already.

    Raises:
        ValueError: the source, the settings or the output folder do not allow it; the output is as it was then.
        ImportError: the source needs a package that is not installed.
    """
    output = config.place(dataset)
    put_right(output)
    raw_ids = load_raw_ids(dataset)
    source = _describe_source(config.source, verify_dataset(dataset))
    fingerprint = _fingerprint(config, source, raw_ids)
    if (found := _up_to_date(output, fingerprint)) is not None:
        logger.info("%s is up to date (fingerprint %s...): skipped", output, fingerprint[:12])
        return found

    check_replaceable(output, SETTING, IDS)  # before the work of hours
    logger.info("making semantic IDs of %s items at %s from %s", f"{len(raw_ids):,}", output, config.source.name)
    clock = _Clock()
    if isinstance(config.source, ReadyMade):
        with clock.phase("source"):
            codes = read_ready_made(config.source, _file(config.source.path), raw_ids)
        quantised, num_unknown = Quantised(codes, tuple((codes.max(0) + 1).tolist())), 0
    else:
        with clock.phase("source"):
            vectors = _vectors(config, dataset, raw_ids)
        num_unknown = int((~vectors.any(1)).sum())
        with clock.phase("method"):
            quantised = _quantise(config, vectors)
    with clock.phase("collisions"):
        before = find_collisions(quantised.codes)
        codes, codebook_sizes, is_reassigned = _resolve(config, quantised)

    codewords = quantised.codewords
    num_levels = quantised.codes.shape[1]
    manifest = write_semantic_ids(
        output,
        SemanticIds(codes, codebook_sizes),
        raw_ids,
        is_collided=before.is_collided,
        is_reassigned=is_reassigned,
        fingerprint=fingerprint,
        num_collisions=len(raw_ids) - before.num_tuples,
        largest_collision=before.largest,
        num_items_unknown=num_unknown,
        reconstruction_error=codewords and codewords.reconstruction_error(quantised.codes),
        reconstruction_error_after=codewords and codewords.reconstruction_error(codes[:, :num_levels]),
        config=config.model_dump(mode="json"),
        source=source,
        seconds=clock.seconds,
    )
    _log_summary(output, manifest)
    return manifest


def _describe_source(source: IdsSource, manifest: Manifest) -> dict[str, Any]:
    """What identifies the source: its files, a text model's where that is a folder, and what it has of the data set."""
    paths = {name: path for name in FILES if (path := getattr(source, name, None)) is not None}
    setting = "data.semantic_ids.source"
    files = [file for name, path in paths.items() for file in source_files(path, setting=setting, key=name)]
    if isinstance(source, Text):
        files = sorted(path for path in Path(source.model).rglob("*") if path.is_file())
    return {
        "name": source.name,
        "files": describe_sources(files),
        "dataset": manifest.fingerprint if isinstance(source, Cooccurrence) else None,
        "items": manifest.item_metadata and manifest.item_metadata.fingerprint if isinstance(source, Text) else None,
    }


def _fingerprint(config: SemanticIdsConfig, source: dict[str, Any], raw_ids: list[str]) -> str:
    """Sha256 over what decides the codes: schema version, settings, contents and the items; where they lie does not."""
    settings = config.deciding_settings()
    contents = [[file["sha256"] for file in source["files"]], source["dataset"], source["items"], items_sha256(raw_ids)]
    return hashlib.sha256(json.dumps([SCHEMA_VERSION, settings, contents], sort_keys=True).encode()).hexdigest()


def _up_to_date(output: Path | UPath, fingerprint: str) -> SemanticIdsManifest | None:
    try:
        found = verify_semantic_ids(output)
    except ValueError as error:
        if output.exists():
            logger.warning("%s: making semantic IDs again", error)
        return None
    if found.fingerprint == fingerprint:
        return found
    logger.info("%s holds semantic IDs of other settings, source or items: they are replaced once new ones are", output)
    return None


def _file(path: str) -> Path:
    files = source_files(path, setting="data.semantic_ids.source")
    if len(files) > 1:
        raise ValueError(f"{path} matches {len(files)} files; pass one as data.semantic_ids.source.path")
    return files[0]


def _vectors(config: SemanticIdsConfig, dataset: Path | UPath, raw_ids: list[str]) -> np.ndarray:
    """The vector of every item, float32 ``[num_items, width]``; zeros where the source says nothing of it."""
    match config.source:
        case Text():
            texts = item_texts(load_items(dataset, columns=config.source.columns), config.source.columns)
            with Progress("encoding texts", "items", total=sum(map(bool, texts))) as progress:
                vectors = encode_texts(config.source, texts, device=config.device, on_items=progress.move_to)
        case Embeddings():
            vectors = read_embeddings(config.source, _file(config.source.path), raw_ids)
        case Cooccurrence():
            with Progress("counting pairs", "events apart", total=config.source.window) as progress:
                vectors = cooccurrence_vectors(
                    config.source, load_sequences(dataset), seed=config.seed, on_distance=progress.move_to
                )
        case _:
            raise AssertionError(f"source {config.source.name} gives no vectors")
    if config.normalize:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return vectors


def _quantise(config: SemanticIdsConfig, vectors: np.ndarray) -> Quantised:
    from muonrec.data.semantic_ids.methods import quantise_by_kmeans, quantise_by_rqvae

    match config.method:
        case ResidualKMeans():
            return quantise_by_kmeans(vectors, config.method, seed=config.seed, device=config.device)
        case RqVae():
            return quantise_by_rqvae(vectors, config.method, seed=config.seed, device=config.device)
    raise AssertionError("a config without a method has ready-made codes")


def _resolve(config: SemanticIdsConfig, quantised: Quantised) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """Codes of which no two items have the same, the sizes of their codebooks, and which items had to move."""
    codes, codebook_sizes = quantised.codes, quantised.codebook_sizes
    if config.collisions == "reassign_last":
        codes = reassign_last(quantised)
    elif (collisions := find_collisions(codes)).largest > 1:
        codes = np.column_stack([codes, collisions.places])
        codebook_sizes = (*codebook_sizes, collisions.largest)
    return codes, codebook_sizes, (codes[:, : quantised.codes.shape[1]] != quantised.codes).any(1)


def _log_summary(output: Path | UPath, manifest: SemanticIdsManifest) -> None:
    levels = Table("level", "codes", "used", "perplexity", box=None, pad_edge=False)
    for column in levels.columns:
        column.justify = "right"
    for number, level in enumerate(manifest.levels, start=1):
        levels.add_row(str(number), f"{level.codebook_size:,}", f"{level.num_used:,}", f"{level.perplexity:,.1f}")
    text = io.StringIO()
    Console(file=text, width=100).print(levels)
    logger.info("%s: codes of %s items\n%s", output, f"{manifest.num_items:,}", text.getvalue().rstrip())
    logger.info(
        "collisions: %s before (%s items share codes, up to %s the same), %s after; %s items reassigned",
        *(
            f"{count:,}"
            for count in (
                manifest.num_collisions,
                manifest.num_items_collided,
                manifest.largest_collision,
                manifest.num_collisions_after,
                manifest.num_items_reassigned,
            )
        ),
    )
    if manifest.reconstruction_error is not None:
        logger.info(
            "the codes leave %.1f %% of the vectors' variance untold, %.1f %% after collisions",
            100 * manifest.reconstruction_error, 100 * (manifest.reconstruction_error_after or 0),
        )  # fmt: skip
    if manifest.num_items_unknown:
        logger.warning(
            "the source says nothing of %s items: they have the same codes but for what tells collisions apart",
            f"{manifest.num_items_unknown:,}",
        )
    logger.info("done in %.1f s (%s)", sum(manifest.seconds.values()), _phases(manifest.seconds))


def _phases(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items())


class _Clock:
    """Seconds of named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)
