"""The engines that run the data stage's SQL: DuckDB in this process, or Spark on as many machines as it has."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

EngineName: TypeAlias = Literal["duckdb", "spark"]

# What DuckDB holds of an event while it sorts, key, row and what the joins need beside, with room to spare.
_SORTED_ROW_BYTES = 160

# Tasks of a shuffle in a session of one machine, where each costs more than it brings; a cluster keeps its own number.
_SPARK_LOCAL_PARTITIONS = 16

_EXECUTOR_WAIT_S = 300

# Rows of a file that Spark is given: large enough to be worth a task, small enough to keep many busy.
_SPARK_FILE_ROWS = 2**22


class Engine(Protocol):
    """What `muonrec.data.sequences.EventStore` asks of an engine, in SQL that both take.

    Seen to be equal in both: ``CREATE TABLE ... AS``, ``DROP TABLE``, ``ALTER TABLE ... RENAME TO``, common table
    expressions, window functions, ``md5`` and ``CONCAT`` of UTF-8, ``ORDER BY`` of strings by their bytes. Not equal:
    the place of nulls in an order.

    Attributes:
        sort_rows: events that it puts in order at once without writing them to disk.
    """

    sort_rows: int

    def create(self, table: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
        """Create ``table`` of ``batches``, which come one by one; what they raise reaches the caller as it is."""

    def execute(self, sql: str) -> None:
        """Run a statement."""

    def execute_with(self, rows: pa.RecordBatch | pa.Table, sql: str) -> None:
        """Run a statement to which ``rows`` is the table ``batch``."""

    def fetch(self, sql: str) -> list[tuple[Any, ...]]:
        """The rows of a small result."""

    def stream(self, sql: str, batch_rows: int) -> pa.RecordBatchReader:
        """A result of any size, in its order, at most ``batch_rows`` at a time."""

    def close(self) -> None:
        """Let go of files and processes."""

    def explain_error(self, error: BaseException) -> str | None:
        """What to do about an exception of the engine's own; None where it is not about memory."""


class DuckDB:
    """A database file in ``folder``, under a memory limit, spilling to disk beside it."""

    def __init__(self, folder: Path, *, memory_limit: str) -> None:
        self._memory_limit = memory_limit
        self.sort_rows = max(1, _mebibytes(memory_limit) * 2**20 // _SORTED_ROW_BYTES)
        self._connection = duckdb.connect(str(folder / "events.duckdb"))
        self._connection.execute(f"SET memory_limit = '{memory_limit}'")
        self._connection.execute(f"SET temp_directory = '{str(folder / 'spill').replace(chr(39), chr(39) * 2)}'")
        # Leave preserve_insertion_order at true. Seen with DuckDB 2.0.0: at false, Arrow output of execute() ignores
        # ORDER BY (execute().to_arrow_reader() from 6,000 rows on, .to_arrow_table() at 3,000,000).
        self._connection.execute("SET enable_progress_bar = false")

    def create(self, table: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
        self.execute_with(schema.empty_table(), f"CREATE TABLE {table} AS SELECT * FROM batch")
        # Batch by batch and not the reader as a whole: DuckDB would wrap the ValueErrors of a reader.
        for batch in batches:
            self.execute_with(batch, f"INSERT INTO {table} SELECT * FROM batch")

    def execute(self, sql: str) -> None:
        self._connection.execute(sql)

    def execute_with(self, rows: pa.RecordBatch | pa.Table, sql: str) -> None:
        self._connection.register("batch", rows)
        self._connection.execute(sql)
        self._connection.unregister("batch")

    def fetch(self, sql: str) -> list[tuple[Any, ...]]:
        # Not fetchone(): DuckDB 2 refuses other work on a connection until a result has been read to its end.
        return list(self._connection.execute(sql).fetchall())

    def stream(self, sql: str, batch_rows: int) -> pa.RecordBatchReader:
        return self._connection.sql(sql).to_arrow_reader(batch_rows)

    def close(self) -> None:
        self._connection.close()

    def explain_error(self, error: BaseException) -> str | None:
        if not isinstance(error, duckdb.OutOfMemoryException):
            return None
        return (
            f"memory_limit {self._memory_limit} is too small for this log; raise data.memory_limit "
            f"(a few hundred MiB are the least). The database says: {str(error).splitlines()[0]}"
        )


class Spark:
    """A Spark session with its tables as Parquet under ``folder``, which every worker must see at the same path.

    Tables are files and not cached results: a worker that is lost takes nothing with it that later steps need.

    The session runs on the cluster that ``PYSPARK_SUBMIT_ARGS`` or ``SPARK_CONF_DIR`` name, as
    `muonrec.data.spark_cluster` sets the first; where neither is set, on all cores of this machine.
    """

    def __init__(self, folder: Path, *, memory_limit: str) -> None:
        try:
            from pyspark.sql import SparkSession
        except ImportError:
            raise ImportError("engine spark needs PySpark and Java 17: pip install 'muonrec[spark]'") from None
        self._memory_limit = memory_limit
        self.sort_rows = 2**62  # it cuts a sort into tasks by itself
        self._folder = folder.resolve()
        self._files = count()
        heap = f"{max(512, _mebibytes(memory_limit))}m"
        is_attached = "PYSPARK_SUBMIT_ARGS" in os.environ or "SPARK_CONF_DIR" in os.environ
        settings: dict[str, bool | float | int | str | None] = {
            "spark.sql.warehouse.dir": (self._folder / "tables").as_uri(),
            "spark.sql.catalogImplementation": "in-memory",
            # What the SQL relies on: strings compare by bytes, and CREATE TABLE makes Parquet files.
            "spark.sql.sources.default": "parquet",
            "spark.sql.legacy.createHiveTableByDefault": "false",
            # int64 seconds stay what they are, and an overflow is an error.
            "spark.sql.ansi.enabled": "true",
            "spark.executor.memory": heap,
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.log.level": "ERROR",
        }
        if not is_attached:
            settings |= {
                "spark.master": "local[*]",
                "spark.driver.memory": heap,
                "spark.sql.shuffle.partitions": str(_SPARK_LOCAL_PARTITIONS),
                # A session of its own needs no address that others see.
                "spark.driver.host": "127.0.0.1",
                "spark.driver.bindAddress": "127.0.0.1",
            }
        self._session = SparkSession.builder.appName("muonrec.data").config(map=settings).getOrCreate()
        self._wait_for_executor()

    def create(self, table: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
        folder = self._folder / f"given-{next(self._files)}"
        folder.mkdir()
        for number, rows in enumerate(_files_of(batches, schema)):
            pq.write_table(rows, folder / f"{number:06d}.parquet")
        self.execute(f"CREATE TABLE {table} USING parquet LOCATION '{folder.as_uri()}'")

    def execute(self, sql: str) -> None:
        self._session.sql(sql)

    def execute_with(self, rows: pa.RecordBatch | pa.Table, sql: str) -> None:
        path = self._folder / f"given-{next(self._files)}.parquet"
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_batches([rows]), path)
        self._session.read.parquet(path.as_uri()).createOrReplaceTempView("batch")
        self.execute(sql)
        path.unlink()

    def fetch(self, sql: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self._session.sql(sql).collect()]

    def stream(self, sql: str, batch_rows: int) -> pa.RecordBatchReader:
        # Through files and not through the driver's heap. A global ORDER BY cuts the rows into ranges, a file each;
        # names ascend with the ranges.
        folder = self._folder / f"result-{next(self._files)}"
        self._session.sql(sql).write.parquet(folder.as_uri())
        files = sorted(folder.glob("part-*.parquet"))

        def batches() -> Iterator[pa.RecordBatch]:
            for path in files:
                yield from pq.ParquetFile(path).iter_batches(batch_rows)
                path.unlink()

        return pa.RecordBatchReader.from_batches(pq.read_schema(files[0]), batches())

    def close(self) -> None:
        self._session.stop()

    def explain_error(self, error: BaseException) -> str | None:
        if "OutOfMemoryError" not in str(error):
            return None
        return (
            f"memory_limit {self._memory_limit} is too small for a Spark process on this log; raise data.memory_limit, "
            "or start more workers"
        )

    def _wait_for_executor(self) -> None:
        """Spark itself would wait for ever where no worker has as much memory as an executor asks for."""
        context = self._session.sparkContext
        deadline = time.monotonic() + _EXECUTOR_WAIT_S
        # The driver is the first of the list.
        while not str(context.master).startswith("local") and context._jsc.sc().getExecutorMemoryStatus().size() < 2:
            if time.monotonic() > deadline:
                self.close()
                raise ValueError(
                    f"no executor came from {context.master} within {_EXECUTOR_WAIT_S} s: its workers may have less "
                    f"memory than memory_limit {self._memory_limit}; lower data.memory_limit, or see their logs"
                )
            time.sleep(0.5)


ENGINES: dict[str, Callable[..., Engine]] = {"duckdb": DuckDB, "spark": Spark}


def _files_of(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """The batches, ``_SPARK_FILE_ROWS`` and more of them at a time; one empty table where there are none."""
    waiting: list[pa.RecordBatch] = []
    is_first = True
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= _SPARK_FILE_ROWS:
            yield pa.Table.from_batches(waiting).cast(schema)
            waiting, is_first = [], False
    if waiting:
        yield pa.Table.from_batches(waiting).cast(schema)
    elif is_first:
        yield schema.empty_table()


def _mebibytes(size: str) -> int:
    """``4GiB``, ``500 MB`` and the like in MiB."""
    number, unit = size.rstrip("KMGTiB "), size.lstrip("0123456789. ")
    base = 1024 if "i" in unit else 1000
    return int(float(number) * base ** ("KMGT".index(unit[0]) + 1) / 2**20)
