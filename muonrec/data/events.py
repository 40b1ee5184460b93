"""Read interaction logs of several formats as one stream of events ``user_id, item_id, timestamp_s, source_row``.

Every format ends in the same three columns. A row that is no event goes to ``on_rejected`` with file, line and reason;
a source whose structure is wrong (no such file, no such column, text that cannot be cut into rows) raises at once.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from pydantic import Field

from muonrec.config import Config
from muonrec.data.rejected import OnRejected, refuse
from muonrec.data.sift import BROKEN, SHOWN_CHARACTERS, Columns, Rejects, around, is_broken, shown, sift

EVENT_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("timestamp_s", pa.int64()),
        pa.field("source_row", pa.int64(), nullable=False),
    ]
)

_HEAD_BYTES = 2**16
_BLOCK_BYTES = 16 * 2**20
_MAX_LINE_BYTES = 64 * 2**20
_BATCH_ROWS = 2**18
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
_UTF8_BOM = b"\xef\xbb\xbf"

Chunk: TypeAlias = tuple[Columns, pa.RecordBatch | None, float]  # events, rejected rows, share of the bytes behind
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


class AmazonSource(Config):
    """Amazon Reviews as published: ratings (``.csv``) or reviews (JSON lines), also compressed; ``path`` may be a glob.

    Attributes:
        download: file to fetch to ``path`` where that is missing, by its name at the official place
            (`muonrec.data.download.PLACES`), such as ``reviews_Beauty_5.json.gz``; null: never.
    """

    format: Literal["amazon_2014", "amazon_2018", "amazon_2023"]
    path: str
    download: str | None = None


class MovielensSource(Config):
    """MovieLens as published: ``ratings.csv``, ``ratings.dat`` (1M, 10M) or ``u.data`` (100K), also compressed.

    Attributes:
        download: archive to fetch and take ``path`` from where that is missing, such as ``ml-1m.zip``; null: never.
    """

    format: Literal["movielens"]
    path: str
    download: str | None = None


FileSource: TypeAlias = SequencesSource | RecboleSource | CsvSource | ParquetSource | AmazonSource | MovielensSource


@dataclass(frozen=True)
class _Layout:
    """How text becomes rows and rows become events.

    Attributes:
        columns: names of the three columns.
        unit: of the times.
        delimiter: of the fields; None for JSON lines.
        names: of all fields, where the file has no header.
        quoted: whether fields may be quoted, and then hold newlines.
        typed_header: whether the header says ``name:type``.
    """

    columns: ColumnNames
    unit: Literal["s", "ms"] = "s"
    delimiter: str | None = ","
    names: tuple[str, ...] | None = None
    quoted: bool = False
    typed_header: bool = False

    @property
    def wanted(self) -> list[str]:
        names = (self.columns.user_id, self.columns.item_id, self.columns.timestamp_s)
        return [name for name in names if name is not None]


# The unit separator stands in no text: each line is one field.
_LINE = _Layout(ColumnNames(), delimiter="\x1f", names=("line",))

# Two traps: the ratings of 2018 begin with the item, those of 2014 with the user; 2023 counts milliseconds and its
# parent_asin stands for all variants of a product.
_REVIEWS_2014 = ColumnNames(user_id="reviewerID", item_id="asin", timestamp_s="unixReviewTime")
_REVIEWS_2023 = ColumnNames(item_id="parent_asin", timestamp_s="timestamp")
_RATINGS = ColumnNames(timestamp_s="timestamp")
_AMAZON: dict[tuple[str, str], _Layout] = {
    ("amazon_2014", ".csv"): _Layout(_RATINGS, names=("user_id", "item_id", "rating", "timestamp")),
    ("amazon_2014", ".json"): _Layout(_REVIEWS_2014, delimiter=None),
    ("amazon_2018", ".csv"): _Layout(_RATINGS, names=("item_id", "user_id", "rating", "timestamp")),
    ("amazon_2018", ".json"): _Layout(_REVIEWS_2014, delimiter=None),
    ("amazon_2023", ".csv"): _Layout(_REVIEWS_2023, unit="ms"),
    ("amazon_2023", ".jsonl"): _Layout(_REVIEWS_2023, unit="ms", delimiter=None),
}

# Fields between two colons: Arrow knows delimiters of one character only, and no MovieLens id holds a colon.
_MOVIELENS: dict[str, _Layout] = {
    ".csv": _Layout(ColumnNames(user_id="userId", item_id="movieId", timestamp_s="timestamp")),
    ".dat": _Layout(_RATINGS, delimiter=":", names=("user_id", "", "item_id", "", "rating", "", "timestamp")),
    ".data": _Layout(_RATINGS, delimiter="\t", names=("user_id", "item_id", "rating", "timestamp")),
}


def read_sequences(
    source: SequencesSource, *, on_rejected: OnRejected = refuse, on_share: OnShare | None = None
) -> pa.RecordBatchReader:
    """Stream a file of a user per line; ``timestamp_s`` is null and ``source_row`` carries the order.

    Args:
        source: the file. Blank lines in it say nothing.
        on_rejected: given the rows that are no events; the default raises ValueError at the first.
        on_share: told how much of the source is behind.

    Raises:
        ValueError: file missing or empty.
    """
    return _files_reader(source.path, _sequence_chunks, on_rejected, on_share)


def read_recbole(
    source: RecboleSource, *, on_rejected: OnRejected = refuse, on_share: OnShare | None = None
) -> pa.RecordBatchReader:
    """Stream a RecBole ``.inter`` file (format: recbole.io/docs/user_guide/data/atomic_files.html); as `read_csv`."""
    layout = _Layout(source.columns, source.timestamp_unit, delimiter="\t", typed_header=True)
    return _files_reader(source.path, lambda path: _text_chunks(path, layout), on_rejected, on_share)


def read_csv(
    source: CsvSource, *, on_rejected: OnRejected = refuse, on_share: OnShare | None = None
) -> pa.RecordBatchReader:
    """Stream delimited text with a header. Times are floored to seconds: finer order becomes a tie.

    A line is counted as such unless quoted fields hold newlines: then rows are counted, the header being the first.

    Args:
        source: the files.
        on_rejected: given the rows that are no events; the default raises ValueError at the first.
        on_share: told how much of the source is behind.

    Raises:
        ValueError: file missing or empty, or an unknown column.
    """
    layout = _Layout(source.columns, source.timestamp_unit, source.delimiter, quoted=True)
    return _files_reader(source.path, lambda path: _text_chunks(path, layout), on_rejected, on_share)


def read_parquet(
    source: ParquetSource, *, on_rejected: OnRejected = refuse, on_share: OnShare | None = None
) -> pa.RecordBatchReader:
    """Stream Parquet files; as `read_csv`, where a line is a row, counted from 1."""
    layout = _Layout(source.columns, source.timestamp_unit)
    return _files_reader(source.path, lambda path: _parquet_chunks(path, layout), on_rejected, on_share)


def read_amazon(
    source: AmazonSource, *, on_rejected: OnRejected = refuse, on_share: OnShare | None = None
) -> pa.RecordBatchReader:
    """Stream ratings or reviews of Amazon 2014 (McAuley 2015), 2018 (Ni 2019) or 2023 (Hou 2024); as `read_csv`."""
    layouts = {suffix: layout for (name, suffix), layout in _AMAZON.items() if name == source.format}
    return _files_reader(source.path, lambda path: _text_chunks(path, _layout_of(path, layouts)), on_rejected, on_share)


def read_movielens(
    source: MovielensSource, *, on_rejected: OnRejected = refuse, on_share: OnShare | None = None
) -> pa.RecordBatchReader:
    """Stream the ratings of a MovieLens release (Harper & Konstan 2015); as `read_csv`."""
    return _files_reader(
        source.path, lambda path: _text_chunks(path, _layout_of(path, _MOVIELENS)), on_rejected, on_share
    )


READERS: dict[str, Callable[..., pa.RecordBatchReader]] = {
    "sequences": read_sequences,
    "recbole": read_recbole,
    "csv": read_csv,
    "parquet": read_parquet,
    "amazon_2014": read_amazon,
    "amazon_2018": read_amazon,
    "amazon_2023": read_amazon,
    "movielens": read_movielens,
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
    path: str, open_file: Callable[[Path], Iterator[Chunk]], on_rejected: OnRejected, on_share: OnShare | None
) -> pa.RecordBatchReader:
    """Join the chunks of all files to one stream of `EVENT_SCHEMA`, numbering the events over all of them."""
    files = source_files(path)
    sizes = [file.stat().st_size for file in files]
    # Files are opened here and not at the first batch, so that a wrong path fails before any work is done.
    opened = [open_file(file) for file in files]

    def batches() -> Iterator[pa.RecordBatch]:
        next_row = bytes_behind = 0
        for size, chunks in zip(sizes, opened, strict=True):
            for (user_id, item_id, timestamp_s), rejected, share in chunks:
                if rejected is not None:
                    on_rejected(rejected)
                source_row = pa.array(np.arange(next_row, next_row + len(user_id), dtype=np.int64))
                next_row += len(user_id)
                yield pa.RecordBatch.from_arrays([user_id, item_id, timestamp_s, source_row], schema=EVENT_SCHEMA)
                if on_share is not None:  # after the yield: the consumer has counted the batch by now
                    on_share((bytes_behind + share * size) / sum(sizes))
            bytes_behind += size

    return pa.RecordBatchReader.from_batches(EVENT_SCHEMA, batches())


# Text ----------------------------------------------------------------------------------------------------------------


def _layout_of(path: Path, layouts: dict[str, _Layout]) -> _Layout:
    """The layout that the name of the file announces."""
    suffix = Path(path.stem).suffix if path.suffix in _CODECS else path.suffix
    if suffix not in layouts:
        raise ValueError(f"{path} ends in none of {', '.join(layouts)} (or those and .gz), which tell what it holds")
    return layouts[suffix]


def _text_chunks(path: Path, layout: _Layout) -> Iterator[Chunk]:
    _refuse_empty(path)
    if layout.delimiter is None or layout.names is not None:
        return _read_text_chunks(path, layout, has_header=False)
    head, _ = next(_text_blocks(path, _HEAD_BYTES, quoted=layout.quoted), (b"", 1.0))
    try:
        header = next(csv.reader(io.StringIO(head.decode()), delimiter=layout.delimiter), [])
    except csv.Error as error:
        raise ValueError(_unreadable(path, error)) from None
    names = [name.split(":")[0] if layout.typed_header else name for name in header]
    _check_names(path, names, layout.wanted)
    return _read_text_chunks(path, replace(layout, names=tuple(names)), has_header=True)


def _read_text_chunks(path: Path, layout: _Layout, *, has_header: bool) -> Iterator[Chunk]:
    line = 1
    for block, share in _text_blocks(path, _BLOCK_BYTES, quoted=layout.quoted):
        if line == 1 and has_header:
            line, block = 2, block[block.find(b"\n") + 1 :]
        rejects = Rejects(path)
        if layout.delimiter is None:
            columns, lines, num_rows = _json_fields(block, layout, line, rejects)
        else:
            columns, lines, num_rows = _fields(block, layout, layout.wanted, line, rejects)
        if layout.quoted:
            _check_quotes(path, block, line, num_rows)
        line += num_rows
        yield sift(columns, lines, layout.wanted, layout.unit, rejects), rejects.batch(), share
    if line == 1 + has_header:
        raise ValueError(
            f"{path} has {'a header and ' if has_header else ''}no events; pass a file with at least one row"
        )


def _sequence_chunks(path: Path) -> Iterator[Chunk]:
    _refuse_empty(path)
    return _read_sequence_chunks(path)


def _read_sequence_chunks(path: Path) -> Iterator[Chunk]:
    line, num_events = 1, 0
    for block, share in _text_blocks(path, _BLOCK_BYTES, quoted=False):
        rejects = Rejects(path)
        texts, lines, num_rows = _lines(block, line, rejects)
        line += num_rows
        tokens = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts))
        # An empty line splits into one empty token.
        lengths = np.diff(tokens.offsets.to_numpy())
        flat = tokens.flatten()
        starts = np.cumsum(lengths) - lengths
        users = flat.take(pa.array(starts))
        blank = pc.equal(pc.utf8_length(users), 0).to_numpy(zero_copy_only=False)
        lonely = (lengths == 1) & ~blank
        reasons = around(
            "has the user ", shown(users.filter(lonely)), " and no item; a line is a user id followed by item ids"
        )
        rejects.add(lines[lonely], "no_items", reasons)
        num_items = np.where(blank, 0, lengths - 1)
        is_item = np.ones(len(flat), dtype=bool)
        is_item[starts] = False
        user_id = flat.take(pa.array(np.repeat(starts, num_items)))
        item_id = flat.filter(pa.array(is_item))
        num_events += len(item_id) + rejects.num_rows
        yield (user_id, item_id, pa.nulls(len(item_id), pa.int64())), rejects.batch(), share
    if num_events == 0:
        raise ValueError(f"{path} has no events: all its lines are blank; a line is a user id followed by item ids")


def _text_blocks(path: Path, block_bytes: int, *, quoted: bool) -> Iterator[tuple[bytes, float]]:
    """Whole rows of a file that may be compressed; each block with the share of the file that was read by then.

    Blocks of our own, and not Arrow's reader of streams: that one cannot say which line a bad row is.
    """
    try:
        # The file below and not the stream above knows the place where the text is compressed.
        with pa.OSFile(str(path)) as file, _decompressed(file, path) as stream:
            rest = stream.read(block_bytes).removeprefix(_UTF8_BOM)
            while data := stream.read(block_bytes):
                end = _end_of_rows(rest, quoted=quoted)
                if end:
                    yield _as_utf8(rest[:end]), file.tell() / file.size()
                rest = rest[end:] + data
                if len(rest) > _MAX_LINE_BYTES + block_bytes:
                    raise ValueError(
                        f"{path} has a row of more than {_MAX_LINE_BYTES} bytes; check that it is text, "
                        "that it has line ends, and that its quotes are closed"
                    )
            if rest := rest.rstrip(b"\r\n"):
                yield _as_utf8(rest + b"\n"), 1.0
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(_unreadable(path, error)) from None


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path} cannot be read: {error}; check data.source.format, the delimiter, and that the file is whole"


def _as_utf8(block: bytes) -> bytes:
    """Let `BROKEN` stand for what is not UTF-8: Arrow would refuse the whole block."""
    try:
        block.decode()
    except UnicodeDecodeError:
        return re.sub("[\udc80-\udcff]+", BROKEN, block.decode(errors="surrogateescape")).encode()
    return block


def _end_of_rows(block: bytes, *, quoted: bool) -> int:
    """Where the last row of ``block`` ends; 0 if none does."""
    last = block.rfind(b"\n") + 1
    if not quoted or block.count(b'"', 0, last) % 2 == 0:
        return last
    ends = _ends_outside_quotes(block)
    # A quote stands alone. Inside a field it says nothing, and `_check_quotes` finds one that was never closed.
    return int(ends[-1]) if ends.size else 0 if len(block) < _MAX_LINE_BYTES else last


def _ends_outside_quotes(block: bytes) -> np.ndarray:
    """The places after the newlines that an even number of quotes precedes."""
    characters = np.frombuffer(block, np.uint8)
    is_quoted = np.logical_xor.accumulate(characters == ord('"'))
    return np.flatnonzero((characters == ord("\n")) & ~is_quoted) + 1


def _check_quotes(path: Path, block: bytes, first_line: int, num_rows: int) -> None:
    """Refuse a quote that is never closed: all rows after it would be one, and be lost as one."""
    if block.count(b'"') % 2 == 0 or num_rows == block.count(b"\n"):
        return
    ends = _ends_outside_quotes(block)
    line = first_line + block.count(b"\n", 0, int(ends[-1]) if ends.size else 0)
    raise ValueError(f"{path}, line {line}: a quote is opened and never closed; close it, or double it inside a field")


def _decompressed(file: pa.NativeFile, path: Path) -> pa.NativeFile:
    codec = _CODECS.get(path.suffix)
    return file if codec is None else pa.CompressedInputStream(file, codec)


def _fields(
    block: bytes, layout: _Layout, wanted: Sequence[str], first_line: int, rejects: Rejects
) -> tuple[list[pa.Array], np.ndarray, int]:
    """The wanted fields of a block as text, the line of each row, and how many rows there were, bad ones included."""
    if not block:
        return [pa.array([], pa.string())] * len(wanted), np.empty(0, np.int64), 0
    unfit: list[pa_csv.InvalidRow] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        unfit.append(row)
        return "skip"

    # One block and one thread: only then does Arrow know the numbers of unfit rows. Everything is read as text: a
    # number that it guessed would lose leading zeros of ids.
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(block),
            pa_csv.ReadOptions(column_names=layout.names, block_size=len(block) + 1, use_threads=False),
            pa_csv.ParseOptions(
                delimiter=layout.delimiter,
                quote_char='"' if layout.quoted else False,
                newlines_in_values=layout.quoted,
                ignore_empty_lines=False,
                invalid_row_handler=skip,
            ),
            pa_csv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(_unreadable(rejects.path, error)) from None
    is_fit = np.ones(len(table) + len(unfit), dtype=bool)
    is_fit[[row.number - 1 for row in unfit]] = False
    lines = first_line + np.arange(len(is_fit))
    rejects.add(
        lines[~is_fit],
        "wrong_number_of_fields",
        [
            f"has {row.actual_columns} fields, expected {row.expected_columns}"
            + (f"; quotes join {num_ends + 1} lines to it" if (num_ends := row.text.count("\n")) else "")
            for row in unfit
        ],
    )
    return [table.column(name).combine_chunks() for name in wanted], lines[is_fit], len(is_fit)


def _lines(block: bytes, first_line: int, rejects: Rejects) -> tuple[pa.Array, np.ndarray, int]:
    """The lines of a block as text, the number of each, and how many there were."""
    (texts,), lines, num_rows = _fields(block, _LINE, ["line"], first_line, rejects)
    broken = is_broken(texts)
    rejects.add(lines[broken], "not_utf8", "is not UTF-8 text")
    return texts.filter(pa.array(~broken)), lines[~broken], num_rows


# JSON lines ----------------------------------------------------------------------------------------------------------


def _json_fields(
    block: bytes, layout: _Layout, first_line: int, rejects: Rejects
) -> tuple[list[pa.Array], np.ndarray, int]:
    texts, lines, num_rows = _lines(block, first_line, rejects)
    # Arrow 26 reads past the end at a line `null` and takes two objects of one line for two rows: what it is given
    # begins and ends as an object, and its rows are counted.
    trimmed = pc.utf8_trim_whitespace(texts)
    is_object = pc.and_(pc.starts_with(trimmed, "{"), pc.ends_with(trimmed, "}")).to_numpy(zero_copy_only=False)
    shown = pc.utf8_slice_codeunits(trimmed.filter(pa.array(~is_object)), 0, SHOWN_CHARACTERS)
    rejects.add(lines[~is_object], "not_json", around("is no JSON object: ", shown))

    id_names, time_names = layout.wanted[:2], layout.wanted[2:]
    schema = pa.schema([(name, pa.string()) for name in id_names] + [(name, pa.float64()) for name in time_names])
    tables = [schema.empty_table()]
    bad: list[int] = []

    def parse(start: int, end: int) -> None:
        """Halve what does not parse until the bad lines stand alone: few are, so few halves are parsed twice."""
        if (table := _parse_json(texts.take(pa.array(places[start:end])), schema)) is not None:
            tables.append(table)
        elif end - start == 1:
            bad.append(start)
        else:
            parse(start, (start + end) // 2)
            parse((start + end) // 2, end)

    places = np.flatnonzero(is_object)
    if len(places):
        parse(0, len(places))
    for place in places[bad]:
        rejects.add(lines[[place]], *_json_fault(texts[int(place)].as_py(), id_names, time_names))
    table = pa.concat_tables(tables)
    return [table.column(name).combine_chunks() for name in layout.wanted], lines[np.delete(places, bad)], num_rows


def _parse_json(texts: pa.Array, schema: pa.Schema) -> pa.Table | None:
    """A row of ``schema`` per line; None if some line is not one object with fields of these types."""
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts), "\n")
    buffer = joined[0].as_buffer()
    try:
        table = pa_json.read_json(
            pa.BufferReader(buffer),
            pa_json.ReadOptions(use_threads=False, block_size=buffer.size + 1),
            pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid:
        return None
    return table if len(table) == len(texts) else None


def _json_fault(text: str, id_names: list[str], time_names: list[str]) -> tuple[str, str]:
    """Kind and reason of a line that does not parse."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        return "not_json", f"is no JSON object: {error.msg} at character {error.pos + 1}"
    except RecursionError:
        return "not_json", "is nested too deeply"
    for names, kinds, expected in ((id_names, str, "a string"), (time_names, (int, float), "a number")):
        for name in names:
            value = record.get(name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                return (
                    "wrong_json_type",
                    f"field {name!r} is {json.dumps(value)[:SHOWN_CHARACTERS]}, expected {expected}",
                )
    return "not_json", "is not read by Arrow: a field stands twice, or a number or character is out of range"


# Parquet -------------------------------------------------------------------------------------------------------------


def _parquet_chunks(path: Path, layout: _Layout) -> Iterator[Chunk]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file ({error}); set data.source.format to what it is") from None
    if file.metadata.num_rows == 0:
        raise ValueError(f"{path} has no events; pass a file with at least one row")
    _check_names(path, file.schema_arrow.names, layout.wanted)
    for place, name in enumerate(layout.wanted):
        kind = file.schema_arrow.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if place < 2 and not (pa.types.is_integer(kind) or is_text):
            raise ValueError(f"{path}: column {name!r} is {kind}, but ids are strings or integers; convert it first")
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        if place == 2 and not (is_number or is_text or pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
            raise ValueError(
                f"{path}: column {name!r} is {kind}, but times are timestamps or numbers; convert it first"
            )
    return _read_parquet_chunks(path, file, layout)


def _read_parquet_chunks(path: Path, file: pq.ParquetFile, layout: _Layout) -> Iterator[Chunk]:
    row = 1
    with file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=layout.wanted):
            rejects = Rejects(path)
            columns = [batch.column(name) for name in layout.wanted]
            events = sift(columns, row + np.arange(len(batch)), layout.wanted, layout.unit, rejects)
            row += len(batch)
            yield events, rejects.batch(), (row - 1) / file.metadata.num_rows


# Checks --------------------------------------------------------------------------------------------------------------


def _refuse_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; pass a file with at least one event")


def _check_names(path: Path, found: list[str], wanted: list[str]) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, found))}. "
            "Name them in data.source.columns (timestamp_s: null where there is no time)"
        )
    if repeated := sorted({name for name in wanted if found.count(name) > 1 or wanted.count(name) > 1}):
        raise ValueError(
            f"{path}: column {repeated[0]!r} stands twice; data.source.columns must name three different ones"
        )
