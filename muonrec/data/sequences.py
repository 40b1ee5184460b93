"""Turn events into ordered, split sequences, in plain SQL that DuckDB and Spark both run."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
from upath import UPath

from muonrec.config import Config, name_only
from muonrec.data.engines import ENGINES, EngineName
from muonrec.data.manifest import ITEMS, USERS
from muonrec.data.places import parquet_of

logger = logging.getLogger(__name__)

_STREAM_ROWS = 2**20
_STREAM_TEXTS = 2**13
_INSERT_BYTES = 64 * 2**20

# The relational part, all of it: common table expressions, joins, GROUP BY, window functions and md5, of which every
# engine gets the same text. Braces are filled with integers of our own only.
# Ids become integer codes at once; every later step compares numbers. ORDER BY compares the bytes of UTF-8.
_SQL_CODES = """
CREATE TABLE {kind}_codes AS
WITH seen AS (SELECT DISTINCT {kind}_id AS raw_id FROM source_events)
SELECT ROW_NUMBER() OVER (ORDER BY raw_id) - 1 AS code, raw_id FROM seen
"""

# Events without a time are told apart by their place in the source: an item met twice is no duplicate there. A place
# stands as a negative time, since readers refuse times before 1970, and codes are as narrow as their number allows: the
# groups of 100 M events then need two thirds of the memory.
_SQL_DISTINCT = """
CREATE TABLE events AS
WITH coded AS (
    SELECT CAST(u.code AS {user_type}) AS user_code, CAST(i.code AS {item_type}) AS item_code,
           COALESCE(e.timestamp_s, -1 - e.source_row) AS moment, e.source_row AS source_row
    FROM source_events e
    JOIN user_codes u ON u.raw_id = e.user_id
    JOIN item_codes i ON i.raw_id = e.item_id
), firsts AS (
    SELECT user_code, item_code, moment, MIN(source_row) AS source_row
    FROM coded GROUP BY user_code, item_code, moment
)
SELECT user_code, item_code, CASE WHEN moment >= 0 THEN moment END AS timestamp_s, source_row FROM firsts
"""

# What the next round would drop: at the fixed point nothing is copied.
_SQL_BELOW_CORE = """
WITH users_below AS (SELECT user_code FROM events GROUP BY user_code HAVING COUNT(*) < {k}),
     items_below AS (SELECT item_code FROM events GROUP BY item_code HAVING COUNT(*) < {k})
SELECT (SELECT COUNT(*) FROM users_below) + (SELECT COUNT(*) FROM items_below)
"""

_SQL_CORE_ROUND = """
CREATE TABLE events_kept AS
WITH users_kept AS (SELECT user_code FROM events GROUP BY user_code HAVING COUNT(*) >= {k}),
     items_kept AS (SELECT item_code FROM events GROUP BY item_code HAVING COUNT(*) >= {k})
SELECT e.user_code, e.item_code, e.timestamp_s, e.source_row
FROM events e
JOIN users_kept u ON u.user_code = e.user_code
JOIN items_kept i ON i.item_code = e.item_code
"""

# A repeat is decided by time, and by place in the source where there is no time: never by the order of ties.
_SQL_FIRST_MEETINGS = """
CREATE TABLE events_kept AS
WITH meetings AS (
    SELECT user_code, item_code, timestamp_s, source_row,
           ROW_NUMBER() OVER (PARTITION BY user_code, item_code ORDER BY timestamp_s, source_row) AS meeting
    FROM events
)
SELECT user_code, item_code, timestamp_s, source_row FROM meetings WHERE meeting = 1
"""

_SQL_UNTIED = """
CREATE TABLE events_kept AS
WITH shared AS (
    SELECT user_code, timestamp_s FROM events WHERE timestamp_s IS NOT NULL
    GROUP BY user_code, timestamp_s HAVING COUNT(*) > 1
)
SELECT e.user_code, e.item_code, e.timestamp_s, e.source_row
FROM events e
LEFT JOIN shared s ON s.user_code = e.user_code AND s.timestamp_s = e.timestamp_s
WHERE s.user_code IS NULL
"""

_SQL_COUNTS = """
SELECT COUNT(DISTINCT user_code) AS num_users, COUNT(DISTINCT item_code) AS num_items, COUNT(*) AS num_events
FROM events
"""

# Those that an ancestor knows keep their rows, with or without an event now; new ones follow.
_SQL_VOCABULARY = """
CREATE TABLE {kind}s AS
WITH kept AS (SELECT DISTINCT {kind}_code AS code FROM events)
SELECT k.{kind}_id AS {kind}_id, k.raw_id AS raw_id, c.code AS code
FROM known_{kind}s k
LEFT JOIN {kind}_codes c ON c.raw_id = k.raw_id
UNION ALL
SELECT {num_known} + ROW_NUMBER() OVER (ORDER BY c.code) - 1 AS {kind}_id, c.raw_id AS raw_id, c.code AS code
FROM {kind}_codes c
JOIN kept e ON e.code = c.code
LEFT JOIN known_{kind}s k ON k.raw_id = c.raw_id
WHERE k.raw_id IS NULL
"""

_SQL_TIME_RANGE = "SELECT MIN(timestamp_s), MAX(timestamp_s), COUNT(*) - COUNT(timestamp_s) FROM events"

# The time of the event at place n of the log in order of time; events of one second stay on one side.
_SQL_CUT = """
WITH seconds AS (SELECT timestamp_s, COUNT(*) AS num_events FROM events GROUP BY timestamp_s),
     running AS (SELECT timestamp_s, SUM(num_events) OVER (ORDER BY timestamp_s) AS num_until FROM seconds)
SELECT MIN(timestamp_s) FROM running WHERE num_until > {place}
"""

_SQL_LEAVE_ONE_OUT = """
CREATE TABLE parts AS
SELECT user_code,
       CASE WHEN COUNT(*) >= 3 THEN COUNT(*) - 2 ELSE COUNT(*) END AS num_train,
       CASE WHEN COUNT(*) >= 3 THEN 1 ELSE 0 END AS num_valid,
       CASE WHEN COUNT(*) >= 3 THEN 1 ELSE 0 END AS num_test
FROM events GROUP BY user_code
"""

_SQL_GLOBAL_TIME = """
CREATE TABLE parts AS
SELECT user_code,
       SUM(CASE WHEN timestamp_s < {valid_from_s} THEN 1 ELSE 0 END) AS num_train,
       SUM(CASE WHEN timestamp_s >= {valid_from_s} AND timestamp_s < {test_from_s} THEN 1 ELSE 0 END) AS num_valid,
       SUM(CASE WHEN timestamp_s >= {test_from_s} THEN 1 ELSE 0 END) AS num_test
FROM events GROUP BY user_code
"""

# Every event belongs to the part of the sample that it is, or that comes next: a user's first event is no sample.
_SQL_NUM_SAMPLES = "SELECT COUNT(*) - COUNT(DISTINCT user_code) FROM events"
_SQL_SAMPLES = """
CREATE TABLE samples AS
WITH placed AS (
    SELECT e.user_code AS user_code, e.timestamp_s AS timestamp_s, e.source_row AS source_row, {tie} AS tie
    FROM events e
    JOIN users u ON u.code = e.user_code
    JOIN items i ON i.code = e.item_code
)
SELECT user_code, timestamp_s, tie, source_row,
       CASE WHEN ROW_NUMBER() OVER (PARTITION BY user_code ORDER BY timestamp_s, tie, source_row) > 1
            THEN 1 ELSE 0 END AS is_sample
FROM placed
"""
# Second by second, then within each: one window over all events would be one task on one machine.
_SQL_RATIO = """
CREATE TABLE parts AS
WITH seconds AS (
    SELECT timestamp_s, SUM(is_sample) AS num_samples FROM samples GROUP BY timestamp_s
), starts AS (
    SELECT timestamp_s, COALESCE(SUM(num_samples) OVER (
               ORDER BY timestamp_s ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
           ), 0) AS num_samples_before
    FROM seconds
), counted AS (
    SELECT s.user_code AS user_code, b.num_samples_before + COALESCE(SUM(s.is_sample) OVER (
               PARTITION BY s.timestamp_s ORDER BY s.tie, s.source_row ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
           ), 0) AS num_samples_before
    FROM samples s
    JOIN starts b ON b.timestamp_s = s.timestamp_s
)
SELECT user_code,
       SUM(CASE WHEN num_samples_before < {valid_from} THEN 1 ELSE 0 END) AS num_train,
       SUM(CASE WHEN num_samples_before >= {valid_from} AND num_samples_before < {test_from} THEN 1 ELSE 0 END)
           AS num_valid,
       SUM(CASE WHEN num_samples_before >= {test_from} THEN 1 ELSE 0 END) AS num_test
FROM counted GROUP BY user_code
"""

_SQL_PART_SIZES = "SELECT SUM(num_train), SUM(num_valid), SUM(num_test) FROM parts"

# Shard and user are one number, as in muonrec.data.shards: what a sort of 100 M events carries counts.
# md5 and not an engine's own hash(), which changes with its version; raw ids and not codes, which change with the log.
_SQL_ORDERED = """
SELECT u.user_id AS user_id, i.item_id AS item_id, e.timestamp_s AS timestamp_s, e.source_row AS source_row,
       CAST(p.num_train AS INTEGER) AS num_train,
       CAST(p.num_valid AS INTEGER) AS num_valid,
       CAST(p.num_test AS INTEGER) AS num_test
FROM events e
JOIN users u ON u.code = e.user_code
JOIN items i ON i.code = e.item_code
JOIN parts p ON p.user_code = e.user_code
WHERE MOD(u.user_id, {num_shards}) >= {first_shard} AND MOD(u.user_id, {num_shards}) < {end_shard}
ORDER BY MOD(u.user_id, {num_shards}) * 1099511627776 + u.user_id, e.timestamp_s, {tie}, e.source_row
"""
# 48 bits of it: DuckDB keeps twelve characters within its rows, which a sort of 100 M events would else have to chase.
_SQL_TIE = {
    "shuffle": (
        "CASE WHEN e.timestamp_s IS NULL THEN '' "
        "ELSE SUBSTR(md5(CONCAT('{seed}', '/', u.raw_id, '/', i.raw_id, '/', e.source_row)), 1, 12) END"
    ),
    "file_order": "e.source_row",
    "drop": "e.source_row",  # none is left to break
}

_SQL_ROWS = "SELECT {kind}_id, raw_id FROM {kind}s ORDER BY {kind}_id"

# Only of items of the vocabulary: a file of metadata describes many more.
_SQL_METADATA = """
INSERT INTO metadata SELECT b.* FROM batch b JOIN items i ON i.raw_id = b.item_id
"""
# What an ancestor knew of items of which the source says nothing.
_SQL_ANCESTOR_METADATA = """
INSERT INTO metadata SELECT b.* FROM batch b LEFT JOIN metadata m ON m.item_id = b.item_id WHERE m.item_id IS NULL
"""
_SQL_DESCRIBED_ITEMS = """
WITH firsts AS (SELECT item_id, MIN(source_row) AS source_row FROM metadata GROUP BY item_id)
SELECT i.item_id AS item_id, i.raw_id AS raw_id, {columns}
FROM items i
LEFT JOIN firsts f ON f.item_id = i.raw_id
LEFT JOIN metadata m ON m.item_id = f.item_id AND m.source_row = f.source_row
ORDER BY i.item_id
"""


class LeaveOneOut(Config):
    """Last event of a user tests, the one before validates, the rest trains; users with fewer than 3 events only train.

    What it lets through: users live at different times, so the train part of one may be later than the target of
    another (item popularity leaks from the future). What it does not: no event of a user's own future.
    """

    name: Literal["leave_one_out"] = "leave_one_out"


class GlobalTimeSplit(Config):
    """Cut the log at two moments for all users: train before ``t1``, valid in ``[t1, t2)``, test from ``t2`` on.

    A user's target is the first event of the window; users whose sequence starts there have no history and no target.

    Leakage rules: nothing trained on is later than any target; the events of one second stay on one side; the history
    of a test target includes the user's valid events, which are known by then, but no model is fitted to them. Not
    hidden: the k-core and the vocabulary look at the whole log, as in the published protocols, so a user or item may
    be in only because of its later events.

    Attributes:
        valid, test: shares of the events, the latest for test; used where no moments are given.
        valid_from_s, test_from_s: the moments ``t1`` and ``t2`` themselves; both or none.
    """

    name: Literal["global_time"] = "global_time"
    valid: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.1
    test: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.1
    valid_from_s: int | None = None
    test_from_s: int | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> GlobalTimeSplit:
        if (self.valid_from_s is None) != (self.test_from_s is None):
            raise ValueError("one of valid_from_s and test_from_s is missing; give both, or neither to cut by share")
        if self.valid_from_s is not None and self.test_from_s is not None and self.valid_from_s >= self.test_from_s:
            raise ValueError(
                f"valid_from_s {self.valid_from_s} is not before test_from_s {self.test_from_s}; swap them"
            )
        _check_shares(self.valid, self.test)
        return self


class RatioSplit(Config):
    """Cut the samples of all users at two ratios: every (history, next event), in order of the next event's time.

    The protocol of MiniOneRec (2025), 8:1:1. A sample is any event but its user's first; its history is all that the
    user did before. So a user has many targets, in one part or several, and every one of them is evaluated.

    Leakage rules: nothing trained on comes after any target in the order of the whole log, and a history ends before
    its target. Unlike with ``global_time``, the cut may fall between events of one second, which ``ties`` then orders
    (``ties: drop`` removes only ties of one user). Also, later samples of a user have its earlier targets in their
    history, as events that are known by then; no model is fitted to them. Not hidden: k-core and vocabulary look at
    the whole log.

    Attributes:
        valid, test: shares of the samples, the latest for test.
    """

    name: Literal["ratio"] = "ratio"
    valid: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.1
    test: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.1

    @pydantic.model_validator(mode="after")
    def _check(self) -> RatioSplit:
        _check_shares(self.valid, self.test)
        return self


def _check_shares(valid: float, test: float) -> None:
    if valid + test >= 1:
        raise ValueError(f"valid {valid:g} + test {test:g} leave no event to train on; their sum is below 1")


Ties: TypeAlias = Literal["shuffle", "file_order", "drop"]

Split: TypeAlias = Annotated[
    LeaveOneOut | GlobalTimeSplit | RatioSplit,
    pydantic.Field(discriminator="name"),
    pydantic.BeforeValidator(name_only),
]


class EventStore:
    """The events of one log in an engine of `muonrec.data.engines`, which decides nothing of the result.

    Call `load`, `drop_duplicates`, `drop_repeats` and `drop_ties` where asked, `keep_core`, `build_vocabularies`,
    `load_metadata` where there is some, `split`, `ordered`, in this order. One store serves one run: its folder may be
    deleted after `close`.
    """

    def __init__(self, folder: Path, *, memory_limit: str = "4GiB", engine: EngineName = "duckdb") -> None:
        """Open an empty store.

        Args:
            folder: existing folder for tables and what is spilled; needs about the size of the log. Spark's workers
                must all see it.
            memory_limit: of the engine alone, such as ``4GiB``; of each of Spark's processes. A batch of the reader
                comes on top.
            engine: ``duckdb`` or ``spark``.
        """
        self._engine = ENGINES[engine](folder, memory_limit=memory_limit)

    def __enter__(self) -> EventStore:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if exception is not None and (message := self._engine.explain_error(exception)) is not None:
            raise ValueError(message) from exception

    def close(self) -> None:
        """Let go of the engine."""
        self._engine.close()

    def load(self, reader: pa.RecordBatchReader, *, on_events: Callable[[int], None] = lambda num_events: None) -> int:
        """Store all events of ``reader``; returns their number."""
        num_events = 0

        def counted() -> Iterator[pa.RecordBatch]:
            nonlocal num_events
            for batch in reader:
                yield batch
                num_events += len(batch)
                on_events(len(batch))

        self._engine.create("source_events", reader.schema, counted())
        return num_events

    def drop_duplicates(self) -> int:
        """Keep one of the events with the same user, item and time, the first in the source; returns how many went."""
        before = self._number("SELECT COUNT(*) FROM source_events")
        types = {}
        for kind in ("user", "item"):
            self._engine.execute(_SQL_CODES.format(kind=kind))
            is_narrow = self._number(f"SELECT COUNT(*) FROM {kind}_codes") < 2**31
            types[f"{kind}_type"] = "INTEGER" if is_narrow else "BIGINT"
        self._engine.execute(_SQL_DISTINCT.format(**types))
        self._engine.execute("DROP TABLE source_events")
        return before - self._number("SELECT COUNT(*) FROM events")

    def drop_repeats(self) -> int:
        """Keep the first event of each user with each item; returns how many went."""
        return self._keep(_SQL_FIRST_MEETINGS)

    def drop_ties(self) -> int:
        """Drop every event whose place is unknown, which shares user and second with another; returns how many went.

        Raises:
            ValueError: nothing is left.
        """
        num_dropped = self._keep(_SQL_UNTIED)
        if not self._number("SELECT COUNT(*) FROM events"):
            raise ValueError(
                f"ties=drop leaves no event: all {num_dropped} share user and second with another; "
                "use data.ties=shuffle, or times of a finer resolution"
            )
        return num_dropped

    def keep_core(self, k: int) -> list[dict[str, int]]:
        """Drop users and items with fewer than ``k`` events until none is left (the k-core; Seidman, 1983).

        Args:
            k: 0 and 1 keep everything.

        Returns:
            ``num_users, num_items, num_events`` before the first round and after each.

        Raises:
            ValueError: nothing is left.
        """
        rounds = [self._counts()]
        while k > 1 and self._number(_SQL_BELOW_CORE.format(k=int(k))):
            self._keep(_SQL_CORE_ROUND.format(k=int(k)))
            rounds.append(counts := self._counts())
            logger.info(
                "k-core round %d: %s users, %s items, %s events",
                len(rounds) - 1,
                *(f"{counts[name]:,}" for name in ("num_users", "num_items", "num_events")),
            )
        if not rounds[-1]["num_events"]:
            history = "; ".join(
                f"round {number}: {kept['num_users']} users, {kept['num_items']} items, {kept['num_events']} events"
                for number, kept in enumerate(rounds)
            )
            raise ValueError(f"k_core={k} leaves no event ({history}); lower data.k_core or pass a denser log")
        return rounds

    def build_vocabularies(self, ancestor: Path | UPath | None = None) -> tuple[int, int]:
        """Number users and items from 0 in the order of their raw ids; returns how many there are of each.

        Args:
            ancestor: folder of an earlier data set, whose users and items all keep their numbers; new ones follow.
        """
        for kind, file in (("user", USERS), ("item", ITEMS)):
            schema = pa.schema([(f"{kind}_id", pa.int64()), ("raw_id", pa.string())])
            known = None if ancestor is None else pq.ParquetFile(parquet_of(ancestor / file))
            batches = [] if known is None else known.iter_batches(columns=schema.names)
            self._engine.create(f"known_{kind}s", schema, batches)
            num_known = self._number(f"SELECT COUNT(*) FROM known_{kind}s")
            self._engine.execute(_SQL_VOCABULARY.format(kind=kind, num_known=num_known))
        return self._number("SELECT COUNT(*) FROM users"), self._number("SELECT COUNT(*) FROM items")

    def load_metadata(
        self,
        reader: pa.RecordBatchReader,
        ancestor: Path | UPath | None = None,
        *,
        on_rows: Callable[[int], None] = lambda num_rows: None,
    ) -> tuple[int, int]:
        """Store what ``reader`` (`muonrec.data.items.ITEM_SCHEMA`) says of items of the vocabulary.

        Args:
            reader: the first row of an item stands.
            ancestor: folder of an earlier data set, whose metadata stands for items of which ``reader`` says nothing.
            on_rows: called with the number of rows read since the last call.

        Returns:
            Rows read, and rows of the vocabulary's items that came after another of the same item.
        """
        self._engine.execute_with(reader.schema.empty_table(), "CREATE TABLE metadata AS SELECT * FROM batch")
        num_rows = 0
        waiting: list[pa.RecordBatch] = []
        for batch in itertools.chain(reader, [None]):
            # Each statement looks at the whole vocabulary: few statements of many rows.
            if waiting and (batch is None or sum(part.nbytes for part in waiting) > _INSERT_BYTES):
                self._engine.execute_with(pa.Table.from_batches(waiting), _SQL_METADATA)
                waiting = []
            if batch is not None:
                waiting.append(batch)
                num_rows += len(batch)
                on_rows(len(batch))
        num_duplicates = self._number("SELECT COUNT(*) - COUNT(DISTINCT item_id) FROM metadata")
        earlier = None if ancestor is None else pq.ParquetFile(parquet_of(ancestor / ITEMS))
        if earlier is not None and set(reader.schema.names[1:-1]) <= set(earlier.schema_arrow.names):
            for batch in earlier.iter_batches(batch_size=_STREAM_TEXTS):
                known = batch.select(["raw_id", *reader.schema.names[1:-1], "item_id"])
                self._engine.execute_with(known.rename_columns(reader.schema.names), _SQL_ANCESTOR_METADATA)
        return num_rows, num_duplicates

    def time_range_s(self) -> tuple[int, int] | None:
        """First and last timestamp; None without times.

        Raises:
            ValueError: some events have a time and some have none.
        """
        first, last, num_without = self._row(_SQL_TIME_RANGE)
        if first is not None and num_without:
            raise ValueError(
                f"{num_without} events have no time and others have; give all a time or columns.timestamp_s: null"
            )
        return None if first is None else (int(first), int(last))

    def split(self, split: LeaveOneOut | GlobalTimeSplit | RatioSplit, *, ties: Ties, seed: int) -> dict[str, Any]:
        """Decide how many of each user's events, in order, belong to train, valid and test.

        Args:
            split: where to cut.
            ties, seed: as for `ordered`; ``ratio`` may cut between ties.

        Returns:
            The split as it was applied, with the moments of the cut for ``global_time``.

        Raises:
            ValueError: ``global_time`` or ``ratio`` on events without times, or a cut that leaves a part empty.
        """
        if isinstance(split, LeaveOneOut):
            self._engine.execute(_SQL_LEAVE_ONE_OUT)
            return split.model_dump()
        time_range_s = self.time_range_s()
        if time_range_s is None:
            raise ValueError(f"split {split.name} needs times and the source has none; use data.split=leave_one_out")
        if isinstance(split, RatioSplit):
            valid_from, test_from = _cuts(split, self._number(_SQL_NUM_SAMPLES))
            self._engine.execute(_SQL_SAMPLES.format(tie=_SQL_TIE[ties].format(seed=int(seed))))
            self._engine.execute(_SQL_RATIO.format(valid_from=valid_from, test_from=test_from))
            self._engine.execute("DROP TABLE samples")
            self._check_parts("ratio", time_range_s)
            return split.model_dump()
        valid_from_s, test_from_s = split.valid_from_s, split.test_from_s
        if valid_from_s is None or test_from_s is None:
            places = _cuts(split, self._number("SELECT COUNT(*) FROM events"))
            valid_from_s, test_from_s = (self._number(_SQL_CUT.format(place=place)) for place in places)
        self._engine.execute(_SQL_GLOBAL_TIME.format(valid_from_s=int(valid_from_s), test_from_s=int(test_from_s)))
        self._check_parts(f"global_time at {valid_from_s} and {test_from_s}", time_range_s)
        return {**split.model_dump(), "valid_from_s": valid_from_s, "test_from_s": test_from_s}

    def ordered(self, *, ties: Ties, seed: int, num_shards: int) -> pa.RecordBatchReader:
        """Stream the events by shard, user and time, each with the part counts of its user.

        Ties in time are never broken by item id, which can follow popularity and then flatters every metric.

        Args:
            ties: ``shuffle`` orders them by ``md5(seed, user, item, source_row)``, ``file_order`` by ``source_row``;
                events without times are always in file order. ``drop``: `drop_ties` has left none.
            seed: of the shuffle.
            num_shards: user ``u`` goes to shard ``u % num_shards``.
        """
        tie = _SQL_TIE[ties].format(seed=int(seed))
        # As many shards at a time as the engine sorts without spilling: to read all events again costs less.
        num_events = self._number("SELECT COUNT(*) FROM events")
        num_passes = min(num_shards, max(1, -(-num_events // self._engine.sort_rows)))
        edges = [num_shards * number // num_passes for number in range(num_passes + 1)]

        def passes() -> Iterator[pa.RecordBatchReader]:
            for first, end in itertools.pairwise(edges):
                sql = _SQL_ORDERED.format(num_shards=int(num_shards), first_shard=first, end_shard=end, tie=tie)
                yield self._engine.stream(sql, _STREAM_ROWS)

        readers = passes()
        reader = next(readers)
        batches = itertools.chain(reader, itertools.chain.from_iterable(readers))
        return pa.RecordBatchReader.from_batches(reader.schema, batches)

    def vocabulary(self, kind: Literal["user", "item"]) -> pa.RecordBatchReader:
        """Stream ``<kind>_id, raw_id`` in order of the id."""
        return self._engine.stream(_SQL_ROWS.format(kind=kind), _STREAM_ROWS)

    def described_items(self, columns: Sequence[str]) -> pa.RecordBatchReader:
        """Stream ``item_id, raw_id`` and ``columns`` of the metadata, null where there is none, in order of the id."""
        sql = _SQL_DESCRIBED_ITEMS.format(columns=", ".join(f"m.{name} AS {name}" for name in columns))
        return self._engine.stream(sql, _STREAM_TEXTS)

    def _keep(self, sql: str) -> int:
        """Replace ``events`` by the ``events_kept`` that ``sql`` creates; returns how many went."""
        before = self._number("SELECT COUNT(*) FROM events")
        self._engine.execute(sql)
        self._engine.execute("DROP TABLE events")
        self._engine.execute("ALTER TABLE events_kept RENAME TO events")
        return before - self._number("SELECT COUNT(*) FROM events")

    def _check_parts(self, cut: str, time_range_s: tuple[int, int]) -> None:
        sizes = dict(zip(("train", "valid", "test"), map(int, self._row(_SQL_PART_SIZES)), strict=True))
        if not all(sizes.values()):
            counts = ", ".join(f"{size} {name}" for name, size in sizes.items())
            raise ValueError(
                f"split {cut} gives {counts} events, one part is empty; "
                f"the log reaches from {time_range_s[0]} to {time_range_s[1]}: change data.split"
            )

    def _counts(self) -> dict[str, int]:
        return dict(zip(("num_users", "num_items", "num_events"), map(int, self._row(_SQL_COUNTS)), strict=True))

    def _row(self, sql: str) -> tuple[Any, ...]:
        (row,) = self._engine.fetch(sql)
        return row

    def _number(self, sql: str) -> int:
        return int(self._row(sql)[0])


def _cuts(split: GlobalTimeSplit | RatioSplit, count: int) -> tuple[int, int]:
    """Places among ``count`` where valid and test begin."""
    # Rounded before it is floored: (1 - 0.1 - 0.1) * 10 is 7.999...
    return int(round((1 - split.valid - split.test) * count, 6)), int(round((1 - split.test) * count, 6))
