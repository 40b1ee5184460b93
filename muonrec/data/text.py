"""Files as rows: what a path names, text cut into lines and fields with the number of each line, one stream of all."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from muonrec.data.rejected import OnRejected
from muonrec.data.sift import BROKEN, Rejects, is_broken

_HEAD_BYTES = 2**16
_BLOCK_BYTES = 16 * 2**20
_MAX_LINE_BYTES = 64 * 2**20
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
_UTF8_BOM = b"\xef\xbb\xbf"

RowsT = TypeVar("RowsT")
LayoutT = TypeVar("LayoutT")
# The columns of one chunk of a source, its rejected rows, and the share of the file's bytes that is behind.
Chunk: TypeAlias = tuple[Sequence[pa.Array], pa.RecordBatch | None, float]
OnShare: TypeAlias = Callable[[float], None]  # told how much of the source's bytes is behind, from 0 to 1
# Takes a block of whole rows, the number of its first line, and who takes bad rows; gives the rows, the line of each,
# and how many there were, bad ones included.
Cut: TypeAlias = Callable[[bytes, int, Rejects], tuple[RowsT, np.ndarray, int]]


def source_files(path: str, *, setting: str = "data.source", key: str = "path") -> list[Path]:
    """The files that ``path`` (a file or a glob; ``key`` of the section ``setting``) stands for, in order of name.

    Raises:
        ValueError: there is none.
    """
    if Path(path).is_file():
        return [Path(path)]
    files = sorted(Path(match) for match in glob.glob(path, recursive=True) if Path(match).is_file())
    if not files:
        found = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"source {path} {found}; pass a file, or a glob that matches files, as {setting}.{key}=...")
    return files


def describe_sources(files: Sequence[Path]) -> list[dict[str, Any]]:
    """What identifies each of the files: path, size and sha256."""
    described = []
    for path in files:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        described.append({"path": str(path), "num_bytes": path.stat().st_size, "sha256": digest})
    return described


def read_files(
    files: Sequence[Path],
    open_file: Callable[[Path], Iterator[Chunk]],
    schema: pa.Schema,
    on_rejected: OnRejected,
    on_share: OnShare | None,
) -> pa.RecordBatchReader:
    """Join the chunks of all files to one stream of ``schema``, whose last column numbers the rows over all of them."""
    sizes = [file.stat().st_size for file in files]
    # Files are opened here and not at the first batch, so that a wrong path fails before any work is done.
    opened = [open_file(file) for file in files]

    def batches() -> Iterator[pa.RecordBatch]:
        next_row = bytes_behind = 0
        for size, chunks in zip(sizes, opened, strict=True):
            for columns, rejected, share in chunks:
                if rejected is not None:
                    on_rejected(rejected)
                source_row = pa.array(np.arange(next_row, next_row + len(columns[0]), dtype=np.int64))
                next_row += len(source_row)
                yield pa.RecordBatch.from_arrays([*columns, source_row], schema=schema)
                if on_share is not None:  # after the yield: the consumer has counted the batch by now
                    on_share((bytes_behind + share * size) / sum(sizes))
            bytes_behind += size

    return pa.RecordBatchReader.from_batches(schema, batches())


def layout_of(path: Path, layouts: dict[str, LayoutT]) -> LayoutT:
    """The layout that the name of the file announces; raises ValueError if it announces none."""
    suffix = Path(path.stem).suffix if path.suffix in _CODECS else path.suffix
    if suffix not in layouts:
        raise ValueError(f"{path} ends in none of {', '.join(layouts)} (or those and .gz), which tell what it holds")
    return layouts[suffix]


def read_header(path: Path, *, delimiter: str, quoted: bool) -> list[str]:
    """The names in the first line of delimited text."""
    head, _ = next(text_blocks(path, quoted=quoted, block_bytes=_HEAD_BYTES), (b"", 1.0))
    try:
        return next(csv.reader(io.StringIO(head.decode()), delimiter=delimiter), [])
    except csv.Error as error:
        raise ValueError(unreadable(path, error)) from None


def text_rows(
    path: Path, cut: Cut[RowsT], *, what: str, quoted: bool = False, has_header: bool = False, encoding: str = "utf-8"
) -> Iterator[tuple[RowsT, np.ndarray, Rejects, float]]:
    """The rows that ``cut`` makes of each block, the line of each, the rejected, and the share of the file behind.

    Args:
        path: text that may be compressed.
        cut: see `Cut`.
        what: the rows are, for the error.
        quoted: whether fields may be quoted, and then hold newlines.
        has_header: whether the first line holds names.
        encoding: of the text where it is not UTF-8.

    Raises:
        ValueError: the file cannot be read, has no row, or a quote is never closed.
    """
    line = 1
    for block, share in text_blocks(path, quoted=quoted, encoding=encoding):
        if line == 1 and has_header:
            line, block = 2, block[block.find(b"\n") + 1 :]
        rejects = Rejects(path)
        rows, lines, num_rows = cut(block, line, rejects)
        if quoted:
            _check_quotes(path, block, line, num_rows)
        line += num_rows
        yield rows, lines, rejects, share
    if line == 1 + has_header:
        raise ValueError(
            f"{path} has {'a header and ' if has_header else ''}no {what}; pass a file with at least one row"
        )


def text_blocks(
    path: Path, *, quoted: bool, block_bytes: int | None = None, encoding: str = "utf-8"
) -> Iterator[tuple[bytes, float]]:
    """Whole rows of a file that may be compressed; each block with the share of the file that was read by then.

    What is not UTF-8 is read as ``encoding``; `BROKEN` stands for what is neither.

    Blocks of our own, and not Arrow's reader of streams: that one cannot say which line a bad row is.
    """
    block_bytes = block_bytes or _BLOCK_BYTES
    try:
        # The file below and not the stream above knows the place where the text is compressed.
        with pa.OSFile(str(path)) as file, _decompressed(file, path) as stream:
            rest = stream.read(block_bytes).removeprefix(_UTF8_BOM)
            while data := stream.read(block_bytes):
                end = _end_of_rows(rest, quoted=quoted)
                if end:
                    yield _as_utf8(rest[:end], encoding), file.tell() / file.size()
                rest = rest[end:] + data
                if len(rest) > _MAX_LINE_BYTES + block_bytes:
                    raise ValueError(
                        f"{path} has a row of more than {_MAX_LINE_BYTES} bytes; check that it is text, "
                        "that it has line ends, and that its quotes are closed"
                    )
            if rest := rest.rstrip(b"\r\n"):
                yield _as_utf8(rest + b"\n", encoding), 1.0
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(unreadable(path, error)) from None


def unreadable(path: Path, error: Exception) -> str:
    """What to say of a file that cannot be cut into rows."""
    return f"{path} cannot be read: {error}; check its format, its delimiter, and that the file is whole"


def read_text(path: Path) -> str:
    """The whole of a file that may be compressed, and is no rows; `BROKEN` stands for what is not UTF-8.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        with pa.OSFile(str(path)) as file, _decompressed(file, path) as stream:
            return _as_utf8(stream.read().removeprefix(_UTF8_BOM), "utf-8").decode()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(unreadable(path, error)) from None


def _as_utf8(block: bytes, encoding: str) -> bytes:
    """Let `BROKEN` stand for what cannot be decoded: Arrow would refuse the whole block."""
    try:
        block.decode()
    except UnicodeDecodeError:
        if encoding != "utf-8":
            return block.decode(encoding).encode()
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


def fields(
    block: bytes,
    first_line: int,
    rejects: Rejects,
    *,
    names: Sequence[str],
    wanted: Sequence[str],
    delimiter: str,
    quoted: bool,
) -> tuple[list[pa.Array], np.ndarray, int]:
    """Cut delimited text of columns ``names`` into the ``wanted`` ones as strings; a `Cut` but for the settings."""
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
            pa_csv.ReadOptions(column_names=names, block_size=len(block) + 1, use_threads=False),
            pa_csv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                ignore_empty_lines=False,
                invalid_row_handler=skip,
            ),
            pa_csv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(unreadable(rejects.path, error)) from None
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


def lines_of(block: bytes, first_line: int, rejects: Rejects) -> tuple[pa.Array, np.ndarray, int]:
    """Cut text into its lines; a `Cut`."""
    # The unit separator stands in no text: each line is one field.
    (texts,), lines, num_rows = fields(
        block, first_line, rejects, names=["line"], wanted=["line"], delimiter="\x1f", quoted=False
    )
    broken = is_broken(texts)
    rejects.add(lines[broken], "not_utf8", "is not UTF-8 text")
    return texts.filter(pa.array(~broken)), lines[~broken], num_rows


def refuse_empty(path: Path, what: str) -> None:
    """Raise ValueError if the file holds nothing, not one of ``what``."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; pass a file with at least one {what}")
