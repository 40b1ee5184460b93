"""Writing checkpoints: one at once, or those of a run, on request beside the training."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.planner import WriteItem

from muonrec.checkpoint.folders import PROGRESS, is_committed, prune, step_folder
from muonrec.checkpoint.marker import record_files, write_marker
from muonrec.checkpoint.together import dcp_errors, gather, num_ranks, rank, together
from muonrec.checkpoint.weights import local_pieces
from muonrec.mesh import TIMEOUT

if TYPE_CHECKING:
    from torchrec.optim.keyed import KeyedOptimizer

logger = logging.getLogger(__name__)


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
    check_unfinished(folder)
    _write(folder, flat(state_of(model, optimizer)), _texts(progress, files))


class Writer:
    """Writes the checkpoints of a run below ``root``, a folder a step, and drops those no longer kept.

    Asynchronous, `save` copies the state to host memory and returns; a thread on each rank writes the copy, over a
    process group of its own. One is written at a time: the next `save` waits for it. Until its marker is written, last
    as ever, the checkpoint before is the newest. Every rank makes a writer and calls it alike, as a context: its end
    waits for what is being written.

    Args:
        root: of the checkpoints.
        keep: the newest ones that are kept, beside the best.
        asynchronous: takes host memory for one more copy of what the rank holds.
        may_commit: asked on the first rank before a marker is written.
    """

    def __init__(
        self, root: Path, *, keep: int, asynchronous: bool = False, may_commit: Callable[[], bool] = lambda: True
    ) -> None:
        self._root, self._keep, self._may_commit = root, keep, may_commit
        self._asynchronous = asynchronous
        self._group = None
        if asynchronous and num_ranks() > 1:
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._thread: threading.Thread | None = None
        self._cuda_device: int | None = None
        self._failure: BaseException | None = None
        self.pause_s = 0.0  # for which the last `save` held up its caller

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: KeyedOptimizer | None = None,
        *,
        best: int | None = None,
        progress: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Write the checkpoint of ``step``, as `save` does, and keep that of step ``best``.

        Raises:
            ValueError: as `save`; or another start has taken the run over.
            OSError: this one or, asynchronous, the one before could not be written; on every rank.
        """
        started_s = time.monotonic()
        self.finish()
        folder = step_folder(self._root, step)
        check_unfinished(folder)
        state, texts = flat(state_of(model, optimizer)), _texts(progress, files)
        if self._asynchronous:
            self._cuda_device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            work = (folder, state, texts, best, _PlannerOfCopies(state))
            self._thread = threading.Thread(
                target=self._write_beside, args=work, name="muonrec-checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._write(folder, state, texts, best)
        self.pause_s = time.monotonic() - started_s

    def has_failed(self) -> bool:
        """Whether what is written beside the training has failed on this rank; `finish` will raise it on all."""
        return self._failure is not None

    def finish(self) -> None:
        """Wait for what is being written; every rank must call it. Raises its error, on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.finish()
        except Exception as failure:
            if error is None or isinstance(error, SystemExit):
                raise
            logger.warning("%s", failure)
        if self._group is not None and error is None:  # after an error others may be gone
            dist.barrier(self._group)  # to end it at once would break the connection of a rank that still joins it
            dist.destroy_process_group(self._group)

    def _write_beside(self, *work: Any) -> None:
        try:
            if self._cuda_device is not None:
                torch.cuda.set_device(self._cuda_device)  # of this thread, whose own would be the first, for every rank
            self._write(*work)
        except BaseException as failure:  # raised by `finish`
            self._failure = failure

    def _write(
        self,
        folder: Path,
        state: dict[str, torch.Tensor],
        texts: dict[str, str],
        best: int | None,
        planner: dcp.SavePlanner | None = None,
    ) -> None:
        _write(folder, state, texts, planner=planner, group=self._group, may_commit=self._may_commit)
        prune(self._root, keep=self._keep, best=best, group=self._group)


def check_unfinished(folder: Path) -> None:
    """Raises ValueError if ``folder`` is a finished checkpoint."""
    if is_committed(folder):
        raise ValueError(
            f"{folder} is a finished checkpoint already; save elsewhere, delete it, or stop another run of it"
        )


def state_of(model: nn.Module, optimizer: KeyedOptimizer | None) -> dict[str, Any]:
    """The nested state of both, sharing their memory."""
    state: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    return state


def flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors by dotted name. DCP would pickle anything else, so anything else is an error."""
    by_name = flatten_state_dict(state)[0]
    # An optimizer without state leaves empty dicts.
    others = sorted(key for key, value in by_name.items() if not isinstance(value, torch.Tensor) and value != {})
    if others:
        raise ValueError(
            f"{others} are no tensors, and a checkpoint holds tensors only, since loading anything else runs code; "
            "keep it in progress, which is JSON"
        )
    return {key: value for key, value in by_name.items() if isinstance(value, torch.Tensor)}


class _PlannerOfCopies(dcp.DefaultSavePlanner):
    """DCP's planner, with copies of this rank's pieces: the state itself may change, and only says who holds what."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._copies = {
            (name, tuple(offsets)): piece.to("cpu", copy=True)
            for name, value in state.items()
            for piece, offsets in local_pieces(value)
        }

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.index.offset is not None
        return self._copies[write_item.index.fqn, tuple(write_item.index.offset)]


def _texts(progress: Mapping[str, Any] | None, files: Mapping[str, str] | None) -> dict[str, str]:
    return {PROGRESS: json.dumps(dict(progress or {}), indent=1), **(files or {})}


def _write(
    folder: Path,
    state: dict[str, torch.Tensor],
    texts: dict[str, str],
    *,
    planner: dcp.SavePlanner | None = None,
    group: dist.ProcessGroup | None = None,
    may_commit: Callable[[], bool] = lambda: True,
) -> None:
    together(lambda: _start(folder, texts) if rank() == 0 else None, group)
    with dcp_errors(f"{folder} could not be written, earlier checkpoints are whole"):
        dcp.save(state, checkpoint_id=folder, planner=planner, process_group=group)
    written = gather(together(lambda: record_files(folder, _written_by(folder, rank())), group), group)
    everything = {name: record for records in written for name, record in records.items()}

    def commit() -> None:
        if not may_commit():
            raise ValueError(f"{folder} was left unfinished: another start of the run has taken it over")
        write_marker(folder, everything)

    together(lambda: commit() if rank() == 0 else None, group)


def _start(folder: Path, texts: Mapping[str, str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


def _written_by(folder: Path, rank: int) -> list[str]:
    """The files that ``rank`` wrote: DCP's of its name, and on the first one all others."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return [name for name in names if (int(name[2:].partition("_")[0]) if name.startswith("__") else 0) == rank]
