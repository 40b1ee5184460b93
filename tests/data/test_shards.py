"""Shards and manifest: what is written is read back, damage is named, a folder is replaced whole or not at all."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muonrec.data.manifest import ITEMS, MANIFEST, Manifest, read_manifest, verify_dataset
from muonrec.data.replacement import put_right, replaced_folder
from muonrec.data.shards import ShardStatistics, load_sequences, shard_name, target_spans, write_shards
from pipeline.data import DataConfig, build_dataset
from tests.made_up import made_up_sequences

LOG = {  # by user: (item, second); the file is written in another order
    "ann": [("x", 1), ("y", 2), ("z", 3), ("x", 4)],
    "bob": [("y", 1), ("z", 5)],
    "cid": [("z", 2), ("x", 3), ("w", 9)],
}


def build(tmp_path: Path, **settings: object) -> Path:
    rows = [f"{user},{item},{second}" for user, events in LOG.items() for item, second in events]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp_s", *rows[::-1]]) + "\n")
    source = {"format": "csv", "path": str(tmp_path / "log.csv")}
    config = {"source": source, "output": tmp_path / "data", "num_shards": 2, "memory_limit": "256MiB", **settings}
    build_dataset(DataConfig.model_validate(config))
    return tmp_path / "data"


def test_tied_events_are_counted_within_a_user_only(tmp_path: Path) -> None:
    rows = ["user_id,item_id,timestamp_s", "a,x,5", "a,y,5", "a,z,6", "b,x,5"]
    (tmp_path / "ties.csv").write_text("\n".join(rows) + "\n")
    data = build(tmp_path, source={"format": "csv", "path": str(tmp_path / "ties.csv")})
    assert read_manifest(data).tied_event_share == 2 / 4


def test_loaded_sequences_are_what_was_logged(tmp_path: Path) -> None:
    sequences = load_sequences(build(tmp_path), verify_hashes=True, timestamps=True)
    # w, x, y, z are items 0 to 3; ann, bob, cid are users 0 to 2, in shards 0, 1, 0.
    assert sequences.values.tolist() == [1, 2, 3, 1, 2, 3, 3, 1, 0]
    assert sequences.values.dtype == np.int32
    assert sequences.timestamps_s.tolist() == [1, 2, 3, 4, 1, 5, 2, 3, 9]
    assert sequences.offsets.tolist() == [0, 4, 6, 9]
    assert sequences.num_train.tolist() == [2, 2, 1]
    assert sequences.num_valid.tolist() == [1, 0, 1]
    assert sequences.num_test.tolist() == [1, 0, 1]
    assert sequences.user_ids.tolist() == [0, 1, 2]
    assert sequences.num_items == 4
    assert sequences.item_train_counts.tolist() == [0, 1, 2, 2]
    assert {array.dtype for array in (sequences.offsets, sequences.user_ids, sequences.item_train_counts)} == {
        np.dtype("int64")
    }


def test_manifest_counts_the_data_set(tmp_path: Path) -> None:
    manifest = read_manifest(build(tmp_path))
    assert (manifest.num_users, manifest.num_items, manifest.num_events) == (3, 4, 9)
    assert manifest.num_events_per_part.model_dump() == {"train": 5, "valid": 2, "test": 2}
    assert manifest.num_users_with_target.model_dump() == {"valid": 2, "test": 2}
    assert manifest.num_items_unseen_in_training == 1
    assert manifest.time_range_s == (1, 9)
    assert manifest.tied_event_share == 0.0
    assert manifest.history_length_quantiles == {"min": 2, "p25": 2, "p50": 3, "p75": 4, "p90": 4, "p99": 4, "max": 4}
    assert set(manifest.files) == {ITEMS, "users.parquet", shard_name(0, 2), shard_name(1, 2)}
    assert manifest.best_possible is None


def test_shards_hold_their_users_in_order(tmp_path: Path) -> None:
    folder = build(tmp_path)
    schema = pq.read_schema(folder / shard_name(0, 2))
    assert schema.names == ["user_id", "item_ids", "timestamps_s", "num_train", "num_valid", "num_test"]
    assert schema.field("item_ids").type.value_type == pa.int32()
    assert pq.read_table(folder / shard_name(0, 2)).column("user_id").to_pylist() == [0, 2]
    assert pq.read_table(folder / shard_name(1, 2)).column("user_id").to_pylist() == [1]
    assert pq.read_table(folder / ITEMS).to_pylist()[1] == {"item_id": 1, "raw_id": "x", "num_train_events": 1}
    assert pq.read_table(folder / "users.parquet").column("raw_id").to_pylist() == ["ann", "bob", "cid"]


def test_number_of_shards_does_not_change_what_is_loaded(tmp_path: Path) -> None:
    loaded = [load_sequences(build(tmp_path, num_shards=num_shards)) for num_shards in (1, 2, 5)]
    for other in loaded[1:]:
        for name in ("values", "offsets", "num_train", "num_valid", "num_test", "item_train_counts"):
            np.testing.assert_array_equal(getattr(loaded[0], name), getattr(other, name))
    assert pq.read_table(tmp_path / "data" / shard_name(4, 5)).num_rows == 0, "a shard without users exists"


def test_shards_of_a_batched_stream_equal_those_of_one_batch(tmp_path: Path) -> None:
    users = np.repeat([0, 2, 4, 1, 3], [3, 1, 4, 2, 5])
    counts = np.bincount(users)
    table = pa.table(
        {
            "user_id": users,
            "item_id": np.arange(15) % 7,
            "timestamp_s": pa.nulls(15, pa.int64()),
            "source_row": np.arange(15),
            "num_train": counts[users].astype(np.int32),
            "num_valid": np.zeros(15, np.int32),
            "num_test": np.zeros(15, np.int32),
        }
    )
    for size in (1, 4, 15):
        (tmp_path / str(size)).mkdir()
        reader = pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=size))
        statistics = write_shards(reader, tmp_path / str(size), num_shards=2, num_items=7)
        assert (statistics.num_users, statistics.num_events["train"]) == (5, 15)
    for shard in range(2):
        contents = {(tmp_path / str(size) / shard_name(shard, 2)).read_bytes() for size in (1, 4, 15)}
        assert len(contents) == 1
    assert pq.read_table(tmp_path / "4" / shard_name(1, 2)).column("item_ids").to_pylist() == [[1, 2], [3, 4, 5, 6, 0]]


@pytest.mark.parametrize(("users", "rows"), [([1, 0, 0], [0, 1, 2]), ([2, 0, 1], [0, 1, 2]), ([0, 0, 1], [1, 0, 2])])
def test_a_stream_out_of_order_is_refused(tmp_path: Path, users: list[int], rows: list[int]) -> None:
    table = pa.table(
        {
            "user_id": users,
            "item_id": [0, 0, 0],
            "timestamp_s": pa.nulls(3, pa.int64()),
            "source_row": rows,
            "num_train": pa.array([users.count(user) for user in users], pa.int32()),
            **dict.fromkeys(("num_valid", "num_test"), pa.array([0, 0, 0], pa.int32())),
        }
    )
    reader = pa.RecordBatchReader.from_batches(table.schema, table.to_batches())
    with pytest.raises(RuntimeError, match="the engine returned events out of order"):
        write_shards(reader, tmp_path, num_shards=2, num_items=1)


def test_a_target_is_the_first_event_of_its_part_after_some_history() -> None:
    num_train, num_valid, num_test = np.array([[2, 0, 0, 3], [1, 2, 0, 0], [1, 1, 2, 0]], dtype=np.int32)
    sequences = dataclasses.replace(
        made_up_sequences(num_users=4), num_train=num_train, num_valid=num_valid, num_test=num_test
    )
    assert sequences.targets("valid").tolist() == [2, -1, -1, -1]
    assert sequences.targets("test").tolist() == [3, 2, -1, -1]
    with pytest.raises(ValueError, match="part 'train' has no evaluation targets; ask for 'valid' or 'test'"):
        target_spans(num_train, num_valid, num_test, "train", all_targets=False)


def test_all_targets_are_the_events_of_the_part_after_some_history() -> None:
    num_train, num_valid, num_test = np.array([[2, 0, 0, 3, 0], [1, 3, 0, 0, 1], [1, 1, 2, 0, 1]], dtype=np.int32)
    lengths = num_train + num_valid + num_test
    sequences = dataclasses.replace(
        made_up_sequences(num_users=5), num_train=num_train, num_valid=num_valid, num_test=num_test,
        offsets=np.concatenate([[0], np.cumsum(lengths)]), all_targets=True,
    )  # fmt: skip
    for part, expected in {
        "valid": [(0, 2), (1, 1), (1, 2)],
        "test": [(0, 3), (1, 3), (2, 1), (4, 1)],
    }.items():
        ids = sequences.target_ids(part)
        rows, places = sequences.locate(ids, part)
        assert list(zip(rows.tolist(), places.tolist(), strict=True)) == expected
        assert ids.tolist() == [int(sequences.offsets[row]) + place for row, place in expected]


def test_targets_of_a_data_set_are_counted_in_its_manifest(tmp_path: Path) -> None:
    sequences = load_sequences(build(tmp_path))
    assert sequences.targets("test").tolist() == [3, -1, 2]
    assert (sequences.targets("valid") >= 0).sum() == sequences.manifest.num_users_with_target.valid


def test_length_quantiles_equal_numpy() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, size=501)
    statistics = ShardStatistics(np.zeros(1, np.int64))
    statistics.lengths.update(lengths.tolist())
    for name, share in (("p25", 0.25), ("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        assert statistics.length_quantiles()[name] == np.quantile(lengths, share, method="inverted_cdf")


def test_a_folder_without_manifest_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is not a data set: it has no manifest.json; run python -m pipeline.data CONFIG"
    ):
        load_sequences(tmp_path)
    with pytest.raises(ValueError, match=r"is not a data set: it does not exist"):
        read_manifest(tmp_path / "nothing")


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path)
    tree = json.loads((folder / MANIFEST).read_text())
    for text, message in [
        ("{", "is damaged"),
        (json.dumps({**tree, "schema_version": 99}), "has schema version 99, this muonrec reads 2"),
        (json.dumps({**tree, "num_items": "many"}), "is damaged at num_items"),
        ("[]", "has schema version None"),
    ]:
        (folder / MANIFEST).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_manifest(folder)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = build(tmp_path)
    path = folder / shard_name(1, 2)
    content = path.read_bytes()

    path.write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match=rf"{path.name} has {len(content) - 1} bytes but the manifest says {len(content)}"
    ):
        load_sequences(folder)
    path.write_bytes(b"\0" * len(content))
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read as Parquet"):
        load_sequences(folder)
    path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(ValueError, match=rf"{path.name} has sha256 .* but the manifest says"):
        verify_dataset(folder, verify_hashes=True)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is missing though the manifest lists it"):
        load_sequences(folder)


def rewrite(folder: Path, name: str, table: pa.Table) -> None:
    """Replace a file and let the manifest agree with its size."""
    pq.write_table(table, folder / name)
    tree = json.loads((folder / MANIFEST).read_text())
    tree["files"][name]["num_bytes"] = (folder / name).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("item_ids", [[1, 2, 3, 4], [3, 1, 0]], "has item id 4 but the vocabulary has 4 items"),
        ("item_ids", [[1, 2, -3, 1], [3, 1, 0]], "has item id -3 but the vocabulary has 4 items"),
        ("num_train", [2, 2], "train, valid and test events do not add up"),
        ("user_id", [0, 1], "its shards do not hold users 0 .. 2 once each"),
    ],
)
def test_inconsistent_shards_are_refused(tmp_path: Path, column: str, values: list, message: str) -> None:
    folder = build(tmp_path)
    table = pq.read_table(folder / shard_name(0, 2))
    index = table.schema.get_field_index(column)
    rewrite(folder, shard_name(0, 2), table.set_column(index, column, pa.array(values, table.schema.field(index).type)))
    with pytest.raises(ValueError, match=message):
        load_sequences(folder)


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path)
    rewrite(folder, ITEMS, pq.read_table(folder / ITEMS).slice(1))
    with pytest.raises(ValueError, match="has 3 items but the manifest counts 4"):
        load_sequences(folder)


def test_a_failed_replacement_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    folder = build(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder) as partial:
        (partial / "shard").write_text("half")
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "log.csv"]


def killed_while_replacing(folder: Path, *, at_rename: int) -> None:
    """Replace ``folder`` in a process of its own, which is killed in place of the given rename."""
    script = (
        "import os, pathlib, shutil, signal, sys\n"
        "from muonrec.data.replacement import replaced_folder\n"
        "rename, calls = os.rename, []\n"
        "def killing(*paths):\n"
        "    calls.append(paths)\n"
        "    if len(calls) == int(sys.argv[2]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    rename(*paths)\n"
        "os.rename = killing\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with replaced_folder(folder) as partial:\n"
        "    for path in folder.iterdir():\n"
        "        shutil.copy(path, partial)\n"
        "    (partial / 'new').touch()\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(folder), str(at_rename)], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()


def test_a_data_set_killed_between_the_renames_is_put_right(tmp_path: Path) -> None:
    folder = build(tmp_path)
    killed_while_replacing(folder, at_rename=2)
    assert not folder.exists()
    put_right(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "log.csv"]
    assert (folder / "new").exists(), "the new data set was complete"
    load_sequences(folder, verify_hashes=True)


def test_the_data_set_before_comes_back_if_the_new_one_was_incomplete(tmp_path: Path) -> None:
    folder = build(tmp_path)
    killed_while_replacing(folder, at_rename=2)
    (partial,) = tmp_path.glob(".data.partial-*")
    (partial / MANIFEST).unlink()
    put_right(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "log.csv"]
    assert not (folder / "new").exists()
    load_sequences(folder, verify_hashes=True)


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    folder = build(tmp_path)
    killed_while_replacing(folder, at_rename=1)
    foreign = tmp_path / ".data.partial-another.host-1a2b"
    foreign.mkdir()
    with replaced_folder(folder) as alive:
        put_right(folder)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, foreign.name, "data", "log.csv"])
        (alive / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_other_peoples_files_are_never_replaced(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / "notes.md").write_text("mine")
    with (
        pytest.raises(ValueError, match=r"holds notes\.md, which no manifest of a data set lists; pass another folder"),
        replaced_folder(folder),
    ):
        raise AssertionError("not reached")
    with (
        pytest.raises(ValueError, match=r"log\.csv is a file; pass a folder as data.output"),
        replaced_folder(tmp_path / "log.csv"),
    ):
        raise AssertionError("not reached")


def test_manifest_survives_its_own_json(tmp_path: Path) -> None:
    manifest = read_manifest(build(tmp_path))
    assert Manifest.model_validate(json.loads(manifest.model_dump_json(by_alias=True))) == manifest
