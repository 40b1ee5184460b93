"""The checkpoints of a run, a folder a step: which are finished, which can be used, which are kept."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch.distributed as dist

from muonrec.checkpoint.marker import MARKER, UnusableCheckpoint, find_faults, read_marker
from muonrec.checkpoint.together import barrier, gather, rank, together

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"

T = TypeVar("T")


class Used(NamedTuple, Generic[T]):
    """A checkpoint that could be used: its folder, what came of it, and the folders passed over before it."""

    folder: Path
    result: T
    passed_over: list[Path]


def read_progress(folder: str | Path) -> dict[str, Any]:
    """The progress a checkpoint was saved with; every rank must call it.

    Raises:
        UnusableCheckpoint: ``folder`` is no finished checkpoint, or this file of it was altered; on every rank.
    """
    folder = Path(folder)

    def read() -> dict[str, Any]:
        files = read_marker(folder)
        if faults := find_faults(folder, {name: files[name] for name in files if name == PROGRESS}):
            raise UnusableCheckpoint(f"{folder} is damaged: {faults[0]}")
        return json.loads((folder / PROGRESS).read_text())

    return together(read)


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


def newest_first(root: str | Path) -> list[Path]:
    """The finished checkpoints below ``root`` as the first rank sees them, the newest first; every rank must call it.

    A rank on a machine that does not see the folder fails with the first of them, instead of starting anew.
    """
    return gather(finished(root)[::-1])[0]


def prune(root: str | Path, *, keep: int, best: int | None, group: dist.ProcessGroup | None = None) -> None:
    """Delete all but the ``keep`` newest checkpoints and that of step ``best``, and what cut-off saves left behind.

    Every rank must call it, none of them in the middle of a save; rank 0 does the work.
    """
    if rank() == 0:
        kept = {*finished(root)[-keep:], step_folder(root, best or 0)}
        for folder in Path(root).glob("step-*"):
            if folder not in kept:
                # The marker goes first: a deletion cut short leaves no checkpoint that looks whole.
                (folder / MARKER).unlink(missing_ok=True)
                shutil.rmtree(folder)
    barrier(group)


def set_aside(folder: Path) -> None:
    """Rename a checkpoint to ``unusable-...``, so that its step can be saved again; every rank must call it."""
    if rank() == 0:
        aside = folder.with_name(f"unusable-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            folder.rename(aside)
            logger.warning("%s is renamed to %s", folder, aside.name)
    barrier()


def use_first(folders: Sequence[Path], use: Callable[[Path], T]) -> Used[T] | None:
    """``use`` of the first of ``folders`` that can be used; each before it is named in a warning, with its fault.

    Args:
        folders: checkpoints in the order in which to try them, such as `newest_first`; the same on every rank.
        use: raises UnusableCheckpoint where one cannot be used, on every rank or on none, as `load` does.

    Returns:
        None if ``folders`` is empty.

    Raises:
        UnusableCheckpoint: there are folders, and none can be used; says what is wrong with each.
    """
    faults: dict[Path, str] = {}
    for folder in folders:
        try:
            result = use(folder)
        except UnusableCheckpoint as error:
            faults[folder] = str(error)
            continue
        for fault in faults.values():
            if rank() == 0:
                logger.warning("%s; %s is used instead", fault, folder.name)
        return Used(folder, result, list(faults))
    if faults:
        raise UnusableCheckpoint(
            f"no checkpoint in {folders[0].parent} can be used: {'; '.join(faults.values())}; pass another run, or to "
            "train this one anew delete that folder"
        )
    return None
