"""The stage: skips what is done, never leaves half a data set, and explains what it refuses."""

import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pipeline.data
from muonrec.data.events import CsvSource, read_csv
from muonrec.data.shards import MANIFEST, load_sequences, read_manifest
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


def test_sequence_files_go_through_with_their_order(tmp_path: Path) -> None:
    manifest = build_dataset(config(tmp_path, source={"format": "sequences", "path": beauty_like(tmp_path)}, k_core=5))
    sequences = load_sequences(tmp_path / "data", timestamps=True)
    assert (manifest.num_users, manifest.num_items, manifest.num_events) == (20, 8, 120)
    assert manifest.time_range_s is None
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
        ({"ties": "item_id"}, [], "ties: Input should be 'shuffle' or 'file_order'"),
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
    monkeypatch.setattr("muonrec.data.events._BLOCK_BYTES", 2**15)
    source = {"format": "csv", "path": str(tmp_path / f"log.csv{suffix}")}
    shares: list[float] = []
    batches = read_csv(CsvSource.model_validate(source), on_share=shares.append)
    assert sum(len(batch) for batch in batches) == 200_000
    assert len(shares) > 5 and shares == sorted(shares)
    assert 0 < shares[0] <= 1 and shares[-1] == 1
    if not suffix:
        assert shares[0] < 0.9, "the reader is only a few blocks ahead"
