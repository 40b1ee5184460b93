"""The eval stage over a synthetic data set and an encoder in memory; the model itself is the train stage's test."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import yaml

import pipeline.eval as stage
from benchmarks.generation import random_ids
from muonrec.data.shards import load_sequences
from muonrec.mesh import Ranks
from muonrec.metrics import bootstrap_interval
from muonrec.runs import read_ranks
from pipeline.data import build_dataset, load_data_config
from tests.distributed.ranks import run_on_ranks
from tests.generation.decoders import TableDecoder

ALONE = Ranks(rank=0, num_ranks=1, device=torch.device("cpu"))
NUM_USERS, NUM_ITEMS = 300, 80


class MadeUpEncoder:
    """Random tables: every item's vector leans towards its popularity, so that it beats chance."""

    def __init__(self, sequences, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_items, self.device = sequences.num_items, torch.device("cpu")
        self._users = torch.randn(len(sequences.user_ids), 4, generator=generator)
        self._users[:, 0] = 1.0
        self._items = torch.randn(self.num_items, 4, generator=generator) * 0.3
        self._items[:, 0] = torch.log1p(torch.as_tensor(sequences.item_train_counts).float())

    def user_vectors(self, batch):
        return self._users[batch.user_ids % len(self._users)]  # several targets of a user have ids of their own

    def item_vectors(self, item_ids):
        return self._items[item_ids]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    source = {"format": "synthetic", "num_users": NUM_USERS, "num_items": NUM_ITEMS, "num_clusters": 4}
    tree = {"data": {"source": source, "output": str(folder / "data"), "num_shards": 2}}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    build_dataset(load_data_config(folder / "config.yaml"))
    return folder / "data"


@pytest.fixture
def run(dataset, tmp_path, monkeypatch) -> Path:
    """A run's folder whose model is made up; the name of the folder seeds it."""
    monkeypatch.setattr(stage, "load_run", made_up_runs_on(dataset))
    return make_folder(tmp_path / "run")


def made_up_runs_on(dataset: Path):
    def load_run(folder, which, ranks):
        sequences = load_sequences(dataset)
        data = load_data_config(dataset.parent / "config.yaml")
        run_config = SimpleNamespace(model=SimpleNamespace(max_length=10), data=data)
        return MadeUpEncoder(sequences, seed=len(Path(folder).name)), run_config, sequences, 1200

    return load_run


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "resolved.yaml").write_text("seed: 0\n")
    return folder


def evaluate(run: Path, *overrides: str) -> dict:
    return stage.evaluate(stage.load_eval_config(run, ["num_resamples=50", *overrides]), ALONE)


def test_eval_writes_metrics_ranks_and_report(run, capsys):
    found = evaluate(run)
    assert json.loads((run / "metrics.json").read_text()) == found
    assert found["num_users"] == NUM_USERS and found["checkpoint_step"] == 1200 and found["part"] == "test"
    assert list(found["metrics"])[:3] == ["recall@5", "ndcg@5", "mrr@5"]
    for value in found["metrics"].values():
        assert 0 <= value["low"] <= value["mean"] <= value["high"] <= 1
    assert found["metrics"]["recall@10"]["mean"] == pytest.approx(
        (read_ranks(run / "ranks.parquet").num_greater < 10).mean()
    )
    assert found["best_possible"]["ndcg@10"] > found["metrics"]["ndcg@10"]["mean"]
    assert "ndcg@10" in capsys.readouterr().out
    assert "best possible" in (run / "report.html").read_text()


def test_popularity_row_is_the_count_of_training_events_with_ties_by_expectation(run, dataset):
    found = evaluate(run)
    counts = load_sequences(dataset).item_train_counts
    held_out = counts[read_ranks(run / "ranks.parquet").columns["target"]]
    greater = (counts[None, :] > held_out[:, None]).sum(1)
    places = (counts[None, :] == held_out[:, None]).sum(1)
    expected = (np.clip(10 - greater, 0, places) / places).mean()
    assert found["popularity"]["metrics"]["recall@10"]["mean"] == pytest.approx(expected, rel=1e-12)


def test_breakdowns_hold_every_user_once(run):
    for rows in evaluate(run)["breakdowns"].values():
        assert sum(row["num_users"] for row in rows) == NUM_USERS


def test_masking_seen_items_can_only_help_and_has_no_best_possible(run):
    plain = evaluate(run)
    greater = read_ranks(run / "ranks.parquet").num_greater
    masked = evaluate(run, "mask_seen=true")
    assert (read_ranks(run / "ranks.parquet").num_greater <= greater).all()
    assert masked["metrics"]["ndcg@10"]["mean"] > plain["metrics"]["ndcg@10"]["mean"]
    assert masked["best_possible"] is None and masked["mask_seen"] is True


def test_batches_and_chunks_change_no_number(run):
    numbers = [evaluate(run), evaluate(run, "batch_size=7", "item_chunk=9", "user_block=20")]
    for key in ("metrics", "popularity", "coverage", "breakdowns"):
        assert numbers[0][key] == numbers[1][key], key


def evaluate_here(run: Path, dataset: Path, recommend: Path) -> dict | None:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    load_run, stage.load_run = stage.load_run, made_up_runs_on(dataset)
    try:
        overrides = ["num_resamples=50", "mask_seen=true", "batch_size=64", f"recommend={recommend}"]
        return stage.evaluate(stage.load_eval_config(run, overrides), ranks)
    finally:
        stage.load_run = load_run


def test_two_ranks_give_the_numbers_and_the_files_of_one(run, dataset, tmp_path):
    alone = evaluate(run, "mask_seen=true", f"recommend={tmp_path / 'one.parquet'}")
    file_of_one = (run / "ranks.parquet").read_bytes()
    first, second = run_on_ranks(2, evaluate_here, run, dataset, tmp_path / "two.parquet")
    assert second is None and first["num_ranks"] == 2
    for key in ("metrics", "popularity", "coverage", "breakdowns"):
        assert first[key] == alone[key], key
    assert (run / "ranks.parquet").read_bytes() == file_of_one
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()


def test_validation_items_are_other_items_with_shorter_histories(run):
    evaluate(run)
    test = read_ranks(run / "ranks.parquet").columns
    evaluate(run, "part=valid")
    valid = read_ranks(run / "ranks.parquet").columns
    np.testing.assert_array_equal(valid["history_length"] + 1, test["history_length"])
    assert (valid["target"] != test["target"]).any()


def test_recommendations_are_raw_ids_best_first_and_never_seen_when_masked(run, dataset, tmp_path):
    path = tmp_path / "out" / "recommend.parquet"
    evaluate(run, f"recommend={path}", "recommend_k=3", "mask_seen=true", "k=[2]")
    rows = pq.read_table(path).to_pydict()
    assert list(rows) == ["user_id", "rank", "item_id", "score"]
    assert rows["rank"] == [1, 2, 3] * NUM_USERS
    scores = np.array(rows["score"]).reshape(-1, 3)
    assert (np.diff(scores, axis=1) <= 0).all()

    sequences = load_sequences(dataset)
    raw_items = pq.read_table(dataset / "items.parquet").column("raw_id").to_pylist()
    raw_users = pq.read_table(dataset / "users.parquet").column("raw_id").to_pylist()
    assert rows["user_id"][::3] == raw_users
    for user in (0, 17, 299):
        start, end = sequences.offsets[user : user + 2]
        seen = {raw_items[item] for item in sequences.values[start : end - 1]}
        held_out = raw_items[sequences.values[end - 1]]
        assert not (set(rows["item_id"][3 * user : 3 * user + 3]) - {held_out}) & seen


def test_compared_runs_are_paired_in_the_report(run, tmp_path):
    control = make_folder(tmp_path / "control")
    evaluate(control)
    evaluate(run, f"compare=[{control}]")
    page = (run / "report.html").read_text()
    assert "Paired differences to control" in page and "not comparable" not in page


def test_a_setting_that_is_unknown_or_out_of_range_is_named(tmp_path):
    with pytest.raises(ValueError, match="mask: is not a known setting"):
        stage.load_eval_config(tmp_path, ["mask=true"])
    with pytest.raises(ValueError, match=r"k\.0"):
        stage.load_eval_config(tmp_path, ["k=[0]"])
    with pytest.raises(ValueError, match="not of the form key=value"):
        stage.load_eval_config(tmp_path, ["mask_seen"])


def test_lengths_come_in_order_and_once(tmp_path):
    config = stage.load_eval_config(tmp_path, ["k=[20,5,5]"])
    assert config.k == [5, 20]
    assert config.main_metric == "ndcg@5"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("k=[5,81]", "k=81 was asked but there are 80 items; lower k"),
        ("compare=[nowhere]", "compare=nowhere is not a run"),
        ("recommend={folder}", "is a folder; pass the path of a file"),
        ("recommend={folder}/resolved.yaml/top.parquet", "cannot be written"),
        ("k=[5", "override 'k=[5' is not valid YAML after '='"),
        ("prt=test", "prt: is not a known setting (found 'test'); did you mean part?"),
    ],
)
def test_eval_refuses_before_the_work(run, monkeypatch, override, message):
    monkeypatch.setattr(stage, "rank_held_out", lambda *_, **__: pytest.fail("it began to work"))
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(run, override.format(folder=run))
    assert sorted(path.name for path in run.iterdir()) == ["resolved.yaml"]


def test_a_model_that_generates_is_ranked_by_its_lists_and_claims_nothing_beyond(run, dataset, tmp_path, monkeypatch):
    evaluate(run)
    with pytest.raises(ValueError, match="num_beams=30 was asked, but the model generates nothing"):
        evaluate(run, "num_beams=30")
    load_run = stage.load_run
    decoder = TableDecoder(random_ids(NUM_ITEMS, (6, 5, 4)), num_beams=30)
    monkeypatch.setattr(stage, "load_run", lambda *arguments: (decoder, *load_run(*arguments)[1:]))
    generated = make_folder(tmp_path / "generated")
    found = evaluate(generated, f"compare=[{run}]", f"recommend={tmp_path / 'top.parquet'}")
    assert found["list_length"] == read_ranks(generated / "ranks.parquet").list_length == 30
    assert "mrr" not in found["metrics"] and "mrr@20" in found["metrics"] and "mrr" in found["popularity"]["metrics"]
    assert 0 < found["metrics"]["recall@20"]["mean"] < 0.5
    assert len(pq.read_table(tmp_path / "top.parquet")) == 10 * NUM_USERS
    page = (generated / "report.html").read_text()
    assert "cannot be paired" not in page and ("worse than run" in page or "No difference to run" in page)

    masked = evaluate(generated, "mask_seen=true", "num_beams=20")
    assert masked["list_length"] == 20 and masked["popularity"]["metrics"].keys() > masked["metrics"].keys()
    with pytest.raises(ValueError, match="k=20 items of each user were asked, but the search keeps num_beams=19"):
        evaluate(generated, "num_beams=19")


def test_eval_refuses_data_that_was_built_anew_with_other_settings(run, dataset, monkeypatch):
    load_run = stage.load_run

    def of_another_config(*arguments):
        encoder, run_config, sequences, step = load_run(*arguments)
        run_config.data = run_config.data.model_copy(update={"k_core": 3, "memory_limit": "1GiB"})
        return encoder, run_config, sequences, step

    monkeypatch.setattr(stage, "load_run", of_another_config)
    with pytest.raises(ValueError, match=re.escape("built with other settings: data.k_core (asked 3, found 0); run")):
        evaluate(run)


def test_a_split_with_several_targets_per_user_ranks_each_and_recommends_to_each_user_once(tmp_path, monkeypatch):
    source = {"format": "synthetic", "num_users": 60, "num_items": 40, "num_clusters": 4}
    tree = {"data": {"source": source, "output": str(tmp_path / "data"), "num_shards": 2, "split": "ratio"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    manifest = build_dataset(load_data_config(tmp_path / "config.yaml"))
    monkeypatch.setattr(stage, "load_run", made_up_runs_on(tmp_path / "data"))
    found = evaluate(make_folder(tmp_path / "run"), "mask_seen=true", f"recommend={tmp_path / 'top.parquet'}")
    assert found["num_targets"] == manifest.num_targets.test > found["num_users"]
    assert found["num_users"] == manifest.num_users_with_target.test

    sequences = load_sequences(tmp_path / "data")
    columns = read_ranks(tmp_path / "run" / "ranks.parquet").columns
    places = sequences.offsets[columns["user_id"]] + columns["history_length"]
    assert places.tolist() == sequences.target_ids("test").tolist()
    assert columns["target"].tolist() == sequences.values[places].tolist()

    hits = (columns["num_greater"] < 10).astype(float)  # no ties among random scores
    of_users = bootstrap_interval(hits, columns["user_id"], num_resamples=50)
    assert found["metrics"]["recall@10"] == pytest.approx(of_users._asdict(), rel=1e-12)
    assert bootstrap_interval(hits, num_resamples=50).low != of_users.low
    for rows in found["breakdowns"].values():
        assert sum(row["num_targets"] for row in rows) == found["num_targets"]
        assert all(row["num_users"] <= found["num_users"] for row in rows)

    raw_users, raw_items = (
        pq.read_table(tmp_path / "data" / name).column("raw_id").to_pylist()
        for name in ("users.parquet", "items.parquet")
    )
    top = pq.read_table(tmp_path / "top.parquet").to_pylist()
    assert len({row["user_id"] for row in top}) == found["num_users"]
    assert len({(row["user_id"], row["rank"]) for row in top}) == len(top)
    for row in top:  # the list is of the last target: nothing of its history is recommended
        user = raw_users.index(row["user_id"])
        *seen, held_out = sequences.values[sequences.offsets[user] : sequences.offsets[user + 1]].tolist()
        assert raw_items.index(row["item_id"]) not in set(seen) - {held_out}
