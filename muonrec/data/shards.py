"""The data set on disk: Parquet shards with a row per user, two vocabularies, and the manifest that commits them."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from muonrec.data.manifest import ITEMS, Manifest, verify_dataset
from muonrec.data.places import parquet_of, place

logger = logging.getLogger(__name__)

_ROW_GROUP_ROWS = 8192
_QUANTILES = {"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass
class ShardStatistics:
    """What `write_shards` counted on the way through."""

    item_train_counts: np.ndarray  # [num_items] int64
    num_users: int = 0
    num_events: dict[str, int] = field(default_factory=lambda: {"train": 0, "valid": 0, "test": 0})
    num_users_with_target: dict[str, int] = field(default_factory=lambda: {"valid": 0, "test": 0})
    num_targets: dict[str, int] = field(default_factory=lambda: {"valid": 0, "test": 0})
    num_tied_targets: dict[str, int] = field(default_factory=lambda: {"valid": 0, "test": 0})
    num_tied_events: int = 0
    lengths: Counter[int] = field(default_factory=Counter)

    def length_quantiles(self) -> dict[str, float]:
        """Quantiles of the events per user: the smallest length that at least that share of the users stays within."""
        lengths = np.array(sorted(self.lengths))
        cumulative = np.cumsum([self.lengths[length] for length in lengths])
        return {
            name: float(lengths[np.searchsorted(cumulative, max(1, share * cumulative[-1]))])
            for name, share in _QUANTILES.items()
        }


@dataclass(frozen=True)
class Sequences:
    """All users' sequences in memory, ordered by ``user_id``. Not for logs larger than memory: read the shards.

    Attributes:
        values: item ids of all users, concatenated; int32, or int64 where the vocabulary needs it. Do not modify.
        offsets: int64 ``[num_users + 1]``; user ``u`` owns ``values[offsets[u]:offsets[u + 1]]``.
        num_train: int32 ``[num_users]``: how many of a user's events, from the first on, are training events.
        num_valid: int32 ``[num_users]``: the events after those.
        num_test: int32 ``[num_users]``: the events after those, up to the last.
        user_ids: int64 ``[num_users]``, rows of the user vocabulary: ``0 .. num_users - 1``.
        num_items: rows of the item vocabulary; every value is below it.
        item_train_counts: int64 ``[num_items]``: training events of each item.
        manifest: the manifest of the folder.
        timestamps_s: int64, parallel to ``values``; None unless asked for, or where the source had no times.
        all_targets: whether every event of a part with some event before it is a target (split ``ratio``), or only the
            first event of the part.
    """

    values: np.ndarray
    offsets: np.ndarray
    num_train: np.ndarray
    num_valid: np.ndarray
    num_test: np.ndarray
    user_ids: np.ndarray
    num_items: int
    item_train_counts: np.ndarray
    manifest: Manifest
    timestamps_s: np.ndarray | None = None
    all_targets: bool = False

    def targets(self, part: Literal["valid", "test"]) -> np.ndarray:
        """Place of each user's first evaluation target in the user's own sequence; everything before is the history.

        Returns:
            int64 ``[num_users]``, -1 for users without a target.
        """
        first, count = self._spans(part)
        return np.where(count > 0, first, -1)

    def target_ids(self, part: Literal["valid", "test"]) -> np.ndarray:
        """Names of all evaluation targets: the user's row where a user has one, else the target's index in ``values``.

        Returns:
            int64, ascending; `locate` says where they are.
        """
        first, count = self._spans(part)
        if not self.all_targets:
            return np.flatnonzero(count)
        return _places(self.offsets[:-1] + first, count)

    def locate(self, target_ids: np.ndarray, part: Literal["valid", "test"]) -> tuple[np.ndarray, np.ndarray]:
        """User's row and place in the user's own sequence of each target, int64; the place is the history's length."""
        if not self.all_targets:
            return target_ids, self.targets(part)[target_ids]
        rows = np.searchsorted(self.offsets, target_ids, side="right") - 1
        return rows, target_ids - self.offsets[rows]

    def _spans(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        return target_spans(self.num_train, self.num_valid, self.num_test, part, all_targets=self.all_targets)


def target_spans(
    num_train: np.ndarray, num_valid: np.ndarray, num_test: np.ndarray, part: str, *, all_targets: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Place of each user's first target in ``part``, and how many there are from there on; int64 ``[num_users]``.

    One target: the first event of the part, none if the user's sequence starts there. All: every event but that one.
    """
    if part not in ("valid", "test"):
        raise ValueError(f"part {part!r} has no evaluation targets; ask for 'valid' or 'test'")
    before = num_train.astype(np.int64) + (num_valid if part == "test" else 0)
    held_out = num_valid if part == "valid" else num_test
    if all_targets:
        first = np.maximum(before, 1)
        return first, np.maximum(before + held_out - first, 0)
    return before, ((before >= 1) & (held_out >= 1)).astype(np.int64)


def shard_name(shard: int, num_shards: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:05d}-of-{num_shards:05d}.parquet"


def write_shards(
    events: pa.RecordBatchReader,
    folder: Path,
    *,
    num_shards: int,
    num_items: int,
    all_targets: bool = False,
    on_events: Callable[[int], None] = lambda num_events: None,
) -> ShardStatistics:
    """Write a row per user, users dealt out by ``user_id % num_shards``, from a stream in exactly that order.

    Args:
        events: ``user_id, item_id, timestamp_s, source_row, num_train, num_valid, num_test``, a row per event, sorted
            by ``user_id % num_shards``, then ``user_id``, then the order of the user's events.
        folder: existing folder; gets ``num_shards`` files, some of them without rows where users are few.
        num_items: rows of the item vocabulary; decides between int32 and int64.
        all_targets: see `Sequences`; for the counts.
        on_events: called with the number of events written since the last call.

    Raises:
        RuntimeError: the events are not in that order.
    """
    statistics = ShardStatistics(np.zeros(num_items, dtype=np.int64))
    last_key = -1
    item_type = pa.int32() if num_items <= 2**31 else pa.int64()
    files = _ShardFiles(folder, num_shards, _shard_schema(item_type))
    for block in _blocks_of_whole_users(events):
        last_key = _check_order(block, num_shards, last_key)
        rows = _rows_of_users(block, files.schema)
        _count(statistics, block, rows, all_targets=all_targets)
        shards = rows.column("user_id").to_numpy() % num_shards
        edges = [0, *(np.flatnonzero(np.diff(shards)) + 1), len(rows)]
        for start, end in itertools.pairwise(edges):
            files.add(int(shards[start]), rows.slice(start, end - start))
        on_events(len(block))
    files.close()
    return statistics


def write_table(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    """Stream ``batches`` to one Parquet file of ``schema``."""
    file = _RowGroups(path, schema)
    for batch in batches:
        file.add(pa.Table.from_batches([batch]).select(schema.names).cast(schema))
    file.close()


def load_sequences(folder: str | Path | UPath, *, verify_hashes: bool = False, timestamps: bool = False) -> Sequences:
    """Read a data set into memory, ordered by ``user_id`` whatever the number of shards.

    Args:
        folder: what ``python -m pipeline.data`` wrote, or the URL of a copy.
        verify_hashes: also compare the sha256 of every file (sizes are always compared).
        timestamps: also read ``timestamps_s``.

    Raises:
        ValueError: no data set, or a file that differs from its manifest; the file is named.
    """
    folder = place(folder)
    manifest = verify_dataset(folder, verify_hashes=verify_hashes)
    counts = read_table(folder / ITEMS, ["num_train_events"]).column(0).to_numpy()
    if len(counts) != manifest.num_items:
        raise ValueError(
            _damaged(folder / ITEMS, f"has {len(counts)} items but the manifest counts {manifest.num_items}")
        )
    shards = [_read_shard(folder / name, manifest, timestamps) for name in manifest.files if name.startswith("shard-")]

    user_ids = np.concatenate([shard["user_id"] for shard in shards])
    is_once = np.bincount(user_ids, minlength=manifest.num_users) <= 1 if (user_ids >= 0).all() else np.zeros(1)
    is_whole = manifest.ancestor is not None or len(user_ids) == manifest.num_users  # else no user is without events
    if not (is_whole and is_once.all() and len(is_once) == manifest.num_users):
        raise ValueError(_damaged(folder, f"its shards do not hold users 0 .. {manifest.num_users - 1} once each"))
    per_user = {
        name: _scatter(user_ids, np.concatenate([shard[name] for shard in shards]), manifest.num_users)
        for name in ("length", "num_train", "num_valid", "num_test")
    }
    offsets = np.concatenate([[0], np.cumsum(per_user["length"])]).astype(np.int64)
    if offsets[-1] != manifest.num_events:
        raise ValueError(
            _damaged(folder, f"its shards hold {offsets[-1]} events, the manifest counts {manifest.num_events}")
        )

    values = np.empty(manifest.num_events, dtype=shards[0]["values"].dtype)
    has_times = timestamps and manifest.time_range_s is not None
    timestamps_s = np.empty(manifest.num_events, dtype=np.int64) if has_times else None
    for shard in shards:
        places = _places(offsets[shard["user_id"]], shard["length"])
        values[places] = shard["values"]
        if timestamps_s is not None:
            timestamps_s[places] = shard["timestamps_s"]
    return Sequences(
        values=values,
        offsets=offsets,
        num_train=per_user["num_train"],
        num_valid=per_user["num_valid"],
        num_test=per_user["num_test"],
        user_ids=np.arange(manifest.num_users, dtype=np.int64),
        num_items=manifest.num_items,
        item_train_counts=counts.astype(np.int64),
        manifest=manifest,
        timestamps_s=timestamps_s,
        all_targets=manifest.all_targets,
    )


def load_items(folder: str | Path | UPath, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Read what is known of the items, a row per item in order of ``item_id``, from 0.

    Args:
        folder: what ``python -m pipeline.data`` wrote with ``data.items``.
        columns: of ``item_id``, ``raw_id``, ``num_train_events`` and those of `muonrec.data.items.METADATA`: ``title``,
            ``brand``, ``description`` (strings), ``categories``, ``features`` (lists of strings), ``price`` (float64);
            null where nothing is known. None: all.

    Raises:
        ValueError: no data set, a damaged one, one without metadata, or an unknown column.
    """
    path, manifest = place(folder) / ITEMS, verify_dataset(folder)
    if manifest.item_metadata is None:
        raise ValueError(
            f"{folder} has no item metadata; name its source as data.items and run python -m pipeline.data"
        )
    table = read_table(path)
    if unknown := sorted(set(columns or ()) - set(table.column_names)):
        names = ", ".join(table.column_names)
        raise ValueError(f"{path} has no column {', '.join(map(repr, unknown))}; it has {names}")
    table = table if columns is None else table.select(list(columns))
    if len(table) != manifest.num_items:
        raise ValueError(_damaged(path, f"has {len(table)} items but the manifest counts {manifest.num_items}"))
    return table


class _RowGroups:
    """A Parquet file whose row groups are cut by number of rows, however the rows arrive: equal rows, equal bytes."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._pending = schema.empty_table()

    def add(self, rows: pa.Table) -> None:
        self._pending = pa.concat_tables([self._pending, rows])
        while len(self._pending) >= _ROW_GROUP_ROWS:
            self._write(self._pending.slice(0, _ROW_GROUP_ROWS))
            self._pending = self._pending.slice(_ROW_GROUP_ROWS)

    def close(self) -> None:
        if len(self._pending):
            self._write(self._pending)
        self._writer.close()

    def _write(self, rows: pa.Table) -> None:
        self._writer.write_table(rows.combine_chunks(), row_group_size=_ROW_GROUP_ROWS)


class _ShardFiles:
    """Write one shard after the other; every shard exists at the end."""

    def __init__(self, folder: Path, num_shards: int, schema: pa.Schema) -> None:
        self.schema = schema
        self._folder = folder
        self._num_shards = num_shards
        self._shard = -1
        self._file: _RowGroups | None = None

    def add(self, shard: int, rows: pa.Table) -> None:
        """Append rows to ``shard``; shards come in ascending order."""
        self._advance_to(shard)
        assert self._file is not None
        self._file.add(rows)

    def close(self) -> None:
        """Write what waits, and the shards without rows that are left."""
        self._advance_to(self._num_shards - 1)
        assert self._file is not None
        self._file.close()

    def _advance_to(self, shard: int) -> None:
        while self._shard < shard:
            if self._file is not None:
                self._file.close()
            self._shard += 1
            self._file = _RowGroups(self._folder / shard_name(self._shard, self._num_shards), self.schema)


def _shard_schema(item_type: pa.DataType) -> pa.Schema:
    return pa.schema(
        [
            pa.field("user_id", pa.int64(), nullable=False),
            pa.field("item_ids", pa.list_(item_type), nullable=False),
            pa.field("timestamps_s", pa.list_(pa.int64())),
            pa.field("num_train", pa.int32(), nullable=False),
            pa.field("num_valid", pa.int32(), nullable=False),
            pa.field("num_test", pa.int32(), nullable=False),
        ]
    )


def _blocks_of_whole_users(events: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Cut the stream between users only: the last user of a batch waits for the next batch."""
    waiting: pa.Table | None = None
    for batch in events:
        table = pa.Table.from_batches([batch])
        table = table if waiting is None else pa.concat_tables([waiting, table])
        if not len(table):
            continue
        user_ids = table.column("user_id").to_numpy()
        last = int(np.flatnonzero(np.diff(user_ids))[-1] + 1) if user_ids[0] != user_ids[-1] else 0
        if last:
            yield table.slice(0, last).combine_chunks()
        waiting = table.slice(last)
    if waiting is not None:
        yield waiting.combine_chunks()


def _check_order(block: pa.Table, num_shards: int, last_key: int) -> int:
    """An engine that forgets ORDER BY would give data sets that look right: cheap to refuse here, hard to find later.

    Returns:
        The key of the block's last user, the ``last_key`` of the next block; keys ascend by shard, then by user.
    """
    user_ids, times = block.column("user_id").to_numpy(), block.column("timestamp_s")
    ends = np.flatnonzero(np.diff(user_ids))
    users = user_ids[np.append(ends, len(user_ids) - 1)]
    keys = np.append(last_key, (users % num_shards << 40) + users)
    order = block.column("source_row").to_numpy() if times.null_count else times.to_numpy()
    if (np.diff(keys) <= 0).any() or (np.delete(np.diff(order), ends) < 0).any():
        raise RuntimeError("the engine returned events out of order; please report this with the version of duckdb")
    return int(keys[-1])


def _rows_of_users(block: pa.Table, schema: pa.Schema) -> pa.Table:
    """A row per user of whole users' events."""
    user_ids = block.column("user_id").to_numpy()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(user_ids)) + 1])
    offsets = pa.array(np.append(starts, len(user_ids)).astype(np.int32))
    first = block.take(pa.array(starts))
    times = block.column("timestamp_s").combine_chunks()
    lists = {
        "item_ids": pa.ListArray.from_arrays(
            offsets, block.column("item_id").combine_chunks().cast(schema.field("item_ids").type.value_type)
        ),
        "timestamps_s": pa.nulls(len(starts), pa.list_(pa.int64()))
        if times.null_count
        else pa.ListArray.from_arrays(offsets, times.cast(pa.int64())),
    }
    columns = [lists[name] if name in lists else first.column(name) for name in schema.names]
    return pa.table(columns, names=schema.names).cast(schema)


def _count(statistics: ShardStatistics, block: pa.Table, rows: pa.Table, *, all_targets: bool) -> None:
    parts = {name: rows.column(f"num_{name}").to_numpy() for name in ("train", "valid", "test")}
    lengths = sum(parts.values())
    assert lengths.sum() == len(block), "the parts of a user do not add up to its events"
    place = np.arange(len(block)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    in_train = place < np.repeat(parts["train"], lengths)
    statistics.item_train_counts += np.bincount(
        block.column("item_id").to_numpy()[in_train], minlength=len(statistics.item_train_counts)
    )
    statistics.num_users += len(rows)
    statistics.lengths.update(
        dict(zip(*(part.tolist() for part in np.unique(lengths, return_counts=True)), strict=True))
    )
    for name, counts in parts.items():
        statistics.num_events[name] += int(counts.sum())
    is_tied = _is_tied(block)
    statistics.num_tied_events += int(is_tied.sum())
    starts = np.cumsum(lengths) - lengths
    for name in statistics.num_targets:
        first, count = target_spans(parts["train"], parts["valid"], parts["test"], name, all_targets=all_targets)
        statistics.num_users_with_target[name] += int((count > 0).sum())
        statistics.num_targets[name] += int(count.sum())
        statistics.num_tied_targets[name] += int(is_tied[_places(starts + first, count)].sum())


def _is_tied(block: pa.Table) -> np.ndarray:
    """Which events share user and second with the event before or after."""
    is_tied = np.zeros(len(block), dtype=bool)
    times = block.column("timestamp_s")
    if not times.null_count:
        equals_next = (np.diff(block.column("user_id").to_numpy()) == 0) & (np.diff(times.to_numpy()) == 0)
        is_tied[1:] |= equals_next
        is_tied[:-1] |= equals_next
    return is_tied


def _read_shard(path: Path | UPath, manifest: Manifest, timestamps: bool) -> dict[str, np.ndarray]:
    names = ["user_id", "item_ids", "num_train", "num_valid", "num_test"] + ["timestamps_s"] * timestamps
    table = read_table(path, names).combine_chunks()
    items = _only_chunk(table, "item_ids")
    shard = {name: table.column(name).to_numpy() for name in ("user_id", "num_train", "num_valid", "num_test")}
    shard["length"] = np.diff(items.offsets.to_numpy())
    shard["values"] = items.flatten().to_numpy()
    if timestamps:
        shard["timestamps_s"] = _only_chunk(table, "timestamps_s").flatten().to_numpy(zero_copy_only=False)
    if (shard["num_train"] + shard["num_valid"] + shard["num_test"] != shard["length"]).any():
        raise ValueError(_damaged(path, "has a user whose train, valid and test events do not add up to the sequence"))
    if shard["values"].size and not 0 <= shard["values"].min() <= shard["values"].max() < manifest.num_items:
        worst = shard["values"].max() if shard["values"].min() >= 0 else shard["values"].min()
        raise ValueError(_damaged(path, f"has item id {worst} but the vocabulary has {manifest.num_items} items"))
    return shard


def read_table(path: Path | UPath, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a Parquet file, wherever it is. Raises ValueError, which names it."""
    try:
        return pq.read_table(parquet_of(path), columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_damaged(path, f"cannot be read as Parquet: {error}")) from None


def _only_chunk(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks else pa.array([], type=column.type)


def _scatter(rows: np.ndarray, values: np.ndarray, num_rows: int) -> np.ndarray:
    out = np.zeros(num_rows, dtype=values.dtype)
    out[rows] = values
    return out


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``[start, start + length)`` of every user, concatenated."""
    firsts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - firsts, lengths)


def _damaged(path: Path | UPath, fault: str) -> str:
    return f"{path} {fault}; run python -m pipeline.data CONFIG again"
