"""Semantic IDs of a data set: made once, committed whole, reported, and never in the way of the data set."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import muonrec.data.semantic_ids.stored as stored
from muonrec.data.manifest import MANIFEST, read_manifest
from muonrec.data.semantic_ids import SemanticIds, load_semantic_ids
from muonrec.data.semantic_ids.config import SemanticIdsConfig
from muonrec.data.semantic_ids.stored import IDS, SemanticIdsManifest, verify_semantic_ids
from pipeline.data import DataConfig, build, check_same_data, main

NUM_ITEMS = 40
KMEANS = {"name": "residual_kmeans", "num_levels": 2, "codebook_size": 4, "max_rounds": 8}
COOCCURRENCE = {"source": {"name": "cooccurrence", "dim": 16}, "method": KMEANS}


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def config(tmp_path: Path, semantic_ids: dict | None, **settings: object) -> DataConfig:
    source = {"format": "synthetic", "num_users": 120, "num_items": NUM_ITEMS, "num_clusters": 4, "events_per_user": 8}
    tree = {"source": source, "output": tmp_path / "data", "num_shards": 2, "memory_limit": "256MiB"}
    return DataConfig.model_validate({**tree, "semantic_ids": semantic_ids, **settings})


def made(tmp_path: Path, semantic_ids: dict = COOCCURRENCE, **settings: object) -> SemanticIdsManifest:
    build(config(tmp_path, semantic_ids, **settings))
    return verify_semantic_ids(tmp_path / "data-semantic-ids", verify_hashes=True)


def index_file(tmp_path: Path, codes: dict[str, list[int]]) -> dict:
    (tmp_path / "index.json").write_text(json.dumps(codes))
    return {"source": {"name": "ready_made", "path": str(tmp_path / "index.json")}}


def raw_ids(tmp_path: Path) -> list[str]:
    return pq.read_table(tmp_path / "data" / "items.parquet").column("raw_id").to_pylist()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    made(folder)
    return folder


def test_ids_are_stored_in_the_order_of_the_items_with_what_was_counted(built: Path) -> None:
    manifest = verify_semantic_ids(built / "data-semantic-ids")
    ids = load_semantic_ids(built / "data-semantic-ids", dataset=built / "data", verify_hashes=True)
    table = pq.read_table(built / "data-semantic-ids" / IDS)
    assert table.column("raw_id").to_pylist() == raw_ids(built)
    assert table.column("codes").to_pylist() == ids.codes.tolist()
    assert ids.codes.shape == (NUM_ITEMS, 3)
    assert ids.codebook_sizes == (4, 4, manifest.largest_collision)

    before = [tuple(codes) for codes in ids.codes[:, :2].tolist()]
    counts = {codes: before.count(codes) for codes in before}
    assert manifest.num_collisions == NUM_ITEMS - len(counts)
    assert manifest.largest_collision == max(counts.values()) > 1
    collided = [counts[codes] > 1 for codes in before]
    assert table.column("is_collided").to_pylist() == collided
    assert manifest.num_items_collided == sum(collided)
    assert (manifest.num_collisions_after, manifest.num_items_reassigned) == (0, 0)
    shares = np.bincount(ids.codes[:, 0]) / NUM_ITEMS
    assert manifest.levels[0].perplexity == pytest.approx(float(np.prod(shares**-shares)), abs=1e-3)
    assert manifest.levels[0].num_used == 4
    assert manifest.reconstruction_error is not None
    assert 0 < manifest.reconstruction_error == manifest.reconstruction_error_after < 1


def test_a_repeated_run_is_skipped_and_each_change_is_noticed(
    tmp_path: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = index_file(tmp_path, {f"item{number}": [number] for number in range(3)})
    build(config(tmp_path, None))
    ready = index_file(tmp_path, {item: [row] for row, item in enumerate(raw_ids(tmp_path))})
    first = made(tmp_path, ready)
    data = read_manifest(tmp_path / "data")
    heard.clear()
    assert made(tmp_path, {**ready, "device": "cuda"}) == first
    assert [message.endswith("skipped") for message in heard.messages] == [True, True]

    moved = (tmp_path / "index.json").rename(tmp_path / "moved.json")
    assert made(tmp_path, {"source": {**ready["source"], "path": str(moved)}}) == first
    moved.write_text(json.dumps({item: [row + 1] for row, item in enumerate(raw_ids(tmp_path))}))
    assert made(tmp_path, {"source": {**ready["source"], "path": str(moved)}}).fingerprint != first.fingerprint
    assert "holds semantic IDs of other settings, source or items" in heard.text

    (tmp_path / "data-semantic-ids" / IDS).write_bytes(b"x")
    made(tmp_path, {"source": {**ready["source"], "path": str(moved)}})
    assert "has 1 bytes but the manifest says" in heard.text
    assert read_manifest(tmp_path / "data") == data, "the data set was never built again"


def test_the_data_set_does_not_know_of_its_ids(built: Path) -> None:
    manifest = read_manifest(built / "data")
    assert "semantic_ids" not in manifest.config
    check_same_data(config(built, None), manifest)
    check_same_data(config(built, {**COOCCURRENCE, "seed": 5}), manifest)


def test_ids_of_files_outlive_another_split_and_those_of_events_do_not(tmp_path: Path) -> None:
    build(config(tmp_path, None))
    ready = index_file(tmp_path, {item: [row] for row, item in enumerate(raw_ids(tmp_path))})
    split = {"name": "ratio"}
    assert made(tmp_path, ready) == made(tmp_path, ready, split=split)
    of_events = made(tmp_path)
    assert made(tmp_path, split=split).fingerprint != of_events.fingerprint


def test_the_seed_decides_the_codes(tmp_path: Path, built: Path) -> None:
    again = made(tmp_path)
    assert again.files == verify_semantic_ids(built / "data-semantic-ids").files
    elsewhere = tmp_path / "elsewhere"
    build(config(tmp_path, {**COOCCURRENCE, "seed": 1, "output": str(elsewhere)}))
    assert verify_semantic_ids(elsewhere).files != again.files


def test_reassigned_items_are_marked_and_counted(tmp_path: Path) -> None:
    method = {**KMEANS, "codebook_size": 16}
    manifest = made(tmp_path, {**COOCCURRENCE, "method": method, "collisions": "reassign_last"})
    table = pq.read_table(tmp_path / "data-semantic-ids" / IDS)
    assert len(manifest.levels) == 2
    assert manifest.num_items_reassigned == manifest.num_collisions == sum(table.column("is_reassigned").to_pylist())
    assert manifest.num_collisions > 0
    assert manifest.reconstruction_error_after > manifest.reconstruction_error  # type: ignore[operator]


def test_the_rq_vae_goes_through_the_stage(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    method = {
        "name": "rqvae",
        "num_levels": 2,
        "codebook_size": 4,
        "hidden_dims": [8],
        "latent_dim": 4,
        "num_epochs": 3,
    }
    for optimizer in ("muon", "adamw"):
        manifest = made(tmp_path, {**COOCCURRENCE, "method": {**method, "optimizer": optimizer}})
        assert manifest.config["method"]["optimizer"]["name"] == optimizer
        assert manifest.num_collisions_after == 0
    for text in ("routing of the RQ-VAE", "level  codes  used  perplexity", "collisions: ", "variance untold"):
        assert text in heard.text


def test_items_that_training_never_met_are_pointed_out(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    users = "".join(
        f"u{user} {user % 4} {(user + 1) % 4} {(user + 2) % 4} rare{user} last{user}\n" for user in range(8)
    )
    (tmp_path / "log.txt").write_text(users)
    source = {"format": "sequences", "path": str(tmp_path / "log.txt")}
    manifest = made(tmp_path, {**COOCCURRENCE, "source": {"name": "cooccurrence", "dim": 4}}, source=source)
    assert manifest.num_items_unknown == 16
    assert manifest.largest_collision >= 16
    assert "the source says nothing of 16 items" in heard.text


@pytest.mark.parametrize("step", ["write_table", "write_manifest", "describe_file"])
def test_an_interrupted_run_leaves_the_ids_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    build(config(tmp_path, None))
    ready = index_file(tmp_path, {item: [row] for row, item in enumerate(raw_ids(tmp_path))})

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stored, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path, ready)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "index.json"]
    first = made(tmp_path, ready)
    monkeypatch.setattr(stored, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path)
    assert verify_semantic_ids(tmp_path / "data-semantic-ids", verify_hashes=True) == first


def test_a_killed_run_leaves_nothing_that_is_taken_for_ids(tmp_path: Path) -> None:
    build(config(tmp_path, None))
    index = index_file(tmp_path, {item: [row] for row, item in enumerate(raw_ids(tmp_path))})
    ready = tmp_path / "config.yaml"
    tree = config(tmp_path, index).model_dump(mode="json")
    ready.write_text(json.dumps({"data": tree}))
    script = (
        "import os, signal, sys\n"
        "import muonrec.data.semantic_ids.stored as stored, pipeline.data as stage\n"
        "stored.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "stage.main(sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    killed = subprocess.run([sys.executable, "-c", script, str(ready)], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="data-semantic-ids is not a set of semantic IDs: it does not exist"):
        load_semantic_ids(tmp_path / "data-semantic-ids")
    assert main([str(ready)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "data",
        "data-semantic-ids",
        "index.json",
    ]


def test_ids_of_other_items_or_damaged_ones_are_refused(tmp_path: Path, built: Path) -> None:
    build(config(tmp_path, None, source={**config(tmp_path, None).source.model_dump(), "num_items": 30}))
    ids = built / "data-semantic-ids"
    with pytest.raises(ValueError, match=r"holds semantic IDs of other items \(.*\) than .* has .*; run python -m"):
        load_semantic_ids(ids, dataset=tmp_path / "data")
    with pytest.raises(ValueError, match="has schema version 2, this muonrec reads semantic-ids-1"):
        load_semantic_ids(built / "data")
    with pytest.raises(ValueError, match="has schema version semantic-ids-1, this muonrec reads 2"):
        read_manifest(ids)
    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / MANIFEST).write_bytes((ids / MANIFEST).read_bytes())
    with pytest.raises(ValueError, match=f"{IDS} is missing though the manifest lists it"):
        load_semantic_ids(copied)


def test_ids_of_other_settings_are_refused_and_not_those_of_other_places(built: Path) -> None:
    folder, asked = built / "data-semantic-ids", {**COOCCURRENCE, "output": "elsewhere", "device": "cuda"}
    assert load_semantic_ids(folder, config=SemanticIdsConfig.model_validate(asked)).codes.shape[0] == NUM_ITEMS
    asked = {"source": {"name": "cooccurrence", "dim": 8}, "method": "rqvae"}
    differing = (
        r"method\.name \(asked 'rqvae', found 'residual_kmeans'\), "
        r"data\.semantic_ids\.source\.dim \(asked 8, found 16\); run python -m pipeline\.data CONFIG again"
    )
    with pytest.raises(ValueError, match=rf"was made with other settings: data\.semantic_ids\.{differing}"):
        load_semantic_ids(folder, config=SemanticIdsConfig.model_validate(asked))


def test_a_folder_with_other_things_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "data-semantic-ids").mkdir()
    (tmp_path / "data-semantic-ids" / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match=r"holds thesis.tex, .* pass another folder as data.semantic_ids.output"):
        made(tmp_path)
    assert (tmp_path / "data-semantic-ids" / "thesis.tex").exists()


def test_a_data_set_and_its_ids_never_take_each_others_place(tmp_path: Path) -> None:
    made(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("data*/*")}
    with pytest.raises(ValueError, match=rf"holds other data \(items.parquet, .* no {IDS} .* data.semantic_ids.output"):
        build(config(tmp_path, {**COOCCURRENCE, "output": tmp_path / "data"}))
    with pytest.raises(ValueError, match=rf"holds other data \({IDS}\), .* no items.parquet .* folder as data.output"):
        build(config(tmp_path, None, output=tmp_path / "data-semantic-ids"))
    assert {path: path.read_bytes() for path in tmp_path.glob("data*/*")} == before


@pytest.mark.parametrize(
    ("semantic_ids", "message"),
    [
        ({"source": "cooccurrence"}, "source cooccurrence gives vectors; name the method that makes codes of them"),
        ({"source": {"name": "ready_made", "path": "x"}, "method": "rqvae"}, "ready_made is codes already; leave out"),
        (
            {"source": {"name": "ready_made", "path": "x"}, "collisions": "reassign_last"},
            "source ready_made has no vectors that say which code is near; set collisions: extra_level",
        ),
        ({"source": {"name": "ready_made", "path": "no.json"}}, "source no.json does not exist; pass a file"),
        ({"source": {"name": "ready_made", "path": "*.json"}}, r"matches 2 files; pass one as data.semantic_ids"),
        (
            {"source": {"name": "embeddings", "path": "a.json", "ids": "no.txt"}, "method": KMEANS},
            "source no.txt does not exist; pass a file, or a glob that matches files, as data.semantic_ids.source.ids=",
        ),
        ({"source": "guesses"}, "data.semantic_ids.source: Input tag 'guesses'"),
        ({**COOCCURRENCE, "method": {**KMEANS, "codes": 7}}, "data.semantic_ids.method.codes: is not a known setting"),
    ],
)
def test_what_cannot_be_asked_for_is_explained(
    tmp_path: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, semantic_ids: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    tree = config(tmp_path, None).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(json.dumps({"data": {**tree, "semantic_ids": semantic_ids}}))
    assert main([str(tmp_path / "config.yaml")]) == 1
    assert message.replace("\\", "") in heard.text


def test_semantic_ids_in_memory_are_checked() -> None:
    with pytest.raises(ValueError, match="2 items share 1 tuples of codes"):
        SemanticIds(np.array([[1], [1]]), (2,))
    with pytest.raises(ValueError, match=r"item 1 has codes \[2\], outside the codebooks"):
        SemanticIds(np.array([[1], [2]]), (2,))
