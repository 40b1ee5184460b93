"""The run's record: metrics.jsonl, TensorBoard, and progress on the terminal."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

# Where no terminal shows a bar, a line this often.
_SECONDS_BETWEEN_LINES = 15.0


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
        self._num_steps = num_steps
        self._last_line_s = time.monotonic()
        self._started_s, self._start_step = self._last_line_s, start_step
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("train", total=num_steps, completed=start_step, status="")
        self._progress.start()

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
        status = f"loss {loss_nats:.4f} nats  {events_per_s:,.0f} events/s"
        self._progress.update(self._task, completed=step, status=status)
        now = time.monotonic()
        if self._progress.disable and (now - self._last_line_s > _SECONDS_BETWEEN_LINES or step == self._num_steps):
            remaining_s = (now - self._started_s) / max(step - self._start_step, 1) * (self._num_steps - step)
            logger.info("step %d of %d  %s  ETA %.0f s", step, self._num_steps, status, remaining_s)
            self._last_line_s = now

    def say(self, line: str) -> None:
        """A line for people, above the progress bar where there is one."""
        if not self._enabled:
            return
        if self._progress.disable:
            logger.info(line)
        else:
            self._progress.console.print(line)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._enabled:
            return
        self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    lines = []
    for text in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines up to ``step``."""
    if not path.is_file():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(json.dumps(line) + "\n" for line in kept))
    replacement.rename(path)


def configure_logging(*, is_first: bool) -> None:
    """Once, by a stage: the first rank informs, all ranks warn."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for name in ("muonrec", "pipeline", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if is_first else logging.WARNING)
    # TorchRec, FBGEMM and torch warn, once per rank and start, of things that are theirs to mend.
    for name in ("torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torchrec\.|torch\.distributed\.")
    warnings.filterwarnings("ignore", message=".*ShardedTensor", category=FutureWarning)
