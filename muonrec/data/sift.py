"""Tell the rows of a source that are events from those that are not, whole columns at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from muonrec.data.rejected import REJECTED_SCHEMA

# 1e11 s is the year 5138 and 1e11 ms is 1973: no log of interactions lies between the two readings.
MAX_TIMESTAMP_S = 10**11

# Stands for bytes that are not UTF-8: a noncharacter of Unicode, which no text that is exchanged holds.
BROKEN = "\ufdd0"

# A rejected value is shown up to this many characters.
SHOWN_CHARACTERS = 60
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"

_FINER = {
    "s": ", which looks like milliseconds though s was stated; set data.source.timestamp_unit: ms",
    "ms": ", which looks like microseconds though ms was stated; divide by 1000",
}

Columns: TypeAlias = tuple[pa.Array, pa.Array, pa.Array]  # user_id, item_id, timestamp_s: one chunk of a source


class Rejects:
    """The rejected rows of one chunk."""

    def __init__(self, path: Path) -> None:
        self.num_rows = 0
        self.path = path
        self._parts: list[pa.RecordBatch] = []

    def add(self, lines: np.ndarray, kind: str, reasons: str | list[str] | pa.Array) -> None:
        """Reject ``lines`` for one reason, or for a reason each."""
        if not len(lines):
            return
        texts = pa.repeat(reasons, len(lines)) if isinstance(reasons, str) else reasons
        columns = [pa.repeat(str(self.path), len(lines)), pa.array(lines), pa.repeat(kind, len(lines)), texts]
        self._parts.append(pa.table(columns, schema=REJECTED_SCHEMA).combine_chunks().to_batches()[0])
        self.num_rows += len(lines)

    def batch(self) -> pa.RecordBatch | None:
        """All of them in order of lines; None if there is none."""
        if not self._parts:
            return None
        return pa.Table.from_batches(self._parts).sort_by("line").combine_chunks().to_batches()[0]


def sift(
    columns: Sequence[pa.Array], lines: np.ndarray, names: Sequence[str], unit: Literal["s", "ms"], rejects: Rejects
) -> Columns:
    """The rows that are events; each of the others is rejected for the first fault found.

    Args:
        columns: users, items and, where the source has them, times; a row each, as read.
        lines: int64, the line of each row.
        names: of the columns in the source, for the reasons.
        unit: of times that are numbers.
        rejects: takes the others.
    """
    good = np.ones(len(lines), dtype=bool)

    def reject(bad: np.ndarray, kind: str, before: str, values: pa.Array | None = None, after: str = "") -> None:
        bad = bad & good
        if bad.any():
            quoted = None if values is None else shown(values.filter(pa.array(bad)))
            rejects.add(lines[bad], kind, before + after if quoted is None else around(before, quoted, after))
            good[bad] = False

    columns = [column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in columns]
    for name, column in zip(names, columns, strict=True):
        reject(is_broken(column), "not_utf8", f"column {name!r} is not UTF-8 text")
    missing = [_is_missing(column) for column in columns]
    reject(np.logical_and.reduce(missing), "blank", f"holds nothing in {', '.join(map(repr, names))}")
    for name, role, is_missing in zip(names[:2], ("user_id", "item_id"), missing):
        reject(is_missing, f"no_{role}", f"column {name!r} is empty; every event needs a user and an item")
    ids = [column.cast(pa.string()) for column in columns[:2]]
    seconds = pa.nulls(len(lines), pa.int64())
    if len(names) == 3:
        name, times = names[2], columns[2]
        reject(missing[2], "no_time", f"column {name!r} is empty; drop the row or set columns.timestamp_s: null")
        if pa.types.is_temporal(times.type):
            times, unit = times.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()), "ms"
        values, is_number = _to_numbers(times)
        is_now = f"column {name!r} is "
        reject(~is_number, "time_not_a_number", is_now, columns[2], f", expected a number of {unit} since 1970")
        reject(
            values < 0, "time_before_1970", is_now, columns[2], f", expected a number of {unit} since 1970, not before"
        )
        floored = np.floor_divide(values, 1000 if unit == "ms" else 1)
        reject(floored > MAX_TIMESTAMP_S, "time_too_late", is_now, columns[2], _FINER[unit])
        seconds = pa.array(np.where(good, floored, 0).astype(np.int64))
    if good.all():
        return ids[0], ids[1], seconds
    kept = pa.array(good)
    return ids[0].filter(kept), ids[1].filter(kept), seconds.filter(kept)


def as_encodable(text: str) -> str:
    """The text, or `BROKEN` where it is none that UTF-8 knows: JSON may hold halves of characters."""
    return text if is_encodable(text) else BROKEN


def is_encodable(text: str) -> bool:
    """Whether UTF-8 knows all characters of the text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_broken(values: pa.Array) -> np.ndarray:
    """Which texts held bytes that are not UTF-8."""
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return np.zeros(len(values), dtype=bool)
    return pc.fill_null(pc.match_substring(values, BROKEN), False).to_numpy(zero_copy_only=False)


def _is_missing(values: pa.Array) -> np.ndarray:
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        is_missing = pc.fill_null(pc.equal(pc.binary_length(pc.utf8_trim_whitespace(values)), 0), True)
    else:
        is_missing = pc.is_null(values)
    return is_missing.to_numpy(zero_copy_only=False)


def _to_numbers(times: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, 0 where there is none, and where there is one; the same for a value whatever stands beside it."""
    if pa.types.is_string(times.type) or pa.types.is_large_string(times.type):
        # Not Arrow's cast alone: it takes 0x10 and nan for numbers.
        if pc.all(pc.and_(pc.ascii_is_decimal(times), pc.less_equal(pc.binary_length(times), 18))).as_py():
            times = times.cast(pa.int64())
        else:
            is_text_number = pc.match_substring_regex(times, _NUMBER)
            times = pc.if_else(is_text_number, times, pa.scalar(None, times.type)).cast(pa.float64())
    elif not pa.types.is_integer(times.type):
        times = times.cast(pa.float64())
    is_number = pc.is_valid(times).to_numpy(zero_copy_only=False)
    if pa.types.is_floating(times.type):
        is_number &= pc.is_finite(pc.fill_null(times, 0.0)).to_numpy(zero_copy_only=False)
    values = pc.fill_null(times, 0).to_numpy(zero_copy_only=False)
    return np.where(is_number, values, 0), is_number


def shown(values: pa.Array) -> pa.Array:
    """Values as a message quotes them."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return around("'", pc.utf8_slice_codeunits(values.cast(pa.string()), 0, SHOWN_CHARACTERS), "'")
    return pc.fill_null(values.cast(pa.string()), "null")


def around(before: str, values: pa.Array, after: str = "") -> pa.Array:
    """Texts with the same words before and after each."""
    return pc.binary_join_element_wise(before, values, after, "")
