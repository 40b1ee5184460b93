"""Checkpoints: one DCP folder for model and optimizers, progress as JSON beside it, a marker that is written last."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_MARKER = "COMMITTED"
_PROGRESS = "progress.json"


def save(
    folder: str | Path,
    model: nn.Module,
    optimizer: KeyedOptimizer | None = None,
    *,
    progress: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write model, optimizer and progress to ``folder``; the marker, written last, makes it a checkpoint.

    Every rank must call it. An unfinished folder of that name is replaced, a finished one is an error.

    Args:
        folder: on a file system that all ranks see.
        model: its state dict may hold sharded tensors.
        optimizer: keyed by name, its state existing.
        progress: what is not a tensor: step, best value so far...; JSON.
        files: texts to keep beside it, by file name, such as the resolved config.

    Raises:
        ValueError: ``folder`` is a finished checkpoint already.
        OSError: a rank cannot write, as on a full disk; on every rank, or on the one that cannot.
    """
    folder = Path(folder)
    if is_committed(folder):
        raise ValueError(
            f"{folder} is a finished checkpoint already; save elsewhere, delete it, or stop another run of it"
        )
    if _rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / _PROGRESS).write_text(json.dumps(dict(progress or {}), indent=1))
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
    _barrier()
    with _dcp(f"{folder} could not be written, earlier checkpoints are whole"):
        dcp.save(_state(model, optimizer), checkpoint_id=folder)
    _barrier()
    if _rank() == 0:
        marker = folder / (_MARKER + ".tmp")
        marker.write_text(json.dumps({"schema_version": SCHEMA_VERSION}))
        marker.rename(folder / _MARKER)
    _barrier()


def load(folder: str | Path, model: nn.Module, optimizer: KeyedOptimizer | None = None) -> dict[str, Any]:
    """Read a checkpoint in place, whatever number of ranks and sharding wrote it; return its progress.

    Every rank must call it.

    Raises:
        ValueError: ``folder`` is no finished checkpoint, or of another schema version.
        OSError: a rank cannot read it, or it is of another model; on every rank.
    """
    folder = Path(folder)
    if not is_committed(folder):
        raise ValueError(
            f"{folder} is not a finished checkpoint (no {_MARKER} in it); finished ones: {_names(folder.parent)}"
        )
    version = json.loads((folder / _MARKER).read_text())["schema_version"]
    if version != SCHEMA_VERSION:
        raise ValueError(f"{folder} has checkpoint schema {version}, this version of muonrec reads {SCHEMA_VERSION}")
    state = _state(model, optimizer)
    with _dcp(f"{folder} could not be read"):
        dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return read_progress(folder)


def read_progress(folder: str | Path) -> dict[str, Any]:
    """The progress a checkpoint was saved with."""
    return json.loads((Path(folder) / _PROGRESS).read_text())


def is_committed(folder: str | Path) -> bool:
    """Whether ``folder`` holds a finished checkpoint."""
    return (Path(folder) / _MARKER).is_file()


def step_folder(root: str | Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps of a run lies."""
    return Path(root) / f"step-{step:08d}"


def newest(root: str | Path) -> Path | None:
    """The finished checkpoint of the highest step below ``root``, or None."""
    names = _names(Path(root))
    return Path(root) / names[-1] if names else None


def prune(root: str | Path, *, keep: int, best: int | None) -> None:
    """Delete all but the ``keep`` newest checkpoints and that of step ``best``, and what cut-off saves left behind.

    Every rank must call it, none of them in the middle of a save; rank 0 does the work.
    """
    if _rank() == 0:
        kept = {*_names(Path(root))[-keep:], step_folder(root, best or 0).name}
        for folder in Path(root).glob("step-*"):
            if folder.name not in kept:
                # The marker goes first: a deletion cut short leaves no checkpoint that looks whole.
                (folder / _MARKER).unlink(missing_ok=True)
                shutil.rmtree(folder)
    _barrier()


def _names(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.glob("step-*") if is_committed(folder)) if root.is_dir() else []


def _state(model: nn.Module, optimizer: KeyedOptimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    return state


@contextmanager
def _dcp(message: str) -> Iterator[None]:
    # TorchRec's ShardedTensor warns of its own deprecation once per tensor and rank.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            yield
        except dcp.CheckpointException as error:  # the failures of all ranks, on every rank; not even an Exception
            rank, (failure, _) = next(iter(error.failures.items()))
            raise OSError(f"{message}: {failure!r} on rank {rank}") from error


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
