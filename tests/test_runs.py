"""Made-up folders of runs, read back and paired."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from muonrec import metrics
from muonrec.runs import Ranked, first_reaching, paired_differences, read_run, read_runs, write_ranks

PROTOCOL = {"part": "test", "mask_seen": False, "num_items": 12101, "fingerprint": "f" * 64}


def make_run(
    folder: Path, *, optimizer: str = "adamw", lift: float = 0.0, evaluated: bool = True, num_users: int = 4000
) -> Path:
    """Write what train and eval would leave; ``lift`` moves ranks and curves."""
    folder.mkdir(parents=True)
    config = {
        "seed": 0,
        "dense_optimizer": {"name": optimizer, "lr": 0.02 if optimizer == "muon" else 0.001},
        "steps": 6000,
    }
    (folder / "resolved.yaml").write_text(yaml.safe_dump(config))
    generator = np.random.default_rng(1)
    lines = []
    for step in range(20, 6001, 20):
        shape = min(step / 600, 1.0) * (1 - step / 7000)
        line = {"step": step, "epoch": step // 170, "loss_nats": 5.6 + 3.8 * np.exp(-step / (900 - 2000 * lift))}
        line["loss_nats"] += generator.normal(0, 0.06)
        line |= {
            "events_per_s": 41200 + generator.normal(0, 900),
            "seconds": step * (0.052 if optimizer == "muon" else 0.05),
        }
        line |= {f"lr_{optimizer}": config["dense_optimizer"]["lr"] * shape, "lr_tables": 0.05 * shape}
        lines.append(line | ({"lr_adamw": 0.001 * shape} if optimizer == "muon" else {}))
        if step % 300 == 0:
            value = (0.045 + 0.1 * lift) * (1 - np.exp(-step / (1300 - 3000 * lift))) + generator.normal(0, 0.0004)
            lines.append(
                {"step": step, "valid_ndcg@10": value, "valid_recall@10": 1.8 * value, "seconds": line["seconds"]}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = "name                               shape      optimizer  reason\n" + "\n".join(
        f"tower.blocks.{i}.attention.query.weight  [64, 64]   {optimizer:9}  a matrix of the tower" for i in range(2)
    )
    (folder / "routing.txt").write_text(table + "\n")
    (folder / "plan.txt").write_text(
        "table  rows    width  sharding  kernel  ranks\nitem   12101   64     row_wise  fused   0-1\n"
    )
    if evaluated:
        write_evaluation(folder, lift, num_users)
    return folder


def write_evaluation(folder: Path, lift: float, num_users: int) -> None:
    generator = np.random.default_rng(0)
    place = generator.pareto(0.35, num_users) * 8 * (1 - 2 * lift) * np.exp(generator.normal(0, 0.1, num_users))
    columns = {
        "user_id": np.arange(num_users),
        "target": generator.integers(0, 12101, num_users),
        "num_greater": np.minimum(place, 12000).astype(np.int64),
        "num_equal": np.zeros(num_users, dtype=np.int64),
        "history_length": generator.geometric(0.12, num_users),
        "target_train_count": generator.geometric(0.08, num_users),
    }
    write_ranks(folder / "ranks.parquet", Ranked(columns, PROTOCOL))
    per_user = metrics.metrics_per_user(Ranked(columns, PROTOCOL), k=[5, 10, 20])
    means = {name: metrics.bootstrap_interval(values)._asdict() for name, values in per_user.items()}
    main = {"ndcg@10": per_user["ndcg@10"]}
    breakdowns = {
        "training events of the target": metrics.groups_between(columns["target_train_count"], (5, 20)),
        "events of the history": metrics.groups_between(columns["history_length"], (5, 10, 20)),
    }
    tree = PROTOCOL | {
        "checkpoint": "best",
        "checkpoint_step": 5400,
        "num_users": num_users,
        "metrics": means,
        "coverage": {"coverage@10": 0.41},
        "popularity": {
            "metrics": {name: {key: 0.15 * value for key, value in cell.items()} for name, cell in means.items()},
            "coverage": {"coverage@10": 0.001},
        },
        "best_possible": {"ndcg@10": 0.5, "recall@10": 0.6, "num_users": num_users},
        "breakdowns": {title: metrics.breakdown(main, *groups) for title, groups in breakdowns.items()},
        "seconds": 3.2,
        "users_per_s": 1250.0,
        "versions": {"python": "3.11.2", "torch": "2.13.0", "muonrec": "0.1.0"},
    }
    (folder / "metrics.json").write_text(json.dumps(tree))


def test_runs_that_were_evaluated_unlike_are_not_paired(tmp_path):
    runs = read_runs([make_run(tmp_path / "one"), make_run(tmp_path / "two")])
    runs[1].ranked.protocol["mask_seen"] = True
    with pytest.raises(ValueError, match="mask_seen is False and True"):
        paired_differences(*runs, ["ndcg@10"])


def test_runs_over_other_users_are_not_paired(tmp_path):
    runs = read_runs([make_run(tmp_path / "one"), make_run(tmp_path / "two", num_users=3999)])
    with pytest.raises(ValueError, match="not evaluated on the same users"):
        paired_differences(*runs, ["ndcg@10"])


def test_paired_differences_draw_users_with_all_their_targets(tmp_path):
    control, arm = read_runs([make_run(tmp_path / "one"), make_run(tmp_path / "two", lift=0.2)])
    alone = paired_differences(control, arm, ["ndcg@10"], num_resamples=200)["ndcg@10"]
    users = np.arange(4000) // 8
    for run in (control, arm):
        run.ranked.columns["user_id"] = users
    found = paired_differences(control, arm, ["ndcg@10"], num_resamples=200)["ndcg@10"]
    values = [metrics.metrics_per_user(run.ranked, k=[10])["ndcg@10"] for run in (control, arm)]
    assert found == metrics.paired_bootstrap_difference(*values, users, num_resamples=200) != alone


def test_a_resumed_run_counts_each_step_once_as_last_written(tmp_path):
    folder = make_run(tmp_path / "run", evaluated=False)
    lines = [{"step": 10, "loss_nats": 3.0}, {"step": 20, "loss_nats": 2.0}, {"step": 20, "loss_nats": 1.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 30, "loss')  # being written
    assert [(line["step"], line["loss_nats"]) for line in read_run(folder).training] == [(10, 3.0), (20, 1.5)]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no resolved\.yaml"):
        read_run(tmp_path)


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    folders = [make_run(tmp_path / arm / "seed0", evaluated=False) for arm in ("adamw", "muon")]
    assert [run.name for run in read_runs(folders)] == ["adamw/seed0", "muon/seed0"]
    with pytest.raises(ValueError, match="given twice"):
        read_runs([folders[0], folders[0]])


def test_first_reaching_is_not_taken_in_by_one_lucky_evaluation():
    values = [0.1, 0.9, 0.2, 0.5, 0.6, 0.55]
    validation = [{"step": step, "valid_ndcg@10": value} for step, value in enumerate(values)]
    assert first_reaching(validation, "valid_ndcg@10", 0.5)["step"] == 3
    assert first_reaching(validation, "valid_ndcg@10", 0.7) is None


def test_ranks_survive_the_file(tmp_path):
    ranked = Ranked({"user_id": np.arange(3), "target": np.array([5, 6, 7])}, PROTOCOL, list_length=50)
    write_ranks(tmp_path / "ranks.parquet", ranked)
    (tmp_path / "resolved.yaml").write_text("seed: 0\n")
    found = read_run(tmp_path).ranked
    assert found.protocol == PROTOCOL and found.list_length == 50
    np.testing.assert_array_equal(found.columns["target"], [5, 6, 7])


def test_a_run_of_lists_is_paired_up_to_their_length(tmp_path):
    control, arm = read_runs([make_run(tmp_path / "control"), make_run(tmp_path / "arm")])
    arm = dataclasses.replace(arm, ranked=dataclasses.replace(arm.ranked, list_length=20))
    assert paired_differences(control, arm, ["recall@20", "mrr@10"]).keys() == {"recall@20", "mrr@10"}
    with pytest.raises(ValueError, match="mrr of control and arm was asked, but one of them ranked lists alone"):
        paired_differences(control, arm, ["ndcg@10", "mrr"])
    with pytest.raises(ValueError, match="the first 50 places were asked, but the lists have 20"):
        paired_differences(control, arm, ["ndcg@50"])
