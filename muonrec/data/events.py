"""Read interaction logs of several formats as one stream of events ``user_id, item_id, timestamp_s, source_row``."""

from __future__ import annotations

import csv
import glob
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pydantic import Field

from muonrec.config import Config

EVENT_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("timestamp_s", pa.int64()),
        pa.field("source_row", pa.int64(), nullable=False),
    ]
)

# 1e11 s is the year 5138 and 1e11 ms is 1973: no log of interactions lies between the two readings.
MAX_TIMESTAMP_S = 10**11

_BLOCK_BYTES = 16 * 2**20
_BATCH_ROWS = 2**18
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}

Columns: TypeAlias = tuple[pa.Array, pa.Array, pa.Array]  # user_id, item_id, timestamp_s: one chunk of a source
OnShare: TypeAlias = Callable[[float], None]  # told how much of the source's bytes is behind, from 0 to 1


class SequencesSource(Config):
    """A line per user: the user's id, then the ids of the items in order. Such files have no times."""

    format: Literal["sequences"]
    path: str


class ColumnNames(Config):
    """How the source names its columns; ``timestamp_s: null`` says that it has no time and rows are in order."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp_s: str | None = "timestamp_s"


class RecboleSource(Config):
    """A RecBole atomic file (``.inter``): tab-separated, the header names each column as ``name:type``."""

    format: Literal["recbole"]
    path: str
    columns: ColumnNames = ColumnNames(timestamp_s="timestamp")
    timestamp_unit: Literal["s", "ms"] = "s"


class CsvSource(Config):
    """Delimited text with a header; ``path`` may be a glob, whose files are read in order of name."""

    format: Literal["csv"]
    path: str
    columns: ColumnNames = ColumnNames()
    timestamp_unit: Literal["s", "ms"] = "s"
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","


class ParquetSource(Config):
    """Parquet; ``path`` may be a glob, whose files are read in order of name. Arrow timestamps need no unit."""

    format: Literal["parquet"]
    path: str
    columns: ColumnNames = ColumnNames()
    timestamp_unit: Literal["s", "ms"] = "s"


FileSource: TypeAlias = SequencesSource | RecboleSource | CsvSource | ParquetSource


def read_sequences(source: SequencesSource, *, on_share: OnShare | None = None) -> pa.RecordBatchReader:
    """Stream a file of a user per line; ``timestamp_s`` is null and ``source_row`` carries the order.

    Raises:
        ValueError: file missing or empty, or (while reading) a line with a user and no item.
    """
    return _files_reader(source.path, _sequence_chunks, on_share)


def read_recbole(source: RecboleSource, *, on_share: OnShare | None = None) -> pa.RecordBatchReader:
    """Stream a RecBole ``.inter`` file (format: recbole.io/docs/user_guide/data/atomic_files.html).

    Raises:
        ValueError: file missing or empty, unknown column, or (while reading) an empty id or a bad time.
    """
    return _files_reader(source.path, lambda path: _delimited_chunks(path, source, delimiter="\t"), on_share)


def read_csv(source: CsvSource, *, on_share: OnShare | None = None) -> pa.RecordBatchReader:
    """Stream delimited text with a header. Times are floored to seconds: finer order becomes a tie.

    Raises:
        ValueError: file missing or empty, unknown column, or (while reading) an empty id or a bad time.
    """
    return _files_reader(source.path, lambda path: _delimited_chunks(path, source, source.delimiter), on_share)


def read_parquet(source: ParquetSource, *, on_share: OnShare | None = None) -> pa.RecordBatchReader:
    """Stream Parquet files. Times are floored to seconds: finer order becomes a tie.

    Raises:
        ValueError: file missing or empty, unknown column, or (while reading) an empty id or a bad time.
    """
    return _files_reader(source.path, lambda path: _parquet_chunks(path, source), on_share)


READERS: dict[str, Callable[..., pa.RecordBatchReader]] = {
    "sequences": read_sequences,
    "recbole": read_recbole,
    "csv": read_csv,
    "parquet": read_parquet,
}


def source_files(path: str) -> list[Path]:
    """The files that ``path`` (a file or a glob) stands for, in order of name.

    Raises:
        ValueError: there is none.
    """
    if Path(path).is_file():
        return [Path(path)]
    files = sorted(Path(match) for match in glob.glob(path, recursive=True) if Path(match).is_file())
    if not files:
        found = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"source {path} {found}; pass a file, or a glob that matches files, as data.source.path=...")
    return files


def _files_reader(
    path: str, open_file: Callable[[Path], Iterator[tuple[Columns, float]]], on_share: OnShare | None
) -> pa.RecordBatchReader:
    """Join the chunks of all files to one stream of `EVENT_SCHEMA`, numbering the rows over all of them."""
    files = source_files(path)
    sizes = [file.stat().st_size for file in files]
    # Files are opened here and not at the first batch, so that a wrong path fails before any work is done.
    opened = [open_file(file) for file in files]

    def batches() -> Iterator[pa.RecordBatch]:
        next_row = bytes_behind = 0
        for size, chunks in zip(sizes, opened, strict=True):
            for (user_id, item_id, timestamp_s), share in chunks:
                source_row = pa.array(np.arange(next_row, next_row + len(user_id), dtype=np.int64))
                next_row += len(user_id)
                yield pa.RecordBatch.from_arrays([user_id, item_id, timestamp_s, source_row], schema=EVENT_SCHEMA)
                if on_share is not None:  # after the yield: the consumer has counted the batch by now
                    on_share((bytes_behind + share * size) / sum(sizes))
            bytes_behind += size

    return pa.RecordBatchReader.from_batches(EVENT_SCHEMA, batches())


def _sequence_chunks(path: Path) -> Iterator[tuple[Columns, float]]:
    _refuse_empty(path)
    return _read_sequence_chunks(path)


def _read_sequence_chunks(path: Path) -> Iterator[tuple[Columns, float]]:
    first_line, num_events = 1, 0
    for batch, share in _open_text(
        path,
        pa_csv.ReadOptions(column_names=["line"], block_size=_BLOCK_BYTES),
        # The unit separator never stands in such a file: a line arrives as one string and Arrow splits it.
        pa_csv.ParseOptions(delimiter="\x1f", quote_char=False, ignore_empty_lines=False),
        pa_csv.ConvertOptions(column_types={"line": pa.string()}),
    ):
        tokens = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(batch.column("line")))
        # An empty line splits into one empty token.
        lengths = np.diff(tokens.offsets.to_numpy())
        flat = tokens.flatten()
        starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
        blank = pc.equal(pc.utf8_length(flat.take(pa.array(starts))), 0).to_numpy(zero_copy_only=False)
        if (lonely := np.flatnonzero((lengths == 1) & ~blank)).size:
            raise ValueError(
                f"{path}, line {first_line + lonely[0]}: has the user {flat[starts[lonely[0]]].as_py()!r} and no item; "
                "a line is a user id followed by item ids"
            )
        num_items = np.where(blank, 0, lengths - 1)
        is_item = np.ones(len(flat), dtype=bool)
        is_item[starts] = False
        user_id = flat.take(pa.array(np.repeat(starts, num_items)))
        item_id = flat.filter(pa.array(is_item))
        first_line += len(lengths)
        num_events += len(item_id)
        yield (user_id, item_id, pa.nulls(len(item_id), pa.int64())), share
    if num_events == 0:
        raise ValueError(f"{path} has no events: all its lines are blank; a line is a user id followed by item ids")


def _delimited_chunks(path: Path, source: RecboleSource | CsvSource, delimiter: str) -> Iterator[tuple[Columns, float]]:
    _refuse_empty(path)
    with pa.input_stream(str(path), compression="detect") as stream:
        head = stream.read(2**20).decode("utf-8-sig", errors="replace")
    header = next(csv.reader(io.StringIO(head), delimiter=delimiter), [])
    names = [name.split(":")[0] for name in header] if source.format == "recbole" else header
    wanted = _wanted_columns(path, names, source.columns)
    return _read_delimited_chunks(path, source, delimiter, names, wanted)


def _read_delimited_chunks(
    path: Path, source: RecboleSource | CsvSource, delimiter: str, names: list[str], wanted: list[str]
) -> Iterator[tuple[Columns, float]]:
    quoted = source.format == "csv"
    first_row = 1
    for batch, share in _open_text(
        path,
        pa_csv.ReadOptions(column_names=names, skip_rows=1, block_size=_BLOCK_BYTES),
        pa_csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted),
        # Everything is read as text: a number that Arrow guessed would lose leading zeros of ids.
        pa_csv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted),
    ):
        yield _checked_columns(batch, wanted, source.timestamp_unit, path, first_row), share
        first_row += len(batch)
    if first_row == 1:
        raise ValueError(f"{path} has a header and no events; pass a file with at least one row")


def _parquet_chunks(path: Path, source: ParquetSource) -> Iterator[tuple[Columns, float]]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file ({error}); set data.source.format to what it is") from None
    wanted = _wanted_columns(path, file.schema_arrow.names, source.columns)
    for name in wanted[:2]:
        kind = file.schema_arrow.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{path}: column {name!r} is {kind}, but ids are strings or integers; convert it first")
    if file.metadata.num_rows == 0:
        raise ValueError(f"{path} has no events; pass a file with at least one row")
    return _read_parquet_chunks(path, file, source, wanted)


def _read_parquet_chunks(
    path: Path, file: pq.ParquetFile, source: ParquetSource, wanted: list[str]
) -> Iterator[tuple[Columns, float]]:
    first_row = 1
    with file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
            columns = _checked_columns(batch, wanted, source.timestamp_unit, path, first_row)
            first_row += len(batch)
            yield columns, (first_row - 1) / file.metadata.num_rows


def _open_text(
    path: Path, read: pa_csv.ReadOptions, parse: pa_csv.ParseOptions, convert: pa_csv.ConvertOptions
) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Batches, each with the share of the file's bytes that were read by then (the reader is a few blocks ahead)."""
    try:
        # The file below and not the stream above knows the place where the text is compressed.
        with pa.OSFile(str(path)) as file, _decompressed(file, path) as stream:
            with pa_csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert) as batches:
                for batch in batches:
                    yield batch, file.tell() / file.size()
    except pa.ArrowInvalid as error:
        if "Empty CSV" not in str(error):
            raise ValueError(
                f"{path} cannot be read: {error}; check data.source.format, the delimiter, and that the text is UTF-8"
            ) from None


def _decompressed(file: pa.NativeFile, path: Path) -> pa.NativeFile:
    codec = _CODECS.get(path.suffix)
    return file if codec is None else pa.CompressedInputStream(file, codec)


def _refuse_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; pass a file with at least one event")


def _wanted_columns(path: Path, found: list[str], columns: ColumnNames) -> list[str]:
    wanted = [name for name in (columns.user_id, columns.item_id, columns.timestamp_s) if name is not None]
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, found))}. "
            "Name them in data.source.columns (timestamp_s: null where there is no time)"
        )
    if repeated := sorted({name for name in wanted if found.count(name) > 1 or wanted.count(name) > 1}):
        raise ValueError(
            f"{path}: column {repeated[0]!r} stands twice; data.source.columns must name three different ones"
        )
    return wanted


def _checked_columns(batch: pa.RecordBatch, wanted: list[str], unit: str, path: Path, first_row: int) -> Columns:
    user_id, item_id = (_checked_ids(batch.column(name), name, path, first_row) for name in wanted[:2])
    if len(wanted) == 2:
        return user_id, item_id, pa.nulls(len(batch), pa.int64())
    return user_id, item_id, _to_seconds(batch.column(wanted[2]), wanted[2], unit, path, first_row)


def _checked_ids(ids: pa.Array, name: str, path: Path, first_row: int) -> pa.Array:
    ids = ids.cast(pa.string())
    empty = pc.fill_null(pc.equal(pc.binary_length(ids), 0), True)
    if pc.any(empty).as_py():
        row = first_row + pc.index(empty, True).as_py()
        raise ValueError(f"{path}, row {row}: column {name!r} is empty; every event needs a user and an item")
    return ids


def _to_seconds(times: pa.Array, name: str, unit: str, path: Path, first_row: int) -> pa.Array:
    """Whole seconds, floored, of text, numbers or Arrow timestamps."""

    def refuse(position: int, fault: str) -> NoReturn:
        found = times[position].as_py()
        raise ValueError(f"{path}, row {first_row + position}: column {name!r} is {found!r}, {fault}")

    if times.null_count:
        refuse(
            pc.index(pc.is_null(times), True).as_py(), "expected a time; drop the row or set columns.timestamp_s: null"
        )
    if pa.types.is_timestamp(times.type):
        numbers, unit = times.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()), "ms"
    else:
        try:
            numbers = _to_numbers(times)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            refuse(_first_non_number(times), f"expected a number of {unit} since 1970")
    values = numbers.to_numpy(zero_copy_only=False)
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        refuse(bad[0], f"expected a number of {unit} since 1970")
    if (bad := np.flatnonzero(values < 0)).size:
        refuse(bad[0], f"expected a number of {unit} since 1970, not before")
    seconds = np.floor_divide(values, 1000 if unit == "ms" else 1)
    if (bad := np.flatnonzero(seconds > MAX_TIMESTAMP_S)).size:
        finer, do = (
            ("milliseconds", "set data.source.timestamp_unit: ms")
            if unit == "s"
            else ("microseconds", "divide by 1000")
        )
        refuse(bad[0], f"which looks like {finer} though {unit} was stated; {do}")
    return pa.array(seconds.astype(np.int64))


def _to_numbers(times: pa.Array) -> pa.Array:
    try:
        return times.cast(pa.int64())
    except pa.ArrowInvalid:  # a fraction, or text such as 8.8e8
        return times.cast(pa.float64())


def _first_non_number(times: pa.Array) -> int:
    """Runs only on the way to an error: one value at a time, to name the row."""
    for position, value in enumerate(times):
        try:
            value.cast(pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return position
    raise AssertionError("some value could not be cast")
