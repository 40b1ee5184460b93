"""Rows of a source that are no events, or no items: counted by kind, written with file, line and reason.

They are tolerated up to a share.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from muonrec.data.places import written

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)

# In the message that stops a run.
_KINDS_SHOWN = 3

OnRejected: TypeAlias = Callable[[pa.RecordBatch], None]  # takes rows of `REJECTED_SCHEMA`


def refuse(rows: pa.RecordBatch) -> None:
    """The `OnRejected` that tolerates none: raise ValueError at the first row."""
    raise ValueError(_example(rows.slice(0, 1)))


class RejectedRows:
    """The `OnRejected` of a run: counts the rows and writes them to one Parquet file in place of an earlier run's.

    Use it as a context: the file is there after it, also when the run has failed, and absent if no row was rejected.

    Attributes:
        num_by_kind: rows of each kind, since the last `check`.
    """

    def __init__(self, path: Path | UPath) -> None:
        """Count for a file at ``path``; nothing is written before the first row."""
        self.path = path
        self.num_by_kind: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._open = contextlib.ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> RejectedRows:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is None:
            self.path.unlink(missing_ok=True)
        else:
            self._open.close()

    def __call__(self, rows: pa.RecordBatch) -> None:
        """Count and write ``rows`` of `REJECTED_SCHEMA`."""
        if self._writer is None:
            stream = self._open.enter_context(written(self.path))
            self._writer = self._open.enter_context(pq.ParquetWriter(stream, REJECTED_SCHEMA, compression="zstd"))
        self._writer.write_batch(rows)
        for count in pc.value_counts(rows.column("kind")).to_pylist():
            self.num_by_kind[count["values"]] += count["counts"]
            if count["values"] not in self._examples:
                first = pc.index(rows.column("kind"), count["values"]).as_py()
                self._examples[count["values"]] = _example(rows.slice(first, 1))

    def check(
        self, num_good: int, *, max_share: float, what: str = "events", setting: str = "source"
    ) -> dict[str, int]:
        """Stop where too many rows of one source were rejected to trust the rest; counting begins anew.

        Args:
            num_good: rows of it that were not.
            max_share: of the rejected among all rows.
            what: the rows should be.
            setting: of the section ``data`` that names the source.

        Returns:
            Rows of each kind that was rejected.

        Raises:
            ValueError: the share is larger; shows the commonest kinds with an example of each.
        """
        num_rejected = self.num_by_kind.total()
        if num_rejected <= max_share * (num_good + num_rejected):
            counted = dict(self.num_by_kind)
            self.num_by_kind.clear()
            self._examples.clear()
            return counted
        kinds = "".join(
            f"\n  {count} {kind}, such as {self._examples[kind]}"
            for kind, count in sorted(self.num_by_kind.items(), key=lambda item: (-item[1], item[0]))[:_KINDS_SHOWN]
        )
        raise ValueError(
            f"{num_rejected} of {num_good + num_rejected} rows are no {what}, more than "
            f"max_rejected_share {max_share:g} allows; all are listed in {self.path}. The commonest:{kinds}\n"
            f"Correct the source or data.{setting}; raise data.max_rejected_share only if the log can do without these "
            "rows"
        )


def _example(row: pa.RecordBatch) -> str:
    """One row, as a message names it."""
    (found,) = row.to_pylist()
    return f"{found['file']}, line {found['line']}: {found['reason']}"
