"""What a stage says: log lines, progress, errors, and the run's record in metrics.jsonl and TensorBoard."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.text import Text

logger = logging.getLogger(__name__)

# Where no terminal shows a bar, a line this often.
_SECONDS_BETWEEN_LINES = 15.0

# One for log lines and bars, so that lines appear above the bar and not through it.
_CONSOLE = Console(stderr=True, highlight=False)


def configure_logging(*, is_first: bool = True) -> None:
    """Once, by a stage: the first rank informs, all ranks warn; the same lines on a terminal and in a file."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _Lines) or type(handler) is logging.StreamHandler:  # ours, and those of libraries
            root.removeHandler(handler)
    root.addHandler(_Lines())
    root.setLevel(logging.WARNING)
    for name in ("muonrec", "pipeline", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if is_first else logging.WARNING)
    # TorchRec, FBGEMM and torch warn, once per rank and start, of things that are theirs to mend.
    for name in ("torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torchrec\.|torch\.distributed\.")
    warnings.filterwarnings("ignore", message=".*ShardedTensor", category=FutureWarning)


def run_stage(work: Callable[[], object]) -> int:
    """Do a stage's work; what a user can mend ends in one clear message, said by one rank, and not in a trace.

    Returns:
        The exit status: 0; 1 after an error of config, data, files or a missing package, or where another rank has
        ended; 130 after Ctrl-C.
    """
    try:
        work()
    except KeyboardInterrupt:
        if _speaks_for_all("stopped"):
            logger.error("stopped by Ctrl-C; start the same command again to go on")
        return 130
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        if _speaks_for_all(str(error)):
            # A ValueError that a library raised was not written for our user: then the trace is the message.
            logger.error("%s", error, exc_info=isinstance(error, ValueError) and not _is_ours(error))
        return 1
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        logger.warning("this rank ends, since another one has ended or hangs: see what that one says (%s)", error)
        return 1
    return 0


class Progress:
    """How far a piece of work is: a bar on a terminal, elsewhere a line every 15 seconds; with rate and ETA.

    Args:
        what: the work, such as ``reading events``.
        unit: of what is counted, such as ``events``.
        total: how many there will be; None if nobody knows.
        done: how many were done before.
        enabled: False on all ranks but the first.
    """

    def __init__(
        self, what: str, unit: str, *, total: float | None = None, done: int = 0, enabled: bool = True
    ) -> None:
        self._what, self._unit, self._total, self._enabled = what, unit, total, enabled
        self._done: float = done
        self._started_s = self._last_line_s = time.monotonic()
        self._already_done = done
        self._first: tuple[float, float] | None = None  # when counting began, and at how many: a sort may come before
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.TextColumn("{task.fields[status]}"),
            rich_progress.TextColumn("ETA"),
            rich_progress.TimeRemainingColumn(),
            console=_CONSOLE,
            transient=True,
            disable=not (enabled and _CONSOLE.is_terminal),
        )
        self._task = self._bar.add_task(what, total=total, completed=done, status="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: float) -> None:
        """Count ``count`` more as done."""
        self.move_to(self._done + count)

    def move_to(self, done: float, *, total: float | None = None, status: str = "") -> None:
        """Say that ``done`` are done, of ``total`` if that is known better now; ``status`` replaces the rate."""
        self._done, self._total = done, self._total if total is None else total
        if not self._enabled:
            return
        of = "" if self._total is None else f" of {self._total:,.0f}"
        text = f"{done:,.0f}{of} {self._unit}  {status or f'{self.rate:,.0f} {self._unit}/s'}"
        self._bar.update(self._task, completed=done, total=self._total, status=text)
        now = time.monotonic()
        since_s, since = self._first = self._first or (now, done)
        if self._bar.disable and self._total is not None and now - self._last_line_s > _SECONDS_BETWEEN_LINES:
            eta = f"  ETA {(self._total - done) * (now - since_s) / (done - since):,.0f} s" if done > since else ""
            logger.info("%s: %s%s", self._what, text, eta)
            self._last_line_s = now

    def expect(self, total: float) -> None:
        """Say that there will be about ``total``."""
        self._total = max(total, self._done)

    def expect_less(self, count: float) -> None:
        """Say that ``count`` of what was expected need not be done."""
        self.expect((self._total or 0) - count)

    @property
    def done(self) -> float:
        """How many are done."""
        return self._done

    @property
    def rate(self) -> float:
        """Units per second, since this progress was made."""
        return (self._done - self._already_done) / max(time.monotonic() - self._started_s, 1e-9)


class RunLog:
    """Writes what happened at each step; only the first rank's does anything.

    ``metrics.jsonl`` holds one JSON object a line, in order of steps. Opening it at ``start_step`` drops later lines,
    which an interrupted run wrote after its last checkpoint.

    Args:
        folder: of the run.
        enabled: False on all ranks but the first.
        start_step: steps that were done before.
        num_steps: steps there are in all.
        tensorboard: also write event files for TensorBoard.
    """

    def __init__(
        self, folder: str | Path, *, enabled: bool, start_step: int, num_steps: int, tensorboard: bool = True
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        self._path = Path(folder) / "metrics.jsonl"
        truncate_metrics(self._path, start_step)
        self._file = self._path.open("a", buffering=1)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=start_step + 1)
        self._progress = Progress("train", "steps", total=num_steps, done=start_step)

    def write(self, step: int, **numbers: float) -> None:
        """Record numbers of ``step``, each under a name with its unit."""
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self._board is not None:
            for name, number in numbers.items():
                self._board.add_scalar(name, number, step)

    def show(self, step: int, *, loss_nats: float, events_per_s: float) -> None:
        """Move the progress on to ``step``."""
        if not self._enabled:
            return
        self._progress.move_to(step, status=f"loss {loss_nats:.4f} nats  {events_per_s:,.0f} events/s")

    def say(self, line: str) -> None:
        """A line for people, above the progress bar where there is one."""
        if self._enabled:
            logger.info("%s", line)

    def __enter__(self) -> RunLog:
        if self._enabled:
            self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._enabled:
            return
        self._progress.__exit__(kind, error, trace)
        self._file.close()
        if self._board is not None:
            self._board.close()


class Clock:
    """Seconds of training, validation and checkpoints left out, and events per second."""

    def __init__(self, *, already_s: float) -> None:
        self._started = time.monotonic() - already_s
        self._lap_started, self._events = time.monotonic(), 0.0
        self._paused_at: float | None = None

    @property
    def seconds(self) -> float:
        return (self._paused_at or time.monotonic()) - self._started

    def count(self, events: float) -> None:
        self._events += events

    def lap(self) -> dict[str, float]:
        now = time.monotonic()
        rate = self._events / max(now - self._lap_started, 1e-9)
        self._lap_started, self._events = now, 0.0
        return {"events_per_s": rate, "seconds": self.seconds}

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused_at = time.monotonic()
        yield
        passed = time.monotonic() - self._paused_at
        self._started += passed
        self._lap_started += passed
        self._paused_at = None


class Stopwatch:
    """Seconds spent within ``with`` blocks; with CUDA by the device's clock, since the program runs ahead of it."""

    def __init__(self, *, cuda: bool = False) -> None:
        self._cuda = cuda
        self._seconds, self._entered = 0.0, 0.0
        self._events: list[Any] = []

    def __enter__(self) -> Stopwatch:
        self._entered = time.monotonic()
        self._mark()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds += time.monotonic() - self._entered
        self._mark()

    def lap(self) -> float:
        """The seconds since the last call; with CUDA it waits for the last block to end."""
        seconds, self._seconds = self._seconds, 0.0
        if self._cuda:
            events, self._events = self._events, []
            if events:
                events[-1].synchronize()
            seconds = sum(start.elapsed_time(end) for start, end in zip(events[::2], events[1::2], strict=True)) / 1e3
        return seconds

    def _mark(self) -> None:
        if self._cuda:
            import torch

            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()


def peak_memory_bytes(*, cuda: bool = False) -> int:
    """The most this process ever held: allocated on the current device with CUDA, else resident."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    # In KiB on Linux, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off by a crash is left out.

    Raises:
        ValueError: another line is damaged; it is named.
    """
    texts = Path(path).read_text(errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(
                    f"{path}, line {number} of {len(texts)} is damaged ({error}); mend or delete that line"
                ) from None
    return lines


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines up to ``step``."""
    if not path.is_file():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(json.dumps(line) + "\n" for line in kept))
    replacement.rename(path)


class _Lines(logging.Handler):
    """``HH:MM:SS I message`` on stderr, above a progress bar where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR and "torchrec" in Path(record.pathname).parts:
            return  # it also warns through the root logger
        style = "bold red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else ""
        try:
            _CONSOLE.print(Text(self.format(record), style=style), soft_wrap=True)
        except Exception:
            self.handleError(record)


def _speaks_for_all(message: str) -> bool:
    """Whether this rank is the one to say ``message``: the first to come, and rank 0 if several come at once."""
    dist = sys.modules.get("torch.distributed")  # the data stage never loads it
    if dist is None or not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    if dist.get_rank():
        time.sleep(0.3)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"muonrec/said/{attempt}/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        return dist.distributed_c10d._get_default_store().add(key, 1) == 1
    except RuntimeError:  # rank 0 kept the store and has gone: it has said why
        return False


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed, as it does where another rank has gone; gloo has no class for it."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and (isinstance(error, dist.DistError) or "third_party/gloo" in str(error))


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised in this repository's code."""
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).resolve().parent.parent
    ours = [root / "muonrec", root / "pipeline"]
    return bool(frames) and any(Path(frames[-1].filename).resolve().is_relative_to(folder) for folder in ours)
