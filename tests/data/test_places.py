"""Data sets on object stores and servers: read as from a folder, committed by the manifest, damage named."""

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from upath import UPath

from muonrec.config import parse_config
from muonrec.data.manifest import ITEMS, MANIFEST, read_manifest, verify_dataset
from muonrec.data.places import place
from muonrec.data.shards import load_sequences, shard_name
from pipeline.data import DataConfig
from pipeline.train import check_output
from tests.data.test_shards import build


@pytest.fixture
def store() -> Iterator[UPath]:
    folder = UPath("memory://bucket/of/data")
    yield folder
    folder.fs.store.clear()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A URL and the folder that it serves."""
    root = tmp_path / "served"
    root.mkdir()
    handler = functools.partial(_Handler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", root
        server.shutdown()


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Sends half of any file whose name is in ``halved``, and says that it is all."""

    halved: set[str] = set()

    def log_message(self, *arguments: object) -> None: ...

    def copyfile(self, source: object, outputfile: object) -> None:
        content = source.read()
        name = self.path.rpartition("/")[2]
        outputfile.write(content[: len(content) // 2] if name in self.halved else content)


def assert_same(left: object, right: object) -> None:
    for name in ("values", "offsets", "num_train", "num_valid", "num_test", "user_ids", "item_train_counts"):
        assert np.array_equal(getattr(left, name), getattr(right, name)), name
    assert left.manifest.files == right.manifest.files


def test_a_data_set_on_an_object_store_is_the_one_in_a_folder(tmp_path: Path, store: UPath) -> None:
    here = build(tmp_path)
    build(tmp_path, output=str(store))
    assert_same(load_sequences(str(store), verify_hashes=True), load_sequences(here))
    assert sorted(path.name for path in store.iterdir()) == sorted(path.name for path in here.iterdir())
    assert read_manifest(store).config["output"] == str(store)


def test_a_data_set_is_read_from_a_server(tmp_path: Path, server: tuple[str, Path]) -> None:
    url, root = server
    here = build(tmp_path, num_shards=5)  # more than there are users
    shutil.copytree(here, root / "data")
    assert_same(load_sequences(f"{url}/data", verify_hashes=True), load_sequences(here))
    with pytest.raises(ValueError, match=r"http://.*/none is not a data set: it has no manifest.json"):
        load_sequences(f"{url}/none")


def test_a_shard_that_appears_truncated_is_named(
    tmp_path: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, root = server
    shutil.copytree(build(tmp_path), root / "data")
    shard = shard_name(1, 2)
    monkeypatch.setattr(_Handler, "halved", {shard})  # the size is right, the connection ends early
    with pytest.raises(ValueError, match=f"{url}/data/{shard} cannot be read"):
        load_sequences(f"{url}/data")
    monkeypatch.setattr(_Handler, "halved", set())
    whole = (root / "data" / shard).read_bytes()
    (root / "data" / shard).write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=f"{url}/data/{shard} has {len(whole) - 7} bytes but the manifest says"):
        load_sequences(f"{url}/data")
    (root / "data" / shard).unlink()
    with pytest.raises(ValueError, match=f"{url}/data/{shard} is missing"):
        load_sequences(f"{url}/data")


def test_a_second_run_is_skipped_and_another_replaces_it(tmp_path: Path, store: UPath) -> None:
    build(tmp_path, output=str(store))
    first = read_manifest(store)
    build(tmp_path, output=str(store))
    assert read_manifest(store) == first
    build(tmp_path, output=str(store), num_shards=1)
    assert verify_dataset(store, verify_hashes=True).num_shards == 1
    assert not (store / shard_name(0, 2)).exists()


def test_the_manifest_comes_last_and_a_killed_upload_is_mended(
    tmp_path: Path, store: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, output=str(store))
    put_file, put = type(store.fs).put_file, []

    def killed_at_the_third(self: object, here: str, there: str, **options: object) -> None:
        put.append(there.rpartition("/")[2])
        assert not (store / MANIFEST).exists()  # readers find no data set, never a mixture
        if len(put) == 3:
            raise KeyboardInterrupt
        put_file(self, here, there, **options)

    monkeypatch.setattr(type(store.fs), "put_file", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, output=str(store), num_shards=4)
    with pytest.raises(ValueError, match="is not a data set"):
        read_manifest(store)
    monkeypatch.setattr(type(store.fs), "put_file", put_file)
    build(tmp_path, output=str(store), num_shards=3)
    assert verify_dataset(store, verify_hashes=True).num_shards == 3
    assert {path.name for path in store.iterdir()} == {MANIFEST, *read_manifest(store).files}


def test_somebody_elses_files_are_not_replaced(tmp_path: Path, store: UPath) -> None:
    (store / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"memory://bucket/of/data holds thesis.txt, which no manifest"):
        build(tmp_path, output=str(store))
    assert (store / "thesis.txt").read_text() == "years of work"


def test_a_server_that_can_only_be_read_is_refused_as_output(tmp_path: Path, server: tuple[str, Path]) -> None:
    with pytest.raises(ValueError, match="can only be read"):
        build(tmp_path, output=f"{server[0]}/data")


def test_rejected_rows_and_ancestors_lie_on_an_object_store_too(tmp_path: Path, store: UPath) -> None:
    build(tmp_path, output=str(store))
    log = tmp_path / "more.csv"
    log.write_text("user_id,item_id,timestamp_s\nann,v,7\ndan,x,8\nann,,9\n")
    new = store.with_name("new")
    source = {"format": "csv", "path": str(log)}
    build(tmp_path, output=str(new), extends=str(store), source=source, max_rejected_share=0.5)
    assert read_manifest(new).ancestor.num_users == 3
    assert (store.with_name("new.rejected.parquet")).is_file()


def test_an_unknown_store_is_refused_with_the_config() -> None:
    tree = {"source": {"format": "synthetic"}, "output": "nosuch://bucket/data"}
    with pytest.raises(ValueError, match="nosuch://bucket/data cannot be opened"):
        parse_config(DataConfig, tree, source="test", prefix="data.")


def test_an_upload_that_did_not_arrive_whole_is_no_data_set(
    tmp_path: Path, store: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file = type(store.fs).put_file

    def cut(self: object, here: str, there: str, **options: object) -> None:
        put_file(self, here, there, **options)
        if there.endswith(ITEMS):
            self.pipe_file(there, self.cat_file(there)[:-1])

    monkeypatch.setattr(type(store.fs), "put_file", cut)
    with pytest.raises(OSError, match=r"items.parquet has \d+ bytes after \d+ were written"):
        build(tmp_path, output=str(store))
    assert not (store / MANIFEST).exists()


def test_a_place_is_a_path_unless_it_has_a_scheme() -> None:
    assert place("out/data") == Path("out/data")
    assert isinstance(place("memory://bucket/data"), UPath)


def test_a_run_cannot_be_trained_into_an_object_store() -> None:
    with pytest.raises(ValueError, match="output s3:/bucket/run is a URL, but checkpoints need a folder"):
        check_output(SimpleNamespace(output=Path("s3://bucket/run")))
