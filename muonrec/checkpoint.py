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
) -> None:
    """Write model, optimizer and progress to ``folder``; the marker, written last, makes it a checkpoint.

    Every rank must call it. An unfinished folder of that name is replaced, a finished one is an error.

    Args:
        folder: on a file system that all ranks see.
        model: its state dict may hold sharded tensors.
        optimizer: keyed by name, its state existing.
        progress: what is not a tensor: step, best value so far...; JSON.

    Raises:
        ValueError: ``folder`` is a finished checkpoint already.
    """
    folder = Path(folder)
    if is_committed(folder):
        raise ValueError(f"{folder} is a finished checkpoint already; save under another name or delete it")
    if _rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / _PROGRESS).write_text(json.dumps(dict(progress or {}), indent=1))
    _barrier()
    with _quiet_dcp():
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
    with _quiet_dcp():
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
    """Delete all but the ``keep`` newest checkpoints and that of step ``best``; rank 0 does the work."""
    if _rank() == 0:
        for name in _names(Path(root))[:-keep]:
            if best is None or name != step_folder(root, best).name:
                # The marker goes first: a deletion cut short leaves no checkpoint that looks whole.
                (Path(root) / name / _MARKER).unlink()
                shutil.rmtree(Path(root) / name)
    _barrier()


def _names(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.glob("step-*") if is_committed(folder)) if root.is_dir() else []


def _state(model: nn.Module, optimizer: KeyedOptimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    return state


@contextmanager
def _quiet_dcp() -> Iterator[None]:
    # TorchRec's ShardedTensor warns of its own deprecation once per tensor and rank.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
