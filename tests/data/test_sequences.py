"""Distinct, k-core, order and split in SQL equal plain Python loops, and never show the future."""

import hashlib
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonrec.data import engines
from muonrec.data.engines import DuckDB
from muonrec.data.events import EVENT_SCHEMA
from muonrec.data.sequences import EventStore, GlobalTimeSplit, LeaveOneOut, RatioSplit

Event = tuple[str, str, int | None, int]  # user, item, timestamp_s, source_row


def reader_of(events: list[Event]) -> pa.RecordBatchReader:
    columns = zip(*events, strict=True) if events else [[]] * 4
    arrays = [pa.array(list(column), type=field.type) for column, field in zip(columns, EVENT_SCHEMA, strict=True)]
    return pa.RecordBatchReader.from_batches(EVENT_SCHEMA, [pa.RecordBatch.from_arrays(arrays, schema=EVENT_SCHEMA)])


def run(
    events: list[Event],
    *,
    k_core: int = 0,
    split: LeaveOneOut | GlobalTimeSplit | RatioSplit = LeaveOneOut(),  # noqa: B008
    ties: str = "shuffle",
    repeats: str = "keep",
    seed: int = 0,
) -> dict[str, dict]:
    """By raw user id: ``items`` (raw, in order), ``times`` and the ``parts`` counts."""
    with tempfile.TemporaryDirectory() as folder, EventStore(Path(folder), memory_limit="512MiB") as store:
        store.load(reader_of(events))
        store.drop_duplicates()
        if repeats == "drop_later":
            store.drop_repeats()
        if ties == "drop":
            store.drop_ties()
        store.keep_core(k_core)
        store.build_vocabularies()
        store.split(split, ties=ties, seed=seed)
        table = store.ordered(ties=ties, seed=seed, num_shards=3).read_all()
        names = {
            kind: dict(zip(*(column.to_pylist() for column in store.vocabulary(kind).read_all().columns), strict=True))
            for kind in ("user", "item")
        }
    assert list(names["user"].values()) == sorted(names["user"].values())
    assert list(names["item"].values()) == sorted(names["item"].values())
    result: dict[str, dict] = defaultdict(lambda: {"items": [], "times": []})
    for row in table.to_pylist():
        user = result[names["user"][row["user_id"]]]
        user["items"].append(names["item"][row["item_id"]])
        user["times"].append(row["timestamp_s"])
        user["parts"] = (row["num_train"], row["num_valid"], row["num_test"])
    return dict(result)


def run_in_plain_python(
    events: list[Event], *, k_core: int, ties: str, seed: int, cuts: tuple[int, int] | None, repeats: str = "keep"
) -> dict[str, dict]:
    distinct: dict[tuple, Event] = {}
    for event in sorted(events, key=lambda event: event[3]):
        distinct.setdefault(event[:3] if event[2] is not None else event, event)
    kept = list(distinct.values())
    if repeats == "drop_later":
        first: dict[tuple, Event] = {}
        for event in sorted(kept, key=lambda event: (event[2] or 0, event[3])):
            first.setdefault(event[:2], event)
        kept = list(first.values())
    if ties == "drop":
        seconds = Counter((event[0], event[2]) for event in kept)
        kept = [event for event in kept if event[2] is None or seconds[event[0], event[2]] == 1]
    while True:
        users, items = Counter(event[0] for event in kept), Counter(event[1] for event in kept)
        left = [event for event in kept if users[event[0]] >= k_core and items[event[1]] >= k_core]
        if len(left) == len(kept):
            break
        kept = left

    def order(event: Event) -> tuple:
        user, item, time, row = event
        if time is None or ties != "shuffle":
            return (time or 0, "", row)
        return (time, hashlib.md5(f"{seed}/{user}/{item}/{row}".encode()).hexdigest(), row)

    result = {}
    for user in sorted({event[0] for event in kept}):
        mine = sorted((event for event in kept if event[0] == user), key=order)
        times = [event[2] for event in mine]
        if cuts is not None:
            parts = tuple(
                sum(low <= time < high for time in times) for low, high in [(0, cuts[0]), cuts, (cuts[1], 10**12)]
            )
        else:
            parts = (len(mine) - 2, 1, 1) if len(mine) >= 3 else (len(mine), 0, 0)
        result[user] = {"items": [event[1] for event in mine], "times": times, "parts": parts}
    return result


def random_log(seed: int, *, num_events: int = 400, num_seconds: int = 60, timed: bool = True) -> list[Event]:
    generator = np.random.default_rng(seed)
    users, items = generator.integers(30, size=num_events), generator.zipf(1.4, size=num_events) % 40
    times = generator.integers(1000, 1000 + num_seconds, size=num_events)
    return [
        (f"u{u}", f"i{i}", int(t) if timed else None, row)
        for row, (u, i, t) in enumerate(zip(users, items, times, strict=True))
    ]


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("ties", ["shuffle", "file_order", "drop"])
@pytest.mark.parametrize(("k_core", "repeats"), [(0, "keep"), (3, "drop_later"), (5, "keep")])
def test_order_and_leave_one_out_equal_a_plain_loop(timed: bool, ties: str, k_core: int, repeats: str) -> None:
    events = random_log(k_core, timed=timed, num_seconds=600)
    twin = run_in_plain_python(events, k_core=k_core, ties=ties, seed=7, cuts=None, repeats=repeats)
    assert run(events, k_core=k_core, ties=ties, seed=7, repeats=repeats) == twin


def test_global_time_equals_a_plain_loop() -> None:
    events = random_log(3)
    split = GlobalTimeSplit(valid_from_s=1030, test_from_s=1045)
    twin = run_in_plain_python(events, k_core=2, ties="shuffle", seed=0, cuts=(1030, 1045))
    assert run(events, k_core=2, split=split) == twin


def test_shares_cut_at_the_event_of_that_place_and_keep_a_second_together() -> None:
    times = [1, 2, 3, 4, 5, 6, 7, 7, 9, 10]
    events = [("u", f"i{row}", time, row) for row, time in enumerate(times)]
    # Places 7 (the second event at 7 s) and 9 (10 s): the cut moves to the start of its second.
    assert run(events, split=GlobalTimeSplit(valid=0.2, test=0.1))["u"]["parts"] == (6, 3, 1)


@settings(max_examples=10, deadline=None)
@given(
    times=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 50)), min_size=30, max_size=60),
    share=st.sampled_from([0.1, 0.2]),
)
def test_split_never_shows_the_future(times: list[tuple[int, int, int]], share: float) -> None:
    events = [(f"u{u}", f"i{i}", t, row) for row, (u, i, t) in enumerate(times)]
    # Enough before and after, at seconds of their own, that both cuts fall between different seconds.
    events += [("u0", f"early{row}", 0, 1000 + row) for row in range(40)]
    events += [(f"u{row % 3}", f"late{row}", 51 + row, 2000 + row) for row in range(30)]
    for user in run(events).values():
        assert user["times"] == sorted(user["times"])
    users = run(events, split=GlobalTimeSplit(valid=share, test=share)).values()
    edges = [[], [], []]
    for user in users:
        assert user["times"] == sorted(user["times"])
        assert sum(user["parts"]) == len(user["items"])
        first, second = user["parts"][0], user["parts"][0] + user["parts"][1]
        for edge, part in zip(
            edges, (user["times"][:first], user["times"][first:second], user["times"][second:]), strict=True
        ):
            edge.extend(part)
    assert max(edges[0]) < min(edges[1])
    assert max(edges[1]) < min(edges[2])


def test_users_with_fewer_than_three_events_only_train() -> None:
    events = [("a", "x", 1, 0), ("a", "y", 2, 1), ("b", "x", 1, 2), ("b", "y", 2, 3), ("b", "z", 3, 4)]
    users = run(events)
    assert users["a"]["parts"] == (2, 0, 0)
    assert users["b"]["parts"] == (1, 1, 1)


def test_exact_duplicates_are_kept_once_with_the_lowest_source_row() -> None:
    events = [("u", "x", 5, 9), ("u", "y", 5, 3), ("u", "x", 5, 1), ("u", "x", 6, 4)]
    assert run(events, ties="file_order")["u"]["items"] == ["x", "y", "x"]


def test_items_met_twice_without_times_are_no_duplicates() -> None:
    events = [("u", item, None, row) for row, item in enumerate(["x", "y", "x", "x"])]
    assert run(events)["u"]["items"] == ["x", "y", "x", "x"]


def test_ties_are_not_broken_by_item_id() -> None:
    # 400 users meet item "a" and item "b" in the same second. An order by id would always put one of them last; a fair
    # one does so for half of the users, under either naming: within four standard errors (40 of 400).
    def last_is_first_item(names: tuple[str, str]) -> int:
        events = [(f"u{user}", names[place], 100, 2 * user + place) for user in range(400) for place in (0, 1)]
        return sum(user["items"][-1] == names[0] for user in run(events).values())

    assert 160 < last_is_first_item(("a", "b")) < 240
    assert 160 < last_is_first_item(("b", "a")) < 240


def test_file_order_survives_relabeling_of_the_items() -> None:
    events = random_log(5, num_seconds=4)
    names = {f"i{number}": f"i{(number * 17 + 3) % 41}" for number in range(41)}
    renamed = [(user, names[item], time, row) for user, item, time, row in events]
    before, after = run(events, ties="file_order"), run(renamed, ties="file_order")
    assert {user: [names[item] for item in found["items"]] for user, found in before.items()} == {
        user: found["items"] for user, found in after.items()
    }


def test_sorting_in_passes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    events = random_log(8, num_seconds=20)
    whole = run(events, k_core=2)
    asked = []
    stream = DuckDB.stream
    monkeypatch.setattr(DuckDB, "stream", lambda self, sql, rows: asked.append(sql) or stream(self, sql, rows))
    monkeypatch.setattr(engines, "_SORTED_ROW_BYTES", 512 * 2**20 // 150)  # 150 of some 370 events
    assert run(events, k_core=2) == whole
    assert sum("num_train" in sql for sql in asked) == 3


def test_the_seed_moves_ties_and_nothing_else() -> None:
    events = random_log(6, num_seconds=3)
    one, again, other = run(events, seed=1), run(events, seed=1), run(events, seed=2)
    assert one == again != other
    assert {user: found["times"] for user, found in one.items()} == {
        user: found["times"] for user, found in other.items()
    }


def test_the_time_range_spans_all_events(tmp_path: Path) -> None:
    with EventStore(tmp_path) as store:
        store.load(reader_of([("a", "x", 5, 0), ("a", "y", 5, 1), ("a", "z", 6, 2), ("b", "x", 5, 3)]))
        store.drop_duplicates()
        assert store.time_range_s() == (5, 6)


def test_a_core_without_events_is_refused_with_its_rounds(tmp_path: Path) -> None:
    with EventStore(tmp_path) as store:
        store.load(reader_of([("a", "x", 1, 0), ("a", "y", 2, 1), ("b", "x", 3, 2)]))
        store.drop_duplicates()
        with pytest.raises(ValueError) as error:
            store.keep_core(2)
    # User a keeps x alone once y is gone, so the second round empties the log.
    assert str(error.value) == (
        "k_core=2 leaves no event (round 0: 2 users, 2 items, 3 events; round 1: 1 users, 1 items, 1 events; "
        "round 2: 0 users, 0 items, 0 events); lower data.k_core or pass a denser log"
    )


def test_global_time_without_times_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"split global_time needs times and the source has none; use data.split=leave_one_out"
    ):
        run(random_log(0, timed=False), split=GlobalTimeSplit())


def test_a_cut_that_leaves_a_part_empty_is_refused_with_the_counts() -> None:
    with pytest.raises(
        ValueError, match=r"at 1 and 2000 gives 0 train, \d+ valid, 0 test events.*from 1000 to 1059: change"
    ):
        run(random_log(0), split=GlobalTimeSplit(valid_from_s=1, test_from_s=2000))


def test_events_with_and_without_time_do_not_mix(tmp_path: Path) -> None:
    with EventStore(tmp_path) as store:
        store.load(reader_of([("a", "x", 5, 0), ("a", "y", None, 1)]))
        store.drop_duplicates()
        with pytest.raises(ValueError, match="1 events have no time and others have"):
            store.time_range_s()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"valid_from_s": 5}, "one of valid_from_s and test_from_s is missing"),
        ({"valid_from_s": 5, "test_from_s": 5}, "valid_from_s 5 is not before test_from_s 5"),
        ({"valid": 0.5, "test": 0.5}, "valid 0.5 \\+ test 0.5 leave no event to train on"),
    ],
)
def test_impossible_cuts_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalTimeSplit(**settings)


def test_a_small_memory_limit_gives_the_same_order() -> None:
    events = random_log(8, num_events=5000)
    with tempfile.TemporaryDirectory() as folder, EventStore(Path(folder), memory_limit="64MiB") as store:
        store.load(reader_of(events))
        store.drop_duplicates()
        store.keep_core(5)
        store.build_vocabularies()
        store.split(LeaveOneOut(), ties="shuffle", seed=0)
        num_events = len(store.ordered(ties="shuffle", seed=0, num_shards=3).read_all())
    assert num_events == sum(len(user["items"]) for user in run(events, k_core=5).values())


def samples_cut_in_plain_python(
    events: list[Event], *, ties: str, seed: int, shares: tuple[float, float]
) -> tuple[list[tuple], list[tuple], list[tuple]]:
    """Every (user, history, next item) as a tuple, in order of the next event's time, cut at the ratio."""
    users = run_in_plain_python(events, k_core=0, ties=ties, seed=seed, cuts=None)
    keys = {}
    for user, item, time, row in events:
        key = (time, hashlib.md5(f"{seed}/{user}/{item}/{row}".encode()).hexdigest() if ties == "shuffle" else "", row)
        keys[user, item, time] = min(keys.get((user, item, time), key), key, key=lambda key: key[2])
    samples = [
        (keys[user, found["items"][place], found["times"][place]], (user, *found["items"][: place + 1]))
        for user, found in users.items()
        for place in range(1, len(found["items"]))
    ]
    ordered = [sample for _, sample in sorted(samples)]
    first = int(round((1 - sum(shares)) * len(ordered), 6))
    second = int(round((1 - shares[1]) * len(ordered), 6))
    return ordered[:first], ordered[first:second], ordered[second:]


def samples_of(users: dict[str, dict]) -> tuple[list[tuple], list[tuple], list[tuple]]:
    """The samples of each part as the counts of the split tell them: every event of the part that has a history."""
    parts: tuple[list[tuple], list[tuple], list[tuple]] = ([], [], [])
    for user, found in users.items():
        place = 0
        for part, count in zip(parts, found["parts"], strict=True):
            part.extend((user, *found["items"][: at + 1]) for at in range(max(place, 1), place + count))
            place += count
    return parts


@pytest.mark.parametrize("ties", ["shuffle", "file_order"])
@pytest.mark.parametrize("num_seconds", [5, 60, 5000])
def test_ratio_equals_cutting_the_list_of_all_samples(ties: str, num_seconds: int) -> None:
    events = random_log(11, num_seconds=num_seconds)
    found = samples_of(run(events, split=RatioSplit(), ties=ties, seed=3))
    twin = samples_cut_in_plain_python(events, ties=ties, seed=3, shares=(0.1, 0.1))
    assert [sorted(part) for part in found] == [sorted(part) for part in twin]
    sizes = [len(part) for part in found]
    assert sizes == [len(part) for part in twin] and sizes[0] > 7 * sizes[1] > 0


@settings(max_examples=15, deadline=None)
@given(
    log=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 50)), min_size=40, max_size=70),
    shares=st.sampled_from([(0.1, 0.1), (0.2, 0.1), (0.05, 0.3)]),
    ties=st.sampled_from(["shuffle", "file_order"]),
)
def test_ratio_never_shows_the_future(log: list[tuple[int, int, int]], shares: tuple[float, float], ties: str) -> None:
    events = [(f"u{u}", f"i{i}", t, row) for row, (u, i, t) in enumerate(log)]
    events += [("u0", f"early{row}", 0, 1000 + row) for row in range(30)]  # enough that no part is empty
    events += [(f"u{row % 3}", f"late{row}", 50 + row, 2000 + row) for row in range(30)]
    split = RatioSplit(valid=shares[0], test=shares[1])
    times: tuple[list[int], list[int], list[int]] = ([], [], [])
    for user in run(events, split=split, ties=ties).values():
        assert user["times"] == sorted(user["times"]), "a history is older than its target"
        assert sum(user["parts"]) == len(user["items"])
        ends = np.cumsum(user["parts"])
        for part, start, end in zip(times, [0, *ends[:-1]], ends, strict=True):
            part.extend(user["times"][start:end])
    # Seconds may be shared by the parts at a cut, and no more.
    assert max(times[0]) <= min(times[1]) and max(times[1]) <= min(times[2])


def test_ratio_of_ten_samples_is_eight_one_one() -> None:
    events = [(f"u{row % 2}", f"i{row}", row, row) for row in range(12)]
    users = run(events, split=RatioSplit())
    # 12 events of 2 users are 10 samples; the last is u1's, the one before u0's.
    assert [users[user]["parts"] for user in ("u0", "u1")] == [(5, 1, 0), (5, 0, 1)]


def test_a_user_that_comes_late_has_no_event_in_training() -> None:
    events = [("old", f"i{row}", row, row) for row in range(20)] + [
        ("new", f"i{row}", 30 + row, 40 + row) for row in range(3)
    ]
    users = run(events, split=RatioSplit(valid=0.1, test=0.1))
    # 21 samples: 16 train, 2 valid, 3 test. A first event is no sample and goes with the sample that comes next.
    assert users["new"]["parts"] == (0, 0, 3)
    assert users["old"]["parts"] == (17, 2, 1)


def test_ratio_without_times_is_refused() -> None:
    with pytest.raises(ValueError, match="split ratio needs times and the source has none"):
        run(random_log(0, timed=False), split=RatioSplit())


def test_a_ratio_that_leaves_a_part_empty_is_refused_with_the_counts() -> None:
    with pytest.raises(ValueError, match="split ratio gives 3 train, 0 valid, 1 test events, one part is empty"):
        run([("u", f"i{row}", row, row) for row in range(4)], split=RatioSplit())


def test_dropping_repeats_keeps_the_first_event_with_each_item() -> None:
    events = [("u", "x", 5, 0), ("u", "y", 6, 1), ("u", "x", 7, 2), ("v", "x", 9, 3), ("u", "x", 3, 4)]
    found = run(events, repeats="drop_later")
    assert (found["u"]["items"], found["u"]["times"]) == (["x", "y"], [3, 6])
    assert found["v"]["items"] == ["x"]
    assert run(events)["u"]["items"] == ["x", "x", "y", "x"]


def test_repeats_without_times_are_dropped_in_file_order() -> None:
    events = [("u", item, None, row) for row, item in enumerate("xyxzy")]
    assert run(events, repeats="drop_later")["u"]["items"] == ["x", "y", "z"]


def test_dropping_ties_leaves_events_whose_place_is_known() -> None:
    events = [("u", "x", 5, 0), ("u", "y", 5, 1), ("u", "z", 6, 2), ("v", "x", 5, 3)]
    found = run(events, ties="drop")
    assert found["u"]["items"] == ["z"] and found["v"]["items"] == ["x"]


@settings(max_examples=10, deadline=None)
@given(log=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 30)), min_size=10, max_size=40))
def test_with_ties_dropped_neither_seed_nor_file_order_moves_anything(log: list[tuple[int, int, int]]) -> None:
    events = [(f"u{u}", f"i{i}", t, row) for row, (u, i, t) in enumerate(log)] + [("u0", "last", 99, 99)]
    reversed_file = [(*event[:3], 100 - event[3]) for event in events]
    assert run(events, ties="drop", seed=1) == run(reversed_file, ties="drop", seed=2)


def test_a_log_of_ties_only_cannot_drop_them() -> None:
    with pytest.raises(ValueError, match="ties=drop leaves no event: all 2 share user and second with another; use"):
        run([("u", "x", 5, 0), ("u", "y", 5, 1)], ties="drop")
