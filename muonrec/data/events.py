"""Read interaction logs of several formats as one stream of events ``user_id, item_id, timestamp_s, source_row``.

Every format ends in the same three columns. A row that is no event goes to ``on_rejected`` with file, line and reason;
a source whose structure is wrong (no such file, no such column, text that cannot be cut into rows) raises at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from pydantic import Field

from muonrec.config import Config
from muonrec.data.json_sequences import json_sequence_chunks
from muonrec.data.rejected import OnRejected, refuse
from muonrec.data.sift import SHOWN_CHARACTERS, Rejects, around, shown, sift
from muonrec.data.text import (
    Chunk,
    Cut,
    OnShare,
    fields,
    layout_of,
    lines_of,
    read_files,
    read_header,
    refuse_empty,
    source_files,
    text_rows,
)

EVENT_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("timestamp_s", pa.int64()),
        pa.field("source_row", pa.int64(), nullable=False),
    ]
)

_BATCH_ROWS = 2**18


class SequencesSource(Config):
    """A line per user: the user's id, then the ids of the items in order. Such files have no times.

    Attributes:
        path: the file, or a glob, whose files are read in order of name; .gz, .bz2, .zst and .lz4 are unpacked.
    """

    format: Literal["sequences"]
    path: str


class JsonSequencesSource(Config):
    """One JSON object: user id -> ids of the items in order. Such files have no times, and are read as a whole.

    Attributes:
        path: the file, or a glob, whose files are read in order of name; .gz, .bz2, .zst and .lz4 are unpacked.
    """

    format: Literal["json_sequences"]
    path: str


class ColumnNames(Config):
    """How the source names its columns.

    Attributes:
        user_id, item_id: of the ids, texts or integers.
        timestamp_s: of the time; null: it has none, and rows are in order.
    """

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp_s: str | None = "timestamp_s"


class RecboleSource(Config):
    """A RecBole atomic file (``.inter``): tab-separated, the header names each column as ``name:type``.

    Attributes:
        path: the file, or a glob, whose files are read in order of name; .gz, .bz2, .zst and .lz4 are unpacked.
        columns: what the source calls them.
        timestamp_unit: of numbers since 1970: seconds or milliseconds.
    """

    format: Literal["recbole"]
    path: str
    columns: ColumnNames = ColumnNames(timestamp_s="timestamp")
    timestamp_unit: Literal["s", "ms"] = "s"


class CsvSource(Config):
    """Delimited text with a header.

    Attributes:
        path: the file, or a glob, whose files are read in order of name; .gz, .bz2, .zst and .lz4 are unpacked.
        columns: what the source calls them.
        timestamp_unit: of numbers since 1970: seconds or milliseconds.
        delimiter: one character.
    """

    format: Literal["csv"]
    path: str
    columns: ColumnNames = ColumnNames()
    timestamp_unit: Literal["s", "ms"] = "s"
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","


class ParquetSource(Config):
    """Parquet.

    Attributes:
        path: the file, or a glob, whose files are read in order of name.
        columns: what the source calls them.
        timestamp_unit: of numbers since 1970: seconds or milliseconds; Arrow timestamps and dates need none.
    """

    format: Literal["parquet"]
    path: str
    columns: ColumnNames = ColumnNames()
    timestamp_unit: Literal["s", "ms"] = "s"


class AmazonSource(Config):
    """Amazon Reviews as published: ratings (``.csv``) or reviews (JSON lines), also compressed.

    Attributes:
        path: the file, or without ``download`` a glob; its ending, before .gz, .bz2, .zst or .lz4, says of which kind.
        download: file to fetch to ``path`` where that is missing, by its name at the official place
            (`muonrec.data.download.PLACES`), such as ``reviews_Beauty_5.json.gz``; null: never.
        accept_terms: the publishers' terms are known and accepted; needed where they ask for it.
    """

    format: Literal["amazon_2014", "amazon_2018", "amazon_2023"]
    path: str
    download: str | None = None
    accept_terms: bool = False


class MovielensSource(Config):
    """MovieLens as published: ``ratings.csv``, ``ratings.dat`` (1M, 10M) or ``u.data`` (100K), also compressed.

    Attributes:
        path: the file, or without ``download`` a glob; its ending, before .gz, .bz2, .zst or .lz4, says of which kind.
        download: archive to fetch and take ``path`` from where that is missing, such as ``ml-1m.zip``; null: never.
        accept_terms: the publishers' terms are known and accepted; else they are asked for on a terminal.
    """

    format: Literal["movielens"]
    path: str
    download: str | None = None
    accept_terms: bool = False


FileSource: TypeAlias = (
    SequencesSource | JsonSequencesSource | RecboleSource | CsvSource | ParquetSource | AmazonSource | MovielensSource
)


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


def read_json_sequences(
    source: JsonSequencesSource, *, on_rejected: OnRejected = refuse, on_share: OnShare | None = None
) -> pa.RecordBatchReader:
    """Stream a JSON object of a user per entry; as `read_sequences`, where a line is an entry, counted from 1.

    Raises:
        ValueError: file missing or empty, no JSON object, or one without entries.
    """
    return _files_reader(source.path, json_sequence_chunks, on_rejected, on_share)


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
    return _files_reader(source.path, lambda path: _text_chunks(path, layout_of(path, layouts)), on_rejected, on_share)


def read_movielens(
    source: MovielensSource, *, on_rejected: OnRejected = refuse, on_share: OnShare | None = None
) -> pa.RecordBatchReader:
    """Stream the ratings of a MovieLens release (Harper & Konstan 2015); as `read_csv`."""
    return _files_reader(
        source.path, lambda path: _text_chunks(path, layout_of(path, _MOVIELENS)), on_rejected, on_share
    )


READERS: dict[str, Callable[..., pa.RecordBatchReader]] = {
    "sequences": read_sequences,
    "json_sequences": read_json_sequences,
    "recbole": read_recbole,
    "csv": read_csv,
    "parquet": read_parquet,
    "amazon_2014": read_amazon,
    "amazon_2018": read_amazon,
    "amazon_2023": read_amazon,
    "movielens": read_movielens,
}


def _files_reader(
    path: str, open_file: Callable[[Path], Iterator[Chunk]], on_rejected: OnRejected, on_share: OnShare | None
) -> pa.RecordBatchReader:
    return read_files(source_files(path), open_file, EVENT_SCHEMA, on_rejected, on_share)


# Text ----------------------------------------------------------------------------------------------------------------


def _text_chunks(path: Path, layout: _Layout) -> Iterator[Chunk]:
    refuse_empty(path, "event")
    if layout.delimiter is None or layout.names is not None:
        return _read_text_chunks(path, layout, has_header=False)
    header = read_header(path, delimiter=layout.delimiter, quoted=layout.quoted)
    names = [name.split(":")[0] if layout.typed_header else name for name in header]
    _check_names(path, names, layout.wanted)
    return _read_text_chunks(path, replace(layout, names=tuple(names)), has_header=True)


def _read_text_chunks(path: Path, layout: _Layout, *, has_header: bool) -> Iterator[Chunk]:
    cut: Cut[list[pa.Array]] = partial(_json_fields, layout=layout)
    if layout.delimiter is not None:
        assert layout.names is not None
        cut = partial(
            fields, names=layout.names, wanted=layout.wanted, delimiter=layout.delimiter, quoted=layout.quoted
        )
    for columns, lines, rejects, share in text_rows(
        path, cut, what="events", quoted=layout.quoted, has_header=has_header
    ):
        yield sift(columns, lines, layout.wanted, layout.unit, rejects), rejects.batch(), share


def _sequence_chunks(path: Path) -> Iterator[Chunk]:
    refuse_empty(path, "event")
    return _read_sequence_chunks(path)


def _read_sequence_chunks(path: Path) -> Iterator[Chunk]:
    num_events = 0
    for texts, lines, rejects, share in text_rows(path, lines_of, what="events"):
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


# JSON lines ----------------------------------------------------------------------------------------------------------


def _json_fields(
    block: bytes, first_line: int, rejects: Rejects, *, layout: _Layout
) -> tuple[list[pa.Array], np.ndarray, int]:
    texts, lines, num_rows = lines_of(block, first_line, rejects)
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
