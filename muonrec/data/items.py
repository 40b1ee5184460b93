"""Read item metadata of several formats as one stream of `ITEM_SCHEMA`: titles, brands, categories, texts, prices.

A row that describes no item goes to ``on_rejected`` with file, line and reason; a source whose structure is wrong
raises at once. Texts are plain: entities of HTML are resolved, its tags left out, white space is single spaces; what is
empty then is null.
"""

from __future__ import annotations

import ast
import html
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from muonrec.config import Config
from muonrec.data.rejected import OnRejected, refuse
from muonrec.data.sift import BROKEN, SHOWN_CHARACTERS, Rejects, is_encodable
from muonrec.data.text import (
    Chunk,
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

# What is known of an item; each may be null.
METADATA = (
    pa.field("title", pa.string()),
    pa.field("brand", pa.string()),
    pa.field("categories", pa.list_(pa.string())),
    pa.field("features", pa.list_(pa.string())),
    pa.field("description", pa.string()),
    pa.field("price", pa.float64()),
)
ITEM_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        *METADATA,
        pa.field("source_row", pa.int64(), nullable=False),
    ]
)
_COLUMNS = ITEM_SCHEMA.names[:-1]
_LISTS = ("categories", "features")

_BATCH_ROWS = 2**13
# Parsed, a record takes some fifty times its text.
_MAX_RECORD_CHARACTERS = 2**20

_TAG = re.compile(r"<(?:!--.*?--|/?[A-Za-z][^<>]{0,2000})>", re.DOTALL)
# "$12.99", "1,299.00", "from 4.99", "$4.99 - $12.99": the first number, which is the lowest.
_PRICE = re.compile(r"(?:from\s+)?\$?\s*([0-9][0-9,]*(?:\.[0-9]+)?)(?:\s*-\s*\$?\s*[0-9][0-9,]*(?:\.[0-9]+)?)?$", re.I)
# Titles of Amazon 2018 may be what its crawler met instead: the script of the page.
_SCRIPT = "getTime()"
_NO_GENRES = "(no genres listed)"
_GENRES_100K = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|Musical|"
    "Mystery|Romance|Sci-Fi|Thriller|War|Western"
).split("|")


class ItemColumns(Config):
    """How the source names its columns.

    Attributes:
        item_id: of the ids, as the log has them.
        title, brand, categories, features, description, price: of the rest;
            null: by the same name, if it has such a column at all.
    """

    item_id: str = "item_id"
    title: str | None = None
    brand: str | None = None
    categories: str | None = None
    features: str | None = None
    description: str | None = None
    price: str | None = None


class RecboleItems(Config):
    """A RecBole atomic file (``.item``): tab-separated, the header names each column as ``name:type``.

    Attributes:
        path: the file, or a glob, whose files are read in order of name; .gz, .bz2, .zst and .lz4 are unpacked.
        columns: what the source calls them.
        separator: of the parts of ``categories`` and ``features``.
    """

    format: Literal["recbole"]
    path: str
    columns: ItemColumns = ItemColumns()
    separator: Annotated[str, Field(min_length=1)] = " "


class CsvItems(Config):
    """Delimited text with a header.

    Attributes:
        path: the file, or a glob, whose files are read in order of name; .gz, .bz2, .zst and .lz4 are unpacked.
        columns: what the source calls them.
        delimiter: one character.
        separator: of the parts of ``categories`` and ``features``.
    """

    format: Literal["csv"]
    path: str
    columns: ItemColumns = ItemColumns()
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    separator: Annotated[str, Field(min_length=1)] = "|"


class ParquetItems(Config):
    """Parquet, where ``categories`` and ``features`` may be lists.

    Attributes:
        path: the file, or a glob.
        columns: what the source calls them.
    """

    format: Literal["parquet"]
    path: str
    columns: ItemColumns = ItemColumns()


class AmazonItems(Config):
    """``meta_*.json`` of Amazon Reviews 2014 and 2018 or ``meta_*.jsonl`` of 2023, also compressed.

    Attributes:
        path: the file, or without ``download`` a glob, which may be compressed.
        download: file to fetch to ``path`` where that is missing, such as ``meta_Beauty.json.gz``; null: never.
        accept_terms: as for the log.
    """

    format: Literal["amazon_2014", "amazon_2018", "amazon_2023"]
    path: str
    download: str | None = None
    accept_terms: bool = False


class MovielensItems(Config):
    """``movies.csv``, ``movies.dat`` (1M, 10M) or ``u.item`` (100K) of MovieLens, also compressed.

    Attributes:
        path: the file, or without ``download`` a glob; its ending, before .gz, .bz2, .zst or .lz4, says of which kind.
        download: archive to fetch and take ``path`` from where that is missing, such as ``ml-1m.zip``; null: never.
        accept_terms: as for the log.
    """

    format: Literal["movielens"]
    path: str
    download: str | None = None
    accept_terms: bool = False


FileItems: TypeAlias = RecboleItems | CsvItems | ParquetItems | AmazonItems | MovielensItems

Record: TypeAlias = Mapping[str, Any]


class _Fault(Exception):
    """A row that describes no item."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class _Layout(NamedTuple):
    """How a line becomes a record, and under which names a record holds what `METADATA` names.

    Attributes:
        parse: a line to a record; raises `_Fault`.
        names: of each column, the fields that are looked at until one says something; "a.b" is field b of field a.
        encoding: of text that is not UTF-8.
    """

    parse: Callable[[str], Record]
    names: Mapping[str, tuple[str, ...]]
    encoding: str = "utf-8"


def read_items(
    source: FileItems, *, on_rejected: OnRejected = refuse, on_share: OnShare | None = None
) -> pa.RecordBatchReader:
    """Stream the items of ``source`` in its order, in batches of bounded size; an item may come more than once.

    Args:
        source: the files.
        on_rejected: given the rows that describe no item; the default raises ValueError at the first.
        on_share: told how much of the source is behind.

    Returns:
        Of `ITEM_SCHEMA`. A description in parts is joined by spaces; nested categories are flattened, each once; a
        price that is a range is its lower end, in the source's currency.

    Raises:
        ValueError: file missing or empty, or an unknown column.
    """
    files = source_files(source.path, setting="data.items")
    return read_files(files, lambda path: _open(path, source), ITEM_SCHEMA, on_rejected, on_share)


def _open(path: Path, source: FileItems) -> Iterator[Chunk]:
    refuse_empty(path, "item")
    match source:
        case AmazonItems():
            layouts = {".jsonl" if source.format == "amazon_2023" else ".json": _AMAZON[source.format]}
            return _line_chunks(path, layout_of(path, layouts))
        case MovielensItems():
            if (layout := layout_of(path, _MOVIELENS)) is not None:
                return _line_chunks(path, layout)
            return _table_chunks(path, CsvItems(format="csv", path=source.path, columns=_MOVIES_CSV))
        case ParquetItems():
            return _parquet_chunks(path, source.columns)
        case _:
            return _table_chunks(path, source)


# Lines ---------------------------------------------------------------------------------------------------------------


def _line_chunks(path: Path, layout: _Layout) -> Iterator[Chunk]:
    for texts, lines, rejects, share in text_rows(path, lines_of, what="items", encoding=layout.encoding):
        for block in _batches(len(lines)):
            columns = _columns(texts[block].to_pylist(), lines[block], layout.parse, layout.names, rejects)
            yield columns, rejects.batch() if block.stop >= len(lines) else None, share


def _batches(num_rows: int) -> list[slice]:
    """Rows that are parsed at once; at least one batch, though it be empty."""
    return [slice(start, start + _BATCH_ROWS) for start in range(0, max(num_rows, 1), _BATCH_ROWS)]


def _parse_json(text: str) -> Record:
    try:
        return _checked_record(json.loads(text), "not_json", "is no JSON object")
    except json.JSONDecodeError as error:
        raise _Fault("not_json", f"is no JSON object: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise _Fault("not_json", f"is no JSON object: {error}"[:200]) from None


def _parse_literal(text: str) -> Record:
    """A dict as Python prints it: literals are parsed and never run."""
    try:
        return _checked_record(ast.literal_eval(text), "not_a_literal", "is no Python dict")
    except SyntaxError as error:
        raise _Fault("not_a_literal", f"is no Python dict: {error.msg} at character {error.offset or 1}") from None
    except (ValueError, TypeError):
        raise _Fault(
            "not_a_literal", "is no Python dict of literals: it holds a name, a call or a key of lists"
        ) from None


def _checked_record(record: Any, kind: str, reason: str) -> Record:
    if not isinstance(record, dict):
        raise _Fault(kind, f"{reason} but {type(record).__name__}")
    return record


def _parse_fields(text: str, *, separator: str, names: Sequence[str]) -> Record:
    parts = text.split(separator)
    if len(parts) != len(names):
        raise _Fault("wrong_number_of_fields", f"has {len(parts)} fields, expected {len(names)}")
    return dict(zip(names, parts, strict=True))


def _parse_movie_dat(text: str) -> Record:
    record = _parse_fields(text, separator="::", names=["item_id", "title", "categories"])
    return {**record, "categories": _genres(record["categories"])}


def _parse_movie_100k(text: str) -> Record:
    names = ["item_id", "title", "release_date", "video_release_date", "url", *_GENRES_100K]
    record = _parse_fields(text, separator="|", names=names)
    flags = [record[name] for name in _GENRES_100K]
    if strange := next((flag for flag in flags if flag not in ("0", "1")), None):
        raise _Fault("wrong_genre", f"has a genre of {strange[:SHOWN_CHARACTERS]!r}, expected 0 or 1")
    return {**record, "categories": [name for name in _GENRES_100K[1:] if record[name] == "1"]}


def _genres(text: str) -> list[str]:
    return [genre for genre in text.split("|") if genre != _NO_GENRES]


_SAME = {name: (name,) for name in _COLUMNS}
_AMAZON = {
    "amazon_2014": _Layout(
        _parse_literal, {**_SAME, "item_id": ("asin",), "features": ("feature",)},
    ),
    "amazon_2018": _Layout(
        _parse_json,
        {**_SAME, "item_id": ("asin",), "features": ("feature",), "categories": ("category", "main_cat")},
    ),
    "amazon_2023": _Layout(
        _parse_json,
        {
            **_SAME,
            "item_id": ("parent_asin",),
            "brand": ("details.Brand", "store"),
            "categories": ("categories", "main_category"),
        },
    ),
}  # fmt: skip

# Titles of 1M and 100K are Latin-1, those of 10M are UTF-8. None: delimited text with a header.
_MOVIELENS: dict[str, _Layout | None] = {
    ".csv": None,
    ".dat": _Layout(_parse_movie_dat, _SAME, encoding="latin-1"),
    ".item": _Layout(_parse_movie_100k, _SAME, encoding="latin-1"),
}
_MOVIES_CSV = ItemColumns(item_id="movieId", title="title", categories="genres")


# Tables --------------------------------------------------------------------------------------------------------------


def _table_chunks(path: Path, source: CsvItems | RecboleItems) -> Iterator[Chunk]:
    is_recbole = isinstance(source, RecboleItems)
    delimiter = "\t" if isinstance(source, RecboleItems) else source.delimiter
    header = read_header(path, delimiter=delimiter, quoted=not is_recbole)
    names = [name.split(":")[0] if is_recbole else name for name in header]
    found = _find_columns(path, names, source.columns)
    return _read_table_chunks(path, names, found, delimiter, source.separator, quoted=not is_recbole)


def _read_table_chunks(
    path: Path, names: list[str], found: dict[str, str], delimiter: str, separator: str, *, quoted: bool
) -> Iterator[Chunk]:
    def parse(row: tuple[str | None, ...]) -> Record:
        record = dict(zip(found, row, strict=True))
        if not any(record.values()):
            raise _Fault("blank", f"holds nothing in {', '.join(map(repr, found.values()))}")
        parts = {name: (record[name] or "").split(separator) for name in _LISTS if name in record}
        return {**record, **{name: [part for part in texts if part != _NO_GENRES] for name, texts in parts.items()}}

    wanted = list(found.values())
    cut = partial(fields, names=names, wanted=wanted, delimiter=delimiter, quoted=quoted)
    for arrays, lines, rejects, share in text_rows(path, cut, what="items", quoted=quoted, has_header=True):
        for block in _batches(len(lines)):
            rows = list(zip(*(array[block].to_pylist() for array in arrays), strict=True))
            columns = _columns(rows, lines[block], parse, _SAME, rejects)
            yield columns, rejects.batch() if block.stop >= len(lines) else None, share


def _parquet_chunks(path: Path, columns: ItemColumns) -> Iterator[Chunk]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file ({error}); set data.items.format to what it is") from None
    if file.metadata.num_rows == 0:
        raise ValueError(f"{path} has no items; pass a file with at least one row")
    found = _find_columns(path, file.schema_arrow.names, columns)
    kind = file.schema_arrow.field(found["item_id"]).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(
            f"{path}: column {found['item_id']!r} is {kind}, but ids are strings or integers; convert it first"
        )
    return _read_parquet_chunks(path, file, found)


def _read_parquet_chunks(path: Path, file: pq.ParquetFile, found: dict[str, str]) -> Iterator[Chunk]:
    names = {column: (name,) for column, name in found.items()}
    row = 1
    with file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(found.values())):
            rejects = Rejects(path)
            ids = batch.column(found["item_id"]).cast(pa.string())
            records = batch.set_column(
                batch.schema.get_field_index(found["item_id"]), found["item_id"], ids
            ).to_pylist()
            columns = _columns(records, row + np.arange(len(batch)), lambda record: record, names, rejects)
            row += len(batch)
            yield columns, rejects.batch(), (row - 1) / file.metadata.num_rows


def _find_columns(path: Path, names: Sequence[str], columns: ItemColumns) -> dict[str, str]:
    """Which column of the source each of ours is; those that it need not have and does not have are left out."""
    asked = columns.model_dump()
    if missing := [name for name in asked.values() if name is not None and name not in names]:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, names))}. "
            "Name them in data.items.columns"
        )
    found = {column: name or column for column, name in asked.items() if (name or column) in names}
    used = list(found.values())
    if repeated := sorted({name for name in used if list(names).count(name) > 1 or used.count(name) > 1}):
        raise ValueError(f"{path}: column {repeated[0]!r} stands twice; data.items.columns must name different ones")
    if len(found) == 1:
        raise ValueError(
            f"{path} says nothing of its items: it has {', '.join(map(repr, names))}; name its title, categories, ... "
            "in data.items.columns"
        )
    return found


# Records -------------------------------------------------------------------------------------------------------------


def _columns(
    rows: Sequence[Any],
    lines: np.ndarray,
    parse: Callable[[Any], Record],
    names: Mapping[str, tuple[str, ...]],
    rejects: Rejects,
) -> list[pa.Array]:
    """The columns of `ITEM_SCHEMA` but for its last; each row that is no item is rejected for the first fault found."""
    items = []
    with warnings.catch_warnings():
        for category in (SyntaxWarning, DeprecationWarning):  # "\d" in a text of Amazon 2014, from 3.12 on and before
            warnings.simplefilter("ignore", category)
        for row, line in zip(rows, lines, strict=True):
            try:
                items.append(_item(row, parse, names))
            except _Fault as fault:
                rejects.add(np.array([line]), fault.kind, fault.reason)
            except (RecursionError, MemoryError):  # of the parsers, whatever memory there is
                rejects.add(np.array([line]), "nested_too_deeply", "is nested too deeply")
    values = zip(*items, strict=True) if items else itertools.repeat(())
    return [pa.array(column, ITEM_SCHEMA.field(name).type) for name, column in zip(_COLUMNS, values, strict=False)]


def _item(row: Any, parse: Callable[[Any], Record], names: Mapping[str, tuple[str, ...]]) -> tuple[Any, ...]:
    if isinstance(row, str):
        if not row.strip():
            raise _Fault("blank", "holds nothing")
        if len(row) > _MAX_RECORD_CHARACTERS:
            raise _Fault("too_long", f"has {len(row)} characters, at most {_MAX_RECORD_CHARACTERS} are read")
    record = parse(row)
    return tuple(_READ.get(column, _text_of)(record, names.get(column, ())) for column in _COLUMNS)


def _first_value(record: Record, names: Sequence[str]) -> tuple[str, Any]:
    """The first of the fields that says something, and what it says."""
    for name in names:
        outer, _, inner = name.partition(".")
        value = record.get(outer)
        if inner:
            value = value.get(inner) if isinstance(value, dict) else None
        if value is not None and value != "" and value != []:
            return name, value
    return "", None


def _id_of(record: Record, names: Sequence[str]) -> str:
    name, value = names[0], record.get(names[0])
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _Fault("no_item_id", f"field {name!r} is empty; every row needs the item it describes")
    if not isinstance(value, str):
        raise _Fault("wrong_type", f"field {name!r} is {_shown(value)}, expected a string")
    if BROKEN in value or not is_encodable(value):
        raise _Fault("not_utf8", f"field {name!r} is not UTF-8 text")
    return value


def _text_of(record: Record, names: Sequence[str]) -> str | None:
    name, value = _first_value(record, names)
    return _plain(" ".join(_strings(name, value))) or None


def _title_of(record: Record, names: Sequence[str]) -> str | None:
    title = _text_of(record, names)
    return None if title is None or _SCRIPT in title else title


def _texts_of(record: Record, names: Sequence[str]) -> list[str] | None:
    name, value = _first_value(record, names)
    return list(dict.fromkeys(filter(None, map(_plain, _strings(name, value))))) or None


def _price_of(record: Record, names: Sequence[str]) -> float | None:
    """A number from 0 on; null for what is no price, since shops write anything there."""
    _, value = _first_value(record, names)
    if isinstance(value, str):
        match = _PRICE.match(value.strip())
        value = float(match[1].replace(",", "")) if match else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    try:
        price = float(value)
    except OverflowError:
        return None
    return price if math.isfinite(price) and price >= 0 else None


_READ: dict[str, Callable[[Record, Sequence[str]], Any]] = {
    "item_id": _id_of, "title": _title_of, "price": _price_of, "categories": _texts_of, "features": _texts_of,
}  # fmt: skip


def _strings(name: str, value: Any) -> Iterator[str]:
    """The texts of a field, whether it holds one, a list, or lists of lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(name, part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield _shown(value) if value == value else ""  # NaN is how pandas writes nothing
    elif value is not None:
        raise _Fault("wrong_type", f"field {name!r} holds {_shown(value)}, expected text or a list of texts")


def _plain(text: str) -> str:
    """Text without HTML."""
    text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", text)
    text = " ".join(text.replace("\0", " ").replace(BROKEN, "\ufffd").split())
    return text if is_encodable(text) else text.encode(errors="replace").decode()


def _shown(value: Any) -> str:
    try:
        return repr(value)[:SHOWN_CHARACTERS]
    except ValueError:
        return "a number of thousands of digits"
