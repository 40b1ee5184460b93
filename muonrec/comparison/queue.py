"""Runs as processes: a few at a time, killed and started again without losing what they have done."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from muonrec.comparison.results import Status
from muonrec.runlog import Progress

logger = logging.getLogger(__name__)

LOG = "log.txt"
QUEUE_STATE = "queue.json"
_FAULT_LINES = 20
_POLL_S = 0.2
# What a run gets to write a checkpoint in when it is asked to stop.
_GRACE_S = 120.0
# As muonrec.losses says it.
_DIVERGED = re.compile(r"FloatingPointError|the loss of step \d+ is (nan|-?inf)")
# What torchrun says, at length, once a rank has said why it ends.
_OF_TORCHRUN = re.compile(r"^.*torch/distributed/elastic/multiprocessing/api\.py", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Job:
    """Commands to run one after the other in a folder that outlives interruptions.

    Args:
        folder: of the run; receives ``log.txt``, all that the commands say.
        commands: each goes on where it was interrupted when it is started again.
        num_steps: of training, to show the progress.
        name: for people.
    """

    folder: Path
    commands: tuple[tuple[str, ...], ...]
    num_steps: int
    name: str


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job ended: its status, the end of its log if not well, and the seconds of all its processes."""

    status: Status
    fault: str
    wall_s: float


class Queue:
    """Runs jobs, as many at once as there are slots.

    A command that fails is started again, since a training run goes on from its last checkpoint; after ``tries``
    failures in a row the job has failed and the others go on. One whose loss is not finite has diverged and is not
    tried again. Ctrl-C, and whatever else leaves `run`, ends what runs by SIGTERM, so that it saves.

    Args:
        slots: environment of each slot, such as the devices its runs may see.
        progress: moved by the steps that the jobs train.
        tries: of each command.
    """

    def __init__(self, slots: Sequence[Mapping[str, str]], progress: Progress, *, tries: int = 2) -> None:
        self._free = list(slots)
        self._progress, self._tries = progress, tries
        self._running: list[_Running] = []

    def run(self, jobs: Sequence[Job], on_end: Callable[[Job, Ended], None]) -> None:
        """Run ``jobs`` in order; ``on_end`` hears of each as it ends.

        Raises:
            KeyboardInterrupt, or what ``on_end`` raises: after all that ran has been stopped.
        """
        waiting = list(jobs)
        counted: dict[Path, int] = {}
        try:
            while waiting or self._running:
                while waiting and self._free:
                    running = _Running(waiting.pop(0), self._free.pop(0))
                    self._running.append(running)
                    counted[running.job.folder] = min(steps_done(running.job.folder), running.job.num_steps)
                    running.start()
                time.sleep(_POLL_S)
                for running in list(self._running):
                    before, done = (
                        counted[running.job.folder],
                        min(steps_done(running.job.folder), running.job.num_steps),
                    )
                    self._progress.advance(max(done - before, 0))
                    counted[running.job.folder] = max(done, before)
                    ended = running.poll(tries=self._tries)
                    if ended is not None:
                        self._running.remove(running)
                        self._free.append(running.slot)
                        # What it will not train any more, or trained unseen.
                        self._progress.advance(running.job.num_steps - counted[running.job.folder])
                        on_end(running.job, ended)
        finally:
            self._stop()

    def _stop(self) -> None:
        if not self._running:
            return
        logger.info("stopping %d runs; they save first", len(self._running))
        try:
            for running in self._running:
                running.signal(signal.SIGTERM)
            deadline = time.monotonic() + _GRACE_S
            for running in self._running:
                running.wait(max(deadline - time.monotonic(), 0.0))
        finally:  # a second Ctrl-C does not wait
            for running in self._running:
                running.signal(signal.SIGKILL)
                running.close()
            self._running = []


class _Running:
    """A job under way in a slot; what it has done is kept in ``queue.json`` of its folder."""

    def __init__(self, job: Job, slot: Mapping[str, str]) -> None:
        self.job, self.slot = job, slot
        self._path = job.folder / QUEUE_STATE
        state: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}
        self._commands_done, self._wall_s = state.get("commands_done", 0), state.get("wall_s", 0.0)
        self._failures = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._started = time.monotonic()

    def start(self) -> None:
        self.job.folder.mkdir(parents=True, exist_ok=True)
        if self._commands_done >= len(self.job.commands):  # done before, and not recorded
            return
        self._started = time.monotonic()
        with (self.job.folder / LOG).open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: Ctrl-C on the terminal is ours alone to pass on.
            self._process = subprocess.Popen(
                self.job.commands[self._commands_done],
                env={**os.environ, **self.slot},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self, *, tries: int) -> Ended | None:
        """Go on with the next command or the next try; how the job ended once there is none."""
        if self._process is None:
            return Ended("done", "", self._wall_s)
        status = self._process.poll()
        if status is None:
            return None
        self.close()
        if status == 0:
            self._failures = 0
            self._commands_done += 1
            self._write()
            if self._commands_done == len(self.job.commands):
                return Ended("done", "", self._wall_s)
        else:
            self._failures += 1
            said = self._said()
            fault = "\n".join(said.splitlines()[-_FAULT_LINES:])
            if _DIVERGED.search(said):
                return Ended("diverged", fault, self._wall_s)
            if self._failures >= tries:
                return Ended("failed", f"exit status {status}\n{fault}", self._wall_s)
            logger.warning("%s ended with status %d and is started again", self.job.name, status)
        self.start()
        return None

    def signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def wait(self, timeout_s: float) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)

    def close(self) -> None:
        """Reap the process and keep what it took."""
        if self._process is not None:
            self._process.wait()
            self._wall_s += time.monotonic() - self._started
            self._process = None
            self._write()

    def _write(self) -> None:
        partial = self._path.with_suffix(".tmp")
        partial.write_text(json.dumps({"commands_done": self._commands_done, "wall_s": self._wall_s}) + "\n")
        partial.rename(self._path)

    def _said(self) -> str:
        """What the command said before its launcher took over."""
        with (self.job.folder / LOG).open("rb") as log:
            log.seek(self._log_start)
            said = log.read().decode(errors="replace")
        launcher = _OF_TORCHRUN.search(said)
        return said[: launcher.start()] if launcher and said[: launcher.start()].strip() else said


def steps_done(folder: Path) -> int:
    """The step of the newest line of a run's metrics.jsonl; 0 without any."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):  # the last one may be half written, the first half read
        with contextlib.suppress(ValueError):
            return int(json.loads(line)["step"])
    return 0


def available_cores() -> int:
    """Processor cores that this process may use: no more than its affinity, as under SLURM, and a container's limit."""
    # Not every system has affinities.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": microseconds in every so many; "max": no limit
    quota, _, period = limit.read_text().partition(" ") if limit.is_file() else ("max", "", "")
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def slots(parallel: int | None, *, ranks: int, devices: int, cores: int) -> list[dict[str, str]]:
    """The environment of each slot: devices of its own where there are any, and its share of the cores.

    Args:
        parallel: how many; None for as many as devices, or else cores, allow.
        ranks: processes of a run.
        devices: CUDA devices of this machine.
        cores: processor cores that the runs share, see `available_cores`.

    Raises:
        ValueError: runs of so many ranks do not fit the devices.
    """
    if devices:
        most = devices // ranks
        if (parallel or 1) > most:
            raise ValueError(
                f"{parallel or 1} parallel runs of {ranks} ranks were asked, but there are {devices} devices; "
                "lower parallel_runs or ranks"
            )
        count = parallel or most
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        own = [{"CUDA_VISIBLE_DEVICES": ",".join(visible[i * ranks : (i + 1) * ranks])} for i in range(count)]
    else:
        own = [{} for _ in range(parallel or max(1, cores // ranks))]
    share = max(1, cores // (len(own) * ranks))
    threads = min(share, int(os.environ.get("OMP_NUM_THREADS", share)))
    return [{"OMP_NUM_THREADS": str(threads), **slot} for slot in own]
