"""The stage: skips what is done, never leaves half a data set, and explains what it refuses."""

import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import pipeline.data
from muonrec.data.events import CsvSource, read_csv
from muonrec.data.manifest import ITEMS, MANIFEST, USERS, Manifest, read_manifest
from muonrec.data.shards import load_items, load_sequences
from pipeline.data import DataConfig, build_dataset, check_same_data, load_data_config, main

SYNTHETIC = {"format": "synthetic", "num_users": 60, "num_items": 40, "num_clusters": 4, "events_per_user": 8}


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def config(tmp_path: Path, **settings: object) -> DataConfig:
    defaults = {"source": SYNTHETIC, "output": tmp_path / "data", "num_shards": 3, "memory_limit": "256MiB"}
    return DataConfig.model_validate({**defaults, **settings})


def yaml_file(tmp_path: Path, **data: object) -> str:
    tree = {
        "data": {"source": SYNTHETIC, "output": str(tmp_path / "data"), "num_shards": 3, **data},
        "model": {"name": "any"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return str(tmp_path / "config.yaml")


def beauty_like(tmp_path: Path) -> str:
    # 20 users times 6 of 8 items each: every item is met 15 times.
    lines = [" ".join([f"user{user}", *(f"{(user + place) % 8}" for place in range(6))]) for user in range(20)]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "log.txt")


def test_same_config_gives_byte_identical_shards(tmp_path: Path) -> None:
    one = build_dataset(config(tmp_path, output=tmp_path / "one"))
    two = build_dataset(config(tmp_path, output=tmp_path / "two", memory_limit="1GiB"))
    other = build_dataset(config(tmp_path, output=tmp_path / "other", source={**SYNTHETIC, "seed": 1}))
    assert one.files == two.files
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert one.files != other.files


def test_a_repeated_run_is_skipped(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    build_dataset(config(tmp_path))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    heard.clear()
    build_dataset(config(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == times
    (message,) = heard.messages
    assert "is up to date" in message
    assert message.endswith("skipped")


def test_another_config_replaces_the_data_set(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    build_dataset(config(tmp_path))
    build_dataset(config(tmp_path, num_shards=2))
    assert "holds the data of another config or source" in heard.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert len(list((tmp_path / "data").glob("shard-*"))) == 2
    load_sequences(tmp_path / "data", verify_hashes=True)


def test_a_changed_source_is_noticed_and_a_moved_one_is_not(tmp_path: Path) -> None:
    path = Path(beauty_like(tmp_path))
    first = build_dataset(config(tmp_path, source={"format": "sequences", "path": str(path)}))
    moved = path.rename(tmp_path / "moved.txt")
    same = build_dataset(config(tmp_path, source={"format": "sequences", "path": str(moved)}))
    assert same == first, "skipped: the contents are the same"
    moved.write_text(moved.read_text() + "new 1 2 3\n")
    assert (
        build_dataset(config(tmp_path, source={"format": "sequences", "path": str(moved)})).num_users
        == first.num_users + 1
    )


def test_a_damaged_data_set_is_built_again(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    first = build_dataset(config(tmp_path))
    (tmp_path / "data" / "items.parquet").unlink()
    assert build_dataset(config(tmp_path)).files == first.files
    assert "items.parquet is missing though the manifest lists it" in heard.text
    load_sequences(tmp_path / "data", verify_hashes=True)


@pytest.mark.parametrize("step", ["write_shards", "write_manifest", "describe_file"])
def test_an_interrupted_run_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.data, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(config(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_the_data_set_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_dataset(config(tmp_path))
    monkeypatch.setattr(pipeline.data, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        build_dataset(config(tmp_path, seed=5))
    assert read_manifest(tmp_path / "data") == first
    load_sequences(tmp_path / "data", verify_hashes=True)


def test_a_killed_run_leaves_no_data_set(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, pipeline.data as stage\n"
        "stage.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "stage.main([sys.argv[1]])\n"
    )
    path = yaml_file(tmp_path)
    assert subprocess.run([sys.executable, "-c", script, path], check=False, capture_output=True).returncode == -9
    with pytest.raises(ValueError, match="is not a data set: it does not exist"):
        read_manifest(tmp_path / "data")
    assert main([path]) == 0, "the leftover of the killed run does not disturb the next"
    load_sequences(tmp_path / "data", verify_hashes=True)


def test_best_possible_is_known_for_a_complete_synthetic_log_only(
    tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    complete = build_dataset(config(tmp_path))
    assert complete.best_possible is not None
    assert complete.best_possible.num_users == 60
    tree = json.loads((tmp_path / "data" / MANIFEST).read_text())
    assert set(tree["best_possible"]) == {"ndcg@10", "recall@10", "num_users"}
    assert build_dataset(config(tmp_path, k_core=6)).best_possible is None
    assert "dropped synthetic events: best possible metrics are null" in heard.text
    assert build_dataset(config(tmp_path, split="global_time")).best_possible is None
    assert "known for split leave_one_out only" in heard.text


def test_a_synthetic_log_arrives_whole(tmp_path: Path) -> None:
    manifest = build_dataset(config(tmp_path))
    assert manifest.num_events == manifest.num_source_events
    assert manifest.num_duplicates_dropped == 0
    assert manifest.tied_event_share == 0.0
    assert manifest.num_users == 60


def test_sequence_files_go_through_with_their_order(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    manifest = build_dataset(config(tmp_path, source={"format": "sequences", "path": beauty_like(tmp_path)}, k_core=5))
    sequences = load_sequences(tmp_path / "data", timestamps=True)
    assert (manifest.num_users, manifest.num_items, manifest.num_events) == (20, 8, 120)
    assert manifest.time_range_s is None
    assert "the source has no times: a user's events are in the order of the file" in heard.text
    assert sequences.timestamps_s is None
    assert sequences.values[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert manifest.core_rounds == [{"num_users": 20, "num_items": 8, "num_events": 120}]


def test_the_command_reads_its_section_and_full_path_overrides(tmp_path: Path) -> None:
    assert main([yaml_file(tmp_path), "data.num_shards=1", "data.source.num_users=30"]) == 0
    manifest = read_manifest(tmp_path / "data")
    assert (manifest.num_users, manifest.num_shards) == (30, 1)
    assert manifest.config["source"]["num_users"] == 30
    assert {"read_events_per_s", "order_events_per_s", "write_events_per_s", "total_events_per_s"} == set(
        manifest.rates
    )


def test_the_command_ends_with_counts_and_a_rate(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    main([yaml_file(tmp_path)])
    assert heard.messages[0] == f"building {tmp_path / 'data'} from a synthetic log"
    assert "60 users, 40 items" in heard.text
    assert heard.messages[-1].endswith("events/s")


@pytest.mark.parametrize(
    ("data", "overrides", "message"),
    [
        ({"k_cor": 5}, [], "data.k_cor: is not a known setting (found 5); did you mean k_core?"),
        ({"source": {"format": "sequences"}}, [], "data.source.path: is required"),
        ({"source": {"format": "excel"}}, [], "source: Input tag 'excel'"),
        (
            {"source": {"format": "sequences", "path": "nothing.txt"}},
            [],
            "source nothing.txt does not exist; pass a file",
        ),
        ({"memory_limit": "lots"}, [], "memory_limit: String should match pattern"),
        ({"memory_limit": "1MiB"}, [], "memory_limit 1MiB is too small for this log; raise data.memory_limit"),
        ({"ties": "item_id"}, [], "ties: Input should be 'shuffle', 'file_order' or 'drop'"),
        ({"max_rejected_share": 2}, [], "max_rejected_share: Input should be less than or equal to 1"),
        ({"repeats": "drop"}, [], "repeats: Input should be 'keep' or 'drop_later'"),
        (
            {"split": {"name": "ratio", "valid": 0.5, "test": 0.5}},
            [],
            "valid 0.5 + test 0.5 leave no event to train on",
        ),
        ({"items": {"format": "csv", "path": "no.csv"}}, [], "no.csv does not exist; pass a file, or a glob"),
        ({"items": {"format": "sequences", "path": "x"}}, [], "items: Input tag 'sequences'"),
        ({"items": {"format": "csv", "path": "x", "columns": {"name": "y"}}}, [], "items.columns.name: is not a known"),
        ({"extends": "nothing"}, [], "nothing is not a data set: it does not exist"),
        (
            {"source": {"format": "movielens", "path": "no/ratings.txt", "download": "ratings.csv"}},
            [],
            "data.source.path no/ratings.txt is to hold ratings.csv: let it end in '.csv' too",
        ),
        ({}, ["data.k_core=1000"], "k_core=1000 leaves no event"),
        ({}, ["data.num_shards"], "override 'data.num_shards' is not of the form key=value"),
        ({}, ["data.source={format: csv"], "is not valid YAML after '='"),
        ({}, ["data=null"], "has no section 'data' (found data, model); add one with source and output"),
    ],
)
def test_the_command_explains_what_it_refuses(
    tmp_path: Path, heard: pytest.LogCaptureFixture, data: dict, overrides: list[str], message: str
) -> None:
    assert main([yaml_file(tmp_path, **data), *overrides]) == 1
    assert message in heard.text
    assert not (tmp_path / "data").exists()


def test_a_split_by_name_and_one_with_settings_are_the_same_choice(tmp_path: Path) -> None:
    by_name = load_data_config(yaml_file(tmp_path, split="global_time"))
    assert by_name == load_data_config(yaml_file(tmp_path, split={"name": "global_time", "valid": 0.1}))


def test_settings_of_other_stages_are_said_to_be_without_effect(
    tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    assert main([yaml_file(tmp_path), "k_core=4"]) == 0
    assert "k_core=4 is nothing to this stage, whose settings begin with data." in heard.text


def test_a_log_without_targets_is_pointed_out(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp_s\na,x,1\na,y,2\n")
    build_dataset(config(tmp_path, source={"format": "csv", "path": str(tmp_path / "log.csv")}))
    assert "nothing can be validated or tested on this data" in heard.text


def test_data_of_other_settings_is_told_apart(tmp_path: Path) -> None:
    manifest = build_dataset(config(tmp_path))
    check_same_data(config(tmp_path, memory_limit="1GiB"), manifest)
    with pytest.raises(ValueError, match=r"source\.num_users \(asked 61, found 60\); run python -m pipeline"):
        check_same_data(config(tmp_path, source={**SYNTHETIC, "num_users": 61}), manifest)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reading_files_knows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    rows = [f"u{row % 50},i{row % 97},{row}" for row in range(200_000)]
    opener = gzip.open if suffix else open
    with opener(tmp_path / f"log.csv{suffix}", "wt") as stream:
        stream.write("\n".join(["user_id,item_id,timestamp_s", *rows]) + "\n")
    monkeypatch.setattr("muonrec.data.text._BLOCK_BYTES", 2**15)
    source = {"format": "csv", "path": str(tmp_path / f"log.csv{suffix}")}
    shares: list[float] = []
    batches = read_csv(CsvSource.model_validate(source), on_share=shares.append)
    assert sum(len(batch) for batch in batches) == 200_000
    assert len(shares) > 5 and shares == sorted(shares)
    assert 0 < shares[0] <= 1 and shares[-1] == 1
    if not suffix:
        assert shares[0] < 0.9, "the reader is only a few blocks ahead"


def csv_log(tmp_path: Path, rows: list[str], name: str = "log.csv") -> dict:
    (tmp_path / name).write_text("\n".join(["user_id,item_id,timestamp_s", *rows]) + "\n")
    return {"format": "csv", "path": str(tmp_path / name)}


def test_rejected_rows_are_counted_listed_and_left_out(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    good = [f"u{row % 9},i{row % 7},{row}" for row in range(97)]
    source = csv_log(tmp_path, [*good, "u,i,noon", ",i,5", "u,i,soon"])
    manifest = build_dataset(config(tmp_path, source=source, max_rejected_share=0.03))
    assert manifest.num_rejected_by_kind == {"time_not_a_number": 2, "no_user_id": 1}
    assert manifest.num_source_events == 97
    rejected = pq.read_table(tmp_path / "data.rejected.parquet").to_pylist()
    assert [row["line"] for row in rejected] == [99, 100, 101]
    assert "3 rows were no events (1 no_user_id, 2 time_not_a_number): listed in" in heard.text
    build_dataset(config(tmp_path, source=csv_log(tmp_path, good)))
    assert not (tmp_path / "data.rejected.parquet").exists()


def test_too_many_rejected_rows_stop_the_run_and_leave_the_data_set_before_it(
    tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    first = build_dataset(config(tmp_path))
    source = csv_log(tmp_path, [f"u,i{row},{row}" for row in range(998)] + ["u,i", "u,i"])
    assert main([yaml_file(tmp_path, source=source)]) == 1
    assert "2 of 1000 rows are no events, more than max_rejected_share 0.001 allows" in heard.text
    assert f"2 wrong_number_of_fields, such as {tmp_path / 'log.csv'}, line 1000: has 2 fields" in heard.text
    assert pq.read_table(tmp_path / "data.rejected.parquet").num_rows == 2
    assert read_manifest(tmp_path / "data") == first


def test_the_ratio_split_gives_every_sample_and_names_its_protocol(tmp_path: Path) -> None:
    manifest = build_dataset(config(tmp_path, split="ratio"))
    num_samples = manifest.num_events - manifest.num_users
    assert manifest.split == {"name": "ratio", "valid": 0.1, "test": 0.1}
    assert manifest.all_targets
    ends = [int(round(share * num_samples, 6)) for share in (0.8, 0.9, 1.0)]
    assert manifest.num_targets.model_dump() == {"valid": ends[1] - ends[0], "test": ends[2] - ends[1]}
    sequences = load_sequences(tmp_path / "data", timestamps=True)
    assert [sequences.target_ids(part).size for part in ("valid", "test")] == [ends[1] - ends[0], ends[2] - ends[1]]
    assert sequences.timestamps_s is not None
    valid, test = (sequences.timestamps_s[sequences.target_ids(part)] for part in ("valid", "test"))
    assert valid.max() <= test.min()


def test_targets_whose_place_depends_on_ties_are_counted_and_warned_of(
    tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    # a: the last two share a second, so that both targets depend on it. b: no tie. c: a tie far in the history.
    rows = [*"a,x,1 a,y,2 a,z,3 a,w,3 b,x,1 b,y,2 b,z,3 c,x,1 c,y,1 c,z,2 c,w,3".split()]
    manifest = build_dataset(config(tmp_path, source=csv_log(tmp_path, rows)))
    assert manifest.num_tied_targets.model_dump() == {"valid": 1, "test": 1}
    assert "1 of 3 valid and 1 of 3 test targets share user and second with another event" in heard.text
    heard.clear()
    manifest = build_dataset(config(tmp_path, source=csv_log(tmp_path, rows), ties="drop"))
    assert (manifest.num_ties_dropped, manifest.num_tied_targets.test, manifest.num_events) == (4, 0, 7)
    assert "share user and second" not in heard.text
    assert "left out 0 repeats and 4 events of unknown order" in heard.text


def test_repeats_dropped_are_counted(tmp_path: Path) -> None:
    rows = [f"u{user},i{item},{time}" for user in range(3) for time, item in enumerate([1, 2, 1, 3, 2])]
    manifest = build_dataset(config(tmp_path, source=csv_log(tmp_path, rows), repeats="drop_later"))
    assert (manifest.num_repeats_dropped, manifest.num_events) == (6, 9)


def test_an_extension_keeps_the_rows_of_its_ancestor_and_appends_new_ones(
    tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    old_rows = [f"{user},{item},{time}" for user in "mpz" for time, item in enumerate("dkdt")]
    old = build_dataset(config(tmp_path, source=csv_log(tmp_path, old_rows)))
    # p, z and item t are gone; a, n and items b, x are new; ids that sort before the old ones come after them.
    new_rows = [f"{user},{item},{10 + time}" for user in "amn" for time, item in enumerate("bdxk")]
    settings = {"source": csv_log(tmp_path, new_rows, "new.csv"), "output": tmp_path / "new"}
    new = build_dataset(config(tmp_path, **settings, extends=tmp_path / "data"))
    assert new.ancestor is not None
    assert new.ancestor.model_dump() == {"fingerprint": old.fingerprint, "num_users": 3, "num_items": 3}
    users, items = (pq.read_table(tmp_path / "new" / name).column("raw_id").to_pylist() for name in (USERS, ITEMS))
    assert "".join(users) == "mpzan" and "".join(items) == "dktbx"
    assert (new.num_users, new.num_items) == (5, 5)
    assert "its 3 users and 3 items keep their rows, 2 users and 2 items are new" in heard.text

    sequences = load_sequences(tmp_path / "new", verify_hashes=True)
    assert np.diff(sequences.offsets).tolist() == [4, 0, 0, 4, 4]
    assert sequences.values[:4].tolist() == [3, 0, 4, 1]
    assert sequences.targets("test").tolist() == [3, -1, -1, 3, 3]
    alone = build_dataset(config(tmp_path, **settings))
    assert alone.fingerprint != new.fingerprint and alone.ancestor is None


def test_an_extension_of_an_extension_keeps_all_rows(tmp_path: Path) -> None:
    folder = None
    manifests = []
    for generation, items in enumerate(["kq", "bk", "az"]):
        rows = [f"u,{item},{time}" for time, item in enumerate(items)]
        source = csv_log(tmp_path, rows)
        settings = {"source": source, "output": tmp_path / str(generation), "extends": folder}
        manifests.append(build_dataset(config(tmp_path, **settings)))
        folder = tmp_path / str(generation)
    assert [(a.fingerprint, a.num_items) for a in manifests[2].ancestors] == [
        (manifests[1].fingerprint, 3),
        (manifests[0].fingerprint, 2),
    ]
    assert manifests[0].ancestors == []
    assert pq.read_table(tmp_path / "2" / ITEMS).column("raw_id").to_pylist() == ["k", "q", "b", "a", "z"]


def test_an_extension_of_itself_or_of_a_changed_ancestor_is_noticed(tmp_path: Path) -> None:
    build_dataset(config(tmp_path))
    with pytest.raises(ValueError, match=r"is the output itself; pass another folder as data\.output"):
        build_dataset(config(tmp_path, extends=tmp_path / "data"))
    first = build_dataset(config(tmp_path, output=tmp_path / "new", extends=tmp_path / "data"))
    build_dataset(config(tmp_path, source={**SYNTHETIC, "seed": 3}))
    second = build_dataset(config(tmp_path, output=tmp_path / "new", extends=tmp_path / "data"))
    assert first.fingerprint != second.fingerprint
    with pytest.raises(ValueError, match=r"data\.extends \(asked False, found True\)"):
        check_same_data(config(tmp_path, output=tmp_path / "new"), second)


def items_file(tmp_path: Path, rows: list[dict], name: str = "meta.json") -> dict:
    (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return {"format": "amazon_2018", "path": str(tmp_path / name)}


ITEM_ROWS = [
    {"asin": "nobody", "title": "not in the log"},
    {"asin": "i2", "title": "Two", "category": ["A", "B"], "price": "$2"},
    {"asin": "i0", "title": "Zero &amp; more", "description": ["a", "b"]},
    {"asin": "i2", "title": "Two again"},
    {"asin": "i3"},
]


def log_of_items(tmp_path: Path, num_items: int = 5) -> dict:
    return csv_log(tmp_path, [f"u{user},i{item},{item}" for user in range(4) for item in range(num_items)])


def test_item_metadata_stand_in_the_rows_of_their_items(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    plain = build_dataset(config(tmp_path, source=log_of_items(tmp_path)))
    with pytest.raises(ValueError, match=r"has no item metadata; name its source as data\.items"):
        load_items(tmp_path / "data")
    asked = config(tmp_path, source=log_of_items(tmp_path), items=items_file(tmp_path, ITEM_ROWS))
    manifest = build_dataset(asked)
    table = load_items(tmp_path / "data")
    assert table.column("item_id").to_pylist() == [0, 1, 2, 3, 4]
    assert table.column("raw_id").to_pylist() == ["i0", "i1", "i2", "i3", "i4"]
    assert table.column("title").to_pylist() == ["Zero & more", None, "Two", None, None], (
        "the first row of an item stands"
    )
    assert table.column("categories").to_pylist() == [None, None, ["A", "B"], None, None]
    assert table.column("description").to_pylist() == ["a b", None, None, None, None]
    assert load_items(tmp_path / "data", columns=["price"]).to_pydict() == {"price": [None, None, 2.0, None, None]}
    with pytest.raises(ValueError, match=r"items\.parquet has no column 'colour'; it has item_id, raw_id, num_train"):
        load_items(tmp_path / "data", columns=["colour"])

    metadata = manifest.item_metadata
    assert metadata is not None
    assert (metadata.num_rows, metadata.num_duplicates, metadata.num_items_described) == (5, 1, 2)
    assert metadata.num_items_by_column == {
        "title": 2, "brand": 0, "categories": 1, "features": 0, "description": 1, "price": 1
    }  # fmt: skip
    assert [file["path"] for file in metadata.source["files"]] == [str(tmp_path / "meta.json")]
    assert "5 rows describe 2 of 5 items (2 with title, 1 with categories, 1 with description" in heard.text
    assert read_manifest(tmp_path / "data") == manifest

    shards = {name for name in plain.files if name != ITEMS}
    assert manifest.fingerprint == plain.fingerprint, "runs on the same sequences stay comparable"
    assert {name: manifest.files[name] for name in shards} == {name: plain.files[name] for name in shards}
    check_same_data(asked, plain)
    load_sequences(tmp_path / "data", verify_hashes=True)


def test_metadata_of_other_ids_are_pointed_out(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    build_dataset(config(tmp_path, source=log_of_items(tmp_path), items=items_file(tmp_path, ITEM_ROWS[:1])))
    assert "1 rows describe 0 of 5 items (none is in the log: are the ids the same?)" in heard.text


def test_changed_metadata_are_noticed_and_unchanged_ones_skipped(tmp_path: Path) -> None:
    def build(items: dict | None) -> tuple[Manifest, int]:
        manifest = build_dataset(config(tmp_path, source=log_of_items(tmp_path), items=items))
        return manifest, (tmp_path / "data" / MANIFEST).stat().st_ino

    first, written = build(items_file(tmp_path, ITEM_ROWS))
    assert build(items_file(tmp_path, ITEM_ROWS, "moved.json")) == (first, written)
    second, rewritten = build(items_file(tmp_path, ITEM_ROWS[:2]))
    assert rewritten != written
    assert second.item_metadata is not None and second.item_metadata.num_rows == 2
    assert build(None)[0].item_metadata is None


def test_rejected_items_are_listed_with_the_rejected_events_and_counted_apart(
    tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    source = csv_log(tmp_path, [f"u{row % 9},i{row % 7},{row}" for row in range(97)] + ["u,i,noon"])
    items = items_file(tmp_path, [*ITEM_ROWS, {"title": "whose?"}, {"asin": 7}])
    with pytest.raises(
        ValueError, match=r"2 of 7 rows are no items, .*\n  1 no_item_id, such as [^\n]*meta\.json, line 6"
    ):
        build_dataset(config(tmp_path, source=source, items=items, max_rejected_share=0.2))
    assert not (tmp_path / "data").exists()
    manifest = build_dataset(config(tmp_path, source=source, items=items, max_rejected_share=0.3))
    assert manifest.num_rejected_by_kind == {"time_not_a_number": 1}
    assert manifest.item_metadata is not None
    assert manifest.item_metadata.num_rejected_by_kind == {"no_item_id": 1, "wrong_type": 1}
    assert "2 rows of metadata were no items (1 no_item_id, 1 wrong_type): listed in" in heard.text
    rejected = pq.read_table(tmp_path / "data.rejected.parquet").to_pylist()
    assert [(Path(row["file"]).name, row["line"]) for row in rejected] == [
        ("log.csv", 99),
        ("meta.json", 6),
        ("meta.json", 7),
    ]


def test_an_extension_appends_described_items_and_keeps_what_its_ancestor_knew(
    tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    rows = [{"asin": "i0", "title": "old zero", "category": ["x"]}, {"asin": "i4", "title": "old four"}]
    build_dataset(config(tmp_path, source=log_of_items(tmp_path), items=items_file(tmp_path, rows)))
    log_rows = [f"u{user},{item},{time}" for user in range(4) for time, item in enumerate(["a", "i4", "z"])]
    log = csv_log(tmp_path, log_rows, "new.csv")
    settings = {"source": log, "output": tmp_path / "new", "extends": tmp_path / "data"}
    others = [{"asin": f"other{row}", "title": "of no item here"} for row in range(9)]
    rows = [*others, {"asin": "z", "title": "new z"}, {"asin": "i4", "title": "new four"}]
    manifest = build_dataset(config(tmp_path, **settings, items=items_file(tmp_path, rows, "new.json")))
    table = load_items(tmp_path / "new")
    assert table.column("raw_id").to_pylist() == ["i0", "i1", "i2", "i3", "i4", "a", "z"]
    assert table.column("title").to_pylist() == ["old zero", None, None, None, "new four", None, "new z"]
    assert table.column("categories").to_pylist() == [["x"]] + [None] * 6
    assert manifest.item_metadata is not None
    assert (manifest.item_metadata.num_items_described, manifest.item_metadata.num_duplicates) == (3, 0)
    assert "11 rows and what was known before describe 3 of 7 items" in heard.text
    build_dataset(config(tmp_path, **{**settings, "output": tmp_path / "plain"}))
    with pytest.raises(ValueError, match="has no item metadata"):
        load_items(tmp_path / "plain")
    build_dataset(config(tmp_path, source=log_of_items(tmp_path)))
    build_dataset(config(tmp_path, **settings, items=items_file(tmp_path, rows, "new.json")))
    assert load_items(tmp_path / "new").column("title").to_pylist() == [None] * 4 + ["new four", None, "new z"]


def test_an_ancestor_with_other_metadata_is_noticed(tmp_path: Path) -> None:
    fingerprints = []
    for title in ("one", "two"):
        items = items_file(tmp_path, [{"asin": "i0", "title": title}], "old.json")
        build_dataset(config(tmp_path, source=log_of_items(tmp_path), items=items))
        settings = {"source": log_of_items(tmp_path), "output": tmp_path / "new", "extends": tmp_path / "data"}
        manifest = build_dataset(config(tmp_path, **settings, items=items_file(tmp_path, ITEM_ROWS[:1], "new.json")))
        assert manifest.item_metadata is not None
        fingerprints.append(manifest.item_metadata.fingerprint)
        assert load_items(tmp_path / "new").column("title")[0].as_py() == title
    assert fingerprints[0] != fingerprints[1]


def test_metadata_of_many_items_fit_a_small_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muonrec.data.sequences._INSERT_BYTES", 2**22)  # several inserts
    rows = [{"asin": f"i{item}", "title": "t", "description": [f"{item}" * 300]} for item in range(20_000)]
    source = csv_log(tmp_path, [f"u{item % 50},i{item},{item}" for item in range(0, 20_000, 2)])
    build_dataset(config(tmp_path, source=source, items=items_file(tmp_path, rows), memory_limit="96MiB"))
    table = load_items(tmp_path / "data")
    described = zip(table.column("raw_id").to_pylist(), table.column("description").to_pylist(), strict=True)
    assert len(table) == 10_000
    assert all(text == raw_id[1:] * 300 for raw_id, text in described)


CONFIGS = Path(__file__).parents[2] / "configs"


# Those of compare name one of the others; tests/pipeline/test_compare.py reads them.
@pytest.mark.parametrize("path", sorted(set(CONFIGS.glob("*/*.yaml")) - set(CONFIGS.glob("compare/*"))), ids=str)
def test_every_config_of_the_repository_is_valid(path: Path) -> None:
    assert load_data_config(path).output.is_relative_to("out/data")
