"""Checkpoints: one DCP folder for model and optimizers, progress as JSON beside it, a marker that is written last."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torchrec.optim.keyed import KeyedOptimizer

from muonrec.checkpoint import row_statistics
from muonrec.checkpoint.contents import Contents, TensorPlanner, TensorReader, read_contents
from muonrec.checkpoint.marker import (
    MARKER,
    SCHEMA_VERSION,
    UnusableCheckpoint,
    find_faults,
    read_marker,
    record_files,
    write_marker,
)
from muonrec.checkpoint.weights import differences, export_weights, import_weights, local_pieces

__all__ = [
    "SCHEMA_VERSION",
    "UnusableCheckpoint",
    "export_weights",
    "finished",
    "import_weights",
    "is_committed",
    "load",
    "newest",
    "prune",
    "read_progress",
    "save",
    "set_aside",
    "step_folder",
]

logger = logging.getLogger(__name__)

_PROGRESS = "progress.json"

T = TypeVar("T")


def save(
    folder: str | Path,
    model: nn.Module,
    optimizer: KeyedOptimizer | None = None,
    *,
    progress: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write model, optimizer and progress to ``folder``; the marker, written last, makes it a checkpoint.

    Every rank must call it. An unfinished folder of that name is replaced, a finished one is an error. Each rank reads
    back and hashes what it wrote: in parallel, and from its own machine's cache of the file system.

    Args:
        folder: on a file system that all ranks see.
        model: its state dict may hold sharded tensors.
        optimizer: keyed by name, its state existing.
        progress: what is not a tensor: step, best value so far...; JSON.
        files: texts to keep beside it, by file name, such as the resolved config.

    Raises:
        ValueError: ``folder`` is a finished checkpoint already, or the state holds what is not a tensor.
        OSError: a rank cannot write, as on a full disk; on every rank.
    """
    folder = Path(folder)
    if is_committed(folder):
        raise ValueError(
            f"{folder} is a finished checkpoint already; save elsewhere, delete it, or stop another run of it"
        )
    state = _flat(_state(model, optimizer))
    texts = {_PROGRESS: json.dumps(dict(progress or {}), indent=1), **(files or {})}
    _together(lambda: _start(folder, texts) if _rank() == 0 else None)
    with _dcp(f"{folder} could not be written, earlier checkpoints are whole"):
        dcp.save(state, checkpoint_id=folder)
    written = _gather(_together(lambda: record_files(folder, _written_by(folder, _rank()))))
    everything = {name: record for records in written for name, record in records.items()}
    _together(lambda: write_marker(folder, everything) if _rank() == 0 else None)


def load(folder: str | Path, model: nn.Module, optimizer: KeyedOptimizer | None = None) -> dict[str, Any]:
    """Read a checkpoint in place, whatever number of ranks and sharding wrote it; return its progress.

    Every rank must call it. Before anything is loaded, every file is compared with its checksum (the ranks share the
    files) and every name and shape with the model's. Nothing in a checkpoint is run, see `muonrec.checkpoint.contents`.
    Row statistics of tables are converted between column-wise and other shardings, see
    `muonrec.checkpoint.row_statistics`; each rank then holds those of the whole table for a moment.

    Raises:
        UnusableCheckpoint: ``folder`` is no finished checkpoint, damaged, of another schema version, hostile, or of
            another model; says which, and what is wrong; on every rank.
        OSError: a rank cannot read it; on every rank.
    """
    folder = Path(folder)
    faults = _gather(_together(lambda: find_faults(folder, _share(read_marker(folder)))))
    if any(faults):
        raise UnusableCheckpoint(f"{folder} is damaged: {'; '.join(fault for mine in faults for fault in mine)}")
    nested = _state(model, optimizer)
    state = _flat(nested)
    contents = _together(lambda: _fitting(folder, state))

    # Of another size only for another number of column shards: read whole, converted below.
    sizes = {key: contents.tensors[key].size for key in state}
    whole = {
        key: torch.empty(sizes[key], dtype=value.dtype) for key, value in state.items() if sizes[key] != value.size()
    }
    with _dcp(f"{folder} could not be read", otherwise=UnusableCheckpoint):
        dcp.load({**state, **whole}, storage_reader=TensorReader(folder, contents), planner=TensorPlanner())
    for key, saved in whole.items():
        logger.info("row statistics %s: %d for other column shards made of %d", key, state[key].size(0), len(saved))
        converted = row_statistics.convert(saved, key, state, contents.tensors)
        for piece, (offset,) in local_pieces(state[key]):
            piece.copy_(converted[offset : offset + piece.size(0)])
    model.load_state_dict(nested["model"])
    if optimizer is not None:
        optimizer.load_state_dict(nested["optimizer"])
    return read_progress(folder)


def read_progress(folder: str | Path) -> dict[str, Any]:
    """The progress a checkpoint was saved with.

    Raises:
        UnusableCheckpoint: ``folder`` is no finished checkpoint, or this file of it was altered.
    """
    folder = Path(folder)
    files = read_marker(folder)
    if faults := find_faults(folder, {name: files[name] for name in files if name == _PROGRESS}):
        raise UnusableCheckpoint(f"{folder} is damaged: {faults[0]}")
    return json.loads((folder / _PROGRESS).read_text())


def is_committed(folder: str | Path) -> bool:
    """Whether ``folder`` holds a finished checkpoint."""
    return (Path(folder) / MARKER).is_file()


def step_folder(root: str | Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps of a run lies."""
    return Path(root) / f"step-{step:08d}"


def finished(root: str | Path) -> list[Path]:
    """The finished checkpoints below ``root``, in order of steps."""
    return sorted(folder for folder in Path(root).glob("step-*") if is_committed(folder))


def newest(root: str | Path) -> Path | None:
    """The finished checkpoint of the highest step below ``root``, or None."""
    return next(reversed(finished(root)), None)


def prune(root: str | Path, *, keep: int, best: int | None) -> None:
    """Delete all but the ``keep`` newest checkpoints and that of step ``best``, and what cut-off saves left behind.

    Every rank must call it, none of them in the middle of a save; rank 0 does the work.
    """
    if _rank() == 0:
        kept = {*finished(root)[-keep:], step_folder(root, best or 0)}
        for folder in Path(root).glob("step-*"):
            if folder not in kept:
                # The marker goes first: a deletion cut short leaves no checkpoint that looks whole.
                (folder / MARKER).unlink(missing_ok=True)
                shutil.rmtree(folder)
    _barrier()


def set_aside(folder: Path) -> None:
    """Rename a checkpoint to ``unusable-...``, so that its step can be saved again; every rank must call it."""
    if _rank() == 0:
        aside = folder.with_name(f"unusable-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    _barrier()


def _start(folder: Path, texts: Mapping[str, str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


def _state(model: nn.Module, optimizer: KeyedOptimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    return state


def _flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors by dotted name. DCP would pickle anything else, so anything else is an error."""
    flat = flatten_state_dict(state)[0]
    # An optimizer without state leaves empty dicts.
    others = sorted(key for key, value in flat.items() if not isinstance(value, torch.Tensor) and value != {})
    if others:
        raise ValueError(
            f"{others} are no tensors, and a checkpoint holds tensors only, since loading anything else runs code; "
            "keep it in progress, which is JSON"
        )
    return {key: value for key, value in flat.items() if isinstance(value, torch.Tensor)}


def _fitting(folder: Path, state: Mapping[str, torch.Tensor]) -> Contents:
    """The checkpoint's contents, if what it holds is what ``state`` wants. Raises UnusableCheckpoint."""
    contents = read_contents(folder, read_marker(folder))
    # A rank holds the optimizer state of its own tables only, so what it lacks says nothing.
    there = {
        key: list(entry.size) for key, entry in contents.tensors.items() if key.startswith("model.") or key in state
    }
    here = {key: list(value.size()) for key, value in state.items()}
    for key in here:
        if key in there and here[key] != there[key] and row_statistics.is_convertible(key, state, contents.tensors):
            there[key] = here[key]
    if there != here:
        raise UnusableCheckpoint(
            f"{folder} is of another model or optimizer: {differences(there, here)}; load it with the config in its "
            "resolved.yaml"
        )
    return contents


def _written_by(folder: Path, rank: int) -> list[str]:
    """The files that ``rank`` wrote: DCP's of its name, and on the first one all others."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return [name for name in names if (int(name[2:].partition("_")[0]) if name.startswith("__") else 0) == rank]


def _share(files: dict[str, T]) -> dict[str, T]:
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    return {name: files[name] for name in sorted(files)[_rank() :: num_ranks]}


def _together(work: Callable[[], T]) -> T:
    """Do ``work``; if it fails on one rank, its error is raised on every rank, so that none waits for that one."""
    mine: Exception | None = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        mine = error
    for failure in _gather(mine):
        if failure is not None:
            raise failure
    return result


def _gather(mine: T) -> list[T]:
    if not dist.is_initialized():
        return [mine]
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


@contextmanager
def _dcp(message: str, *, otherwise: type[Exception] = OSError) -> Iterator[None]:
    # TorchRec's ShardedTensor warns of its own deprecation once per tensor and rank.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            yield
        except dcp.CheckpointException as error:  # the failures of all ranks, on every rank; not even an Exception
            rank, (failure, _) = next(iter(error.failures.items()))
            kind = OSError if isinstance(failure, OSError) else otherwise
            raise kind(f"{message}: {failure!r} on rank {rank}") from error


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
