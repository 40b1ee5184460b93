"""The part of the data stage that makes semantic IDs of a data set's items."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from upath import UPath

from muonrec.data.replacement import put_right
from muonrec.data.semantic_ids.collisions import find_collisions
from muonrec.data.semantic_ids.config import SemanticIdsConfig
from muonrec.data.semantic_ids.ids import SemanticIds
from muonrec.data.semantic_ids.ready_made import read_ready_made
from muonrec.data.semantic_ids.stored import (
    SCHEMA_VERSION,
    SemanticIdsManifest,
    items_sha256,
    load_raw_ids,
    verify_semantic_ids,
    write_semantic_ids,
)
from muonrec.data.text import describe_sources, source_files

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Quantised:
    """The codes that a method gives the items, before any collision is resolved.

    Attributes:
        codes: int64 ``[num_items, num_levels]``.
        codebook_sizes: codes there are on each level.
    """

    codes: np.ndarray
    codebook_sizes: tuple[int, ...]


def build_semantic_ids(config: SemanticIdsConfig, dataset: Path | UPath) -> SemanticIdsManifest:
    """Make the semantic IDs of ``config`` for the items of ``dataset``, unless they are there already.

    Raises:
        ValueError: the source, the settings or the output folder do not allow it; the output is as it was then.
    """
    output = config.place(dataset)
    put_right(output)
    raw_ids = load_raw_ids(dataset)
    source = _describe_source(config)
    settings = config.model_dump(mode="json", exclude={"output": True, "source": {"path"}})
    made_of = [SCHEMA_VERSION, settings, [file["sha256"] for file in source["files"]], items_sha256(raw_ids)]
    fingerprint = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    if (found := _up_to_date(output, fingerprint)) is not None:
        logger.info("%s is up to date (fingerprint %s...): skipped", output, fingerprint[:12])
        return found

    logger.info("making semantic IDs of %s items at %s from %s", f"{len(raw_ids):,}", output, config.source.name)
    started = time.monotonic()
    quantised = _quantise(config, raw_ids)
    before = find_collisions(quantised.codes)
    codes, codebook_sizes = quantised.codes, quantised.codebook_sizes
    if before.largest > 1:
        codes, codebook_sizes = np.column_stack([codes, before.places]), (*codebook_sizes, before.largest)
    manifest = write_semantic_ids(
        output,
        SemanticIds(codes, codebook_sizes),
        raw_ids,
        is_collided=before.is_collided,
        is_reassigned=np.zeros(len(raw_ids), dtype=bool),
        fingerprint=fingerprint,
        num_collisions=len(raw_ids) - before.num_tuples,
        largest_collision=before.largest,
        num_items_unknown=0,
        reconstruction_error=None,
        reconstruction_error_after=None,
        config=config.model_dump(mode="json"),
        source=source,
        seconds=round(time.monotonic() - started, 3),
    )
    _log_summary(output, manifest)
    return manifest


def _describe_source(config: SemanticIdsConfig) -> dict[str, Any]:
    files = source_files(config.source.path, setting="data.semantic_ids.source")
    return {"name": config.source.name, "files": describe_sources(files)}


def _quantise(config: SemanticIdsConfig, raw_ids: list[str]) -> Quantised:
    (path,) = source_files(config.source.path, setting="data.semantic_ids.source")
    codes = read_ready_made(config.source, path, raw_ids)
    return Quantised(codes, tuple((codes.max(0) + 1).tolist()))


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


def _log_summary(output: Path | UPath, manifest: SemanticIdsManifest) -> None:
    levels = Table("level", "codes", "used", "perplexity", box=None, pad_edge=False)
    for number, level in enumerate(manifest.levels, start=1):
        levels.add_row(str(number), str(level.codebook_size), str(level.num_used), f"{level.perplexity:.1f}")
    text = io.StringIO()
    Console(file=text, width=100).print(levels)
    logger.info("%s: codes of %s items\n%s", output, f"{manifest.num_items:,}", text.getvalue().rstrip())
    logger.info(
        "collisions: %s before (%s items share codes, up to %s each), %s after",
        *(
            f"{count:,}"
            for count in (
                manifest.num_collisions,
                manifest.num_items_collided,
                manifest.largest_collision,
                manifest.num_collisions_after,
            )
        ),
    )
    logger.info("done in %.1f s", manifest.seconds)
