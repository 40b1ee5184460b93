"""Checkpoints: one DCP folder for model and optimizers, progress as JSON beside it, a marker that is written last."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from muonrec.checkpoint import row_statistics
from muonrec.checkpoint.contents import Contents, TensorPlanner, TensorReader, read_contents
from muonrec.checkpoint.folders import (
    Used,
    finished,
    is_committed,
    newest,
    newest_first,
    prune,
    read_progress,
    set_aside,
    step_folder,
    use_first,
)
from muonrec.checkpoint.marker import (
    SCHEMA_VERSION,
    UnusableCheckpoint,
    find_faults,
    read_marker,
)
from muonrec.checkpoint.together import dcp_errors, gather, num_ranks, rank, together
from muonrec.checkpoint.weights import (
    differences,
    export_weights,
    import_weights,
    is_grown,
    local_pieces,
    read_notes,
)
from muonrec.checkpoint.writing import Writer, flat, save, state_of

__all__ = [
    "SCHEMA_VERSION",
    "UnusableCheckpoint",
    "Used",
    "Writer",
    "export_weights",
    "finished",
    "import_weights",
    "is_committed",
    "load",
    "newest",
    "newest_first",
    "prune",
    "read_notes",
    "read_progress",
    "save",
    "set_aside",
    "step_folder",
    "use_first",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def load(
    folder: str | Path, model: nn.Module, optimizer: KeyedOptimizer | None = None, *, grows: Collection[str] = ()
) -> dict[str, Any]:
    """Read a checkpoint in place, whatever number of ranks and sharding wrote it; return its progress.

    Every rank must call it. Before anything is loaded, every file is compared with its checksum (the ranks share the
    files) and every name and shape with the model's. Nothing in a checkpoint is run, see `muonrec.checkpoint.contents`.
    Row statistics of tables are converted between column-wise and other shardings, see
    `muonrec.checkpoint.row_statistics`; each rank then holds those of the whole table for a moment.

    Args:
        folder: of the checkpoint.
        model: written in place.
        optimizer: as it was saved, or a part of it.
        grows: weights of ``model`` that may have more rows than were saved. The first rows and their optimizer state
            are read, the others keep the values they have.

    Raises:
        UnusableCheckpoint: ``folder`` is no finished checkpoint, damaged, of another schema version, hostile, or of
            another model; says which, and what is wrong; on every rank.
        OSError: a rank cannot read it; on every rank.
    """
    folder = Path(folder)
    faults = gather(together(lambda: find_faults(folder, _share(read_marker(folder)))))
    if any(faults):
        raise UnusableCheckpoint(f"{folder} is damaged: {'; '.join(fault for mine in faults for fault in mine)}")
    nested = state_of(model, optimizer)
    state = flat(nested)
    contents = together(lambda: _fitting(folder, state, grows))

    # What stands elsewhere for other column shards is read whole, and converted below.
    saved = contents.tensors
    moved = [key for key in state if row_statistics.must_convert(key, state, saved)]
    whole = {key: torch.empty(saved[key].size, dtype=state[key].dtype) for key in moved}
    # DCP wants equal sizes, and reads what the saved chunks cover: of a table that has grown, the first rows.
    entries = {
        key: dataclasses.replace(entry, size=state[key].size()) if key in state and key not in whole else entry
        for key, entry in saved.items()
    }
    with dcp_errors(f"{folder} could not be read", otherwise=UnusableCheckpoint):
        reader = TensorReader(folder, contents._replace(tensors=entries))
        dcp.load({**state, **whole}, storage_reader=reader, planner=TensorPlanner())
    for key, vector in whole.items():
        logger.info("row statistics %s: %d for other column shards made of %d", key, state[key].size(0), len(vector))
        converted = row_statistics.convert(vector, key, state, saved)
        for piece, (offset,) in local_pieces(state[key]):
            piece.copy_(converted[offset : offset + piece.size(0)])
    model.load_state_dict(nested["model"])
    if optimizer is not None:
        optimizer.load_state_dict(nested["optimizer"])
    return read_progress(folder)


def _fitting(folder: Path, state: Mapping[str, torch.Tensor], grows: Collection[str]) -> Contents:
    """The checkpoint's contents, if what it holds is what ``state`` wants. Raises UnusableCheckpoint."""
    contents = read_contents(folder, read_marker(folder))
    # A rank holds the optimizer state of its own tables only, so what it lacks says nothing.
    there = {
        key: list(entry.size) for key, entry in contents.tensors.items() if key.startswith("model.") or key in state
    }
    here = {key: list(value.size()) for key, value in state.items()}
    of_growing = tuple(f"{prefix}.{weight}." for weight in grows for prefix in ("model", "optimizer.state"))
    for key in here.keys() & there.keys():
        # A vector of a table's rows may be made of several, one behind the other; what else has rows just grows.
        if row_statistics.is_convertible(key, state, contents.tensors) or (
            len(here[key]) > 1 and f"{key}.".startswith(of_growing) and is_grown(there[key], here[key])
        ):
            there[key] = here[key]
    if there != here:
        way = "load it with the config in its resolved.yaml"
        if all(key.startswith("optimizer.") for key in here.keys() | there.keys() if there.get(key) != here.get(key)):
            way += ", or its weights alone, from what python -m pipeline.export makes of it"
        raise UnusableCheckpoint(f"{folder} is of another model or optimizer: {differences(there, here)}; {way}")
    return contents


def _share(files: dict[str, T]) -> dict[str, T]:
    return {name: files[name] for name in sorted(files)[rank() :: num_ranks()]}
