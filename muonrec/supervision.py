"""Supervision of a run: when it has to stop, agreed over the ranks, and whether it may still write.

supervision = Supervision(folder, ranks)
with supervision:
    for step in ...:
        if supervision.must_stop():
            save(step)
            supervision.stop(step)
        train(step)
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import socket
import time
import uuid
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from muonrec.mesh import TIMEOUT, Ranks

logger = logging.getLogger(__name__)

# Between two looks at the lease: one file on shared storage, by one rank.
_LOOK_EVERY_S = 1.0
# Without a step for so long, every rank writes its stacks to the log; half of what a collective waits (muonrec.mesh).
_HANGS_AFTER_S = 300.0
_GO_ON, _STOP, _SUPERSEDED = 0, 1, 2
_JOB = "SLURM_JOB_ID"


class StopRequested(SystemExit):
    """The run was asked to stop, and has saved; the exit status is that of a process ended by SIGTERM."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Superseded(ValueError):
    """Another start of the same run has taken it over; this one must not write any more."""


class StoodDown(SystemExit):
    """The same, where SLURM itself started the job again: status 0.

    A failure would make the script of this copy, which may live on beyond its node's daemon, requeue the job once more.
    """

    def __init__(self) -> None:
        super().__init__(0)


class Lease:
    """Who may write to a run: the newest start, named in ``lease.json`` of its folder.

    SLURM starts a job again while the tasks of a node that it lost may live on. They find the lease taken and end. What
    they have begun to write then is whole or is found damaged by its checksums: a lease is no lock.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / "lease.json"
        self._holder = uuid.uuid4().hex
        self._launch = _launch()

    def take(self) -> None:
        """Become the one who may write.

        Raises:
            Superseded: torchrun restarted a rank of a start that has been superseded.
        """
        before = self._read()
        past = before.get("past", [])
        if self._launch in past:
            raise self.end_of_it()
        if before.get("launch") not in (None, self._launch):
            past = [*past, before["launch"]][-50:]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f".lease.{self._holder}")
        facts: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get(_JOB)}
        facts["since"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        partial.write_text(json.dumps({"holder": self._holder, "launch": self._launch, "past": past, **facts}) + "\n")
        partial.replace(self._path)

    def is_ours(self) -> bool:
        """Whether nobody has taken it since."""
        return self._read().get("holder") == self._holder

    def end_of_it(self) -> Superseded | StoodDown:
        """What to raise when it is not."""
        now = self._read()
        if now.get("job") is not None and now["job"] == os.environ.get(_JOB):
            logger.warning("SLURM has started job %s again, on %s; this copy of it ends", now["job"], now["host"])
            return StoodDown()
        by = f"process {now['pid']} on {now['host']} at {now['since']}" if now else "nobody: the file is gone"
        return Superseded(
            f"{self._path.parent} was taken over by {by}; this copy of the run ends and writes nothing more. "
            "Was that start a mistake? End it and start this command again"
        )

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}


class Supervision:
    """Ends a run well: SIGTERM on any rank stops all of them at the same step; every rank must make and ask it.

    Making it takes the lease of ``folder``; SIGTERM is handled from then on until the block ends. A rank that makes no
    step for five minutes writes the stacks of its threads to stderr, every five minutes.

    Raises:
        Superseded: on every rank, see `Lease.take`.
    """

    def __init__(self, folder: str | Path, ranks: Ranks) -> None:
        self._ranks, self._lease = ranks, Lease(folder)
        self._asked = False
        self._looked_s = self._watched_s = -_LOOK_EVERY_S
        # Of its own, so that its reductions overlap the training's collectives; on CPU, where they end by themselves.
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if ranks.num_ranks > 1 else None
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._before = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._agree(self._taken() if ranks.is_first else _GO_ON)

    def must_stop(self, *, or_if: bool = False) -> bool:
        """Whether the run has to save and `stop` now: the same answer on every rank, about the step before.

        Args:
            or_if: another cause to stop, that this rank has found.

        Raises:
            Superseded: on every rank; nothing may be written.
        """
        mine = _STOP if self._asked or or_if else _GO_ON
        now = time.monotonic()
        if now - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now
            faulthandler.dump_traceback_later(_HANGS_AFTER_S, repeat=True, file=2)  # not a captured sys.stderr
            if self._ranks.is_first and not self._lease.is_ours():
                mine = _SUPERSEDED
        # Reduced while the next step runs, so that nobody waits: the answer is one step old, and the same everywhere.
        previous, self._pending = self._pending, self._reduce(mine)
        verdict = _GO_ON if previous is None else self._wait(previous)
        if verdict == _SUPERSEDED:
            raise self._lease.end_of_it()
        return verdict == _STOP

    def check_lease(self) -> None:
        """Before anything is written. Raises Superseded on every rank."""
        self._agree(_SUPERSEDED if self._ranks.is_first and not self._lease.is_ours() else _GO_ON)

    def may_write(self) -> bool:
        """Whether the lease is still ours, as this rank alone sees it."""
        return self._lease.is_ours()

    def stop(self, step: int) -> None:
        """Say that the run is saved, and leave."""
        if self._ranks.is_first:
            logger.warning("stopped by SIGTERM at step %d, which is saved; the same command goes on from there", step)
        raise StopRequested

    def __enter__(self) -> Supervision:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGTERM, self._before)
        if self._group is not None and error is None:  # after an error others may be gone
            if self._pending is not None:
                self._wait(self._pending)
            dist.destroy_process_group(self._group)

    def _on_sigterm(self, _: int, __: FrameType | None) -> None:
        self._asked = True

    def _taken(self) -> int:
        try:
            self._lease.take()
        except (Superseded, StoodDown):
            return _SUPERSEDED
        return _GO_ON

    def _agree(self, mine: int) -> None:
        if self._wait(self._reduce(mine)) == _SUPERSEDED:
            raise self._lease.end_of_it()

    def _reduce(self, mine: int) -> tuple[torch.Tensor, Any]:
        verdict = torch.tensor(mine)
        work = None
        if self._group is not None:
            work = dist.all_reduce(verdict, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return verdict, work

    @staticmethod
    def _wait(pending: tuple[torch.Tensor, Any]) -> int:
        verdict, work = pending
        if work is not None:
            work.wait()
        return int(verdict)


def _launch() -> str:
    """The torchrun that started this rank, which restarts in place keep; without torchrun, this process alone."""
    parent = os.getppid()
    try:
        # Field 22 of proc(5), counted after the name, which may hold spaces: when the process was started.
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = ""
    return f"{socket.gethostname()}:{parent}:{started}" if "TORCHELASTIC_RUN_ID" in os.environ else uuid.uuid4().hex
