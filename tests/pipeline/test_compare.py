"""The compare stage over a made-up train command, and once over the real ones."""

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from muonrec.comparison.results import RESULTS, read_comparison, write_results
from muonrec.comparison.tuning import Asked
from muonrec.config import flat, load_config, parse_config, read_yaml, set_at
from muonrec.data.synthetic import SyntheticSource
from pipeline.compare import ArmConfig, CompareConfig, aggregate, compare, main
from pipeline.compared_runs import Experiment
from pipeline.data import DataConfig, build_dataset
from pipeline.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
SOURCE = {"format": "synthetic", "num_users": 60, "num_items": 40}

# Learns better the nearer its rate is to 0.003; writes what the real stages write. `broken` beside the runs says which
# kind of run is to go wrong, and how.
FAKE = """
import json, math, pathlib, random, sys
import yaml
stage, path = sys.argv[1], pathlib.Path(sys.argv[2])
if stage == "pipeline.train":
    folder = path.parent
    config = yaml.safe_load(path.read_text())
    (folder.parent / "trained").open("a").write("x")
    broken = folder.parent.parent / "broken"
    how = json.loads(broken.read_text()) if broken.exists() else {}
    name, seed = config["dense_optimizer"]["name"], config["seed"]
    if how.get("fails") == [name, seed]:
        sys.exit("no memory")
    (folder / "resolved.yaml").write_text(path.read_text())
    start = {"initial_state": f"i{seed}", "first_batches": f"b{seed}", "epoch_order": f"o{seed}"}
    if how.get("other order") == name:
        start["epoch_order"] = "x"
    (folder / "fingerprints.json").write_text(json.dumps(start))
    near = 1 - abs(math.log10(config["dense_optimizer"]["lr"] / 0.003)) + 0.01 * random.Random(seed).random()
    lines, every = [], config["validation"]["every_steps"]
    for step in range(every, config["num_steps"] + 1, every):
        value = (0.3 if name == "muon" else 0.2) * near * step / config["num_steps"]
        common = {"step": step, "seconds": 0.1 * step}
        lines.append({**common, "loss_nats": 1.0, "events_per_s": 100.0, "optimizer_s": 0.02 * every})
        lines.append({**common, "valid_ndcg@10": value, "peak_memory_bytes": 1000})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    (folder / "checkpoints").mkdir(exist_ok=True)
else:
    import numpy as np, pyarrow as pa, pyarrow.parquet as pq
    config = yaml.safe_load((path / "resolved.yaml").read_text())
    most = 20 if config["dense_optimizer"]["name"] == "muon" else 30
    targets = pq.read_table(path.parent.parent / "targets.parquet")
    greater = np.random.default_rng(config["seed"]).integers(0, most, len(targets))
    columns = {name: targets[name] for name in targets.column_names}
    columns |= {"num_greater": greater, "num_equal": 0 * greater}
    protocol = {"protocol": json.dumps({"mask_seen": sys.argv[3] == "mask_seen=true"})}
    pq.write_table(pa.table(columns).replace_schema_metadata(protocol), path / "ranks.parquet")
    ndcg = float(np.where(greater < 10, 1 / np.log2(greater + 2), 0).mean())
    (path / "metrics.json").write_text(json.dumps({"metrics": {"ndcg@10": {"mean": ndcg}}, "device": "cpu"}))
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "data"
    build_dataset(DataConfig(source=SyntheticSource(**SOURCE), output=folder))
    return folder


def settings(dataset, output, **changes):
    tree = {
        "output": str(output),
        "train": {
            "data": {"source": SOURCE, "output": str(dataset)},
            "model": {"name": "sasrec", "embedding_dim": 8, "max_length": 10},
            "tables": {"item": {"lr": 0.1, "sharding": "row_wise"}},
            "batch_size": 32,
            "num_steps": 6,
        },
        "arms": {
            "control": {"overrides": {"dense_optimizer": "adamw"}},
            "muon": {"overrides": {"dense_optimizer": "muon"}},
        },
        "grids": {"dense": [0.001, 0.003], "rest": [0.001], "tables": [0.1]},
        "trials": 2,
        "tuning_seeds": [0],
        "max_extensions": 0,
        "seeds": [1, 2],
        "parallel_runs": 2,
        "tries": 1,
    }
    return {**tree, **changes}


@pytest.fixture
def run(dataset, tmp_path, monkeypatch):
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)
    monkeypatch.setattr("pipeline.compared_runs.sources_hash", lambda *_: "sources")  # its own tests take its time
    for name in ("write_comparison_report", "write_aggregate_report"):  # drawing takes seconds; tests/comparison do it
        monkeypatch.setattr(f"pipeline.compare.{name}", lambda *_: "report.html")

    def run(output="out", **changes):
        tree = settings(dataset, tmp_path / output, **changes)
        return compare(parse_config(CompareConfig, tree, source="the test"), (sys.executable, str(fake)))

    return run


def trained(tmp_path, output="out"):
    """How many runs were started since the last call."""
    path = tmp_path / output / "runs" / "trained"
    count = len(path.read_text()) if path.exists() else 0
    path.unlink(missing_ok=True)
    return count


def test_arms_are_tuned_alike_then_run_over_the_seeds_and_nothing_twice(run, tmp_path, monkeypatch, capsys):
    comparison = run(tuning_seeds=[0, 9], leaders=1)
    assert trained(tmp_path) == 2 * 2 + 2 + 2 * 2
    final = comparison.finals("muon")[0]
    assert final.rates == {"dense": 0.003, "rest": 0.001, "tables": 0.1}
    assert (final.num_steps, final.curve_step, final.best_step) == (6, (1, 2, 3, 4, 5, 6), 6)
    assert final.optimizer_share == pytest.approx(0.2)
    assert final.events_per_s == pytest.approx(100.0)
    assert final.peak_memory_bytes == 1000
    assert final.test["ndcg@10"] == pytest.approx(final.per_target("ndcg@10").mean())
    assert all(not trial.test for trial in comparison.trials("muon", 1.0))
    assert not list((tmp_path / "out" / "runs").glob("*/checkpoints"))
    assert "muon reaches test NDCG@10" in " ".join(capsys.readouterr().out.split())

    # The same again; then another arm with fewer seeds: its own runs alone.
    assert run(tuning_seeds=[0, 9], leaders=1).finals("muon")[0].run == final.run
    assert trained(tmp_path) == 0
    arms = settings(None, tmp_path)["arms"]
    arms = {**arms, "normuon": {"overrides": {"dense_optimizer": "muon", "dense_optimizer.normuon_beta2": 0.9}}}
    fewer = run(arms=arms, seeds=[2])
    assert trained(tmp_path) == 2 + 1
    assert [run.seed for run in fewer.finals("control")] == [2]
    kept = read_comparison(tmp_path / "out").runs
    assert sorted((run.arm, run.seed) for run in kept if run.superseded) == [
        ("control", 1),
        ("control", 9),
        ("muon", 1),
        ("muon", 9),
    ]

    # On another machine, with results.parquet alone.
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "out" / RESULTS, tmp_path / "elsewhere" / RESULTS)
    assert len(run("elsewhere").finals("muon")) == 2
    assert trained(tmp_path, "elsewhere") == 0
    aggregate([str(tmp_path / "elsewhere")], to=tmp_path)
    assert "means over 1 comparison, at the largest budget" in capsys.readouterr().out
    with pytest.raises(ValueError, match="have runs of muon in common; give each comparison once"):
        aggregate([str(tmp_path / "out"), str(tmp_path / "elsewhere")], to=tmp_path)

    # Of later sources: where the earlier ones are accepted, and where they are not.
    monkeypatch.setattr("pipeline.compared_runs.sources_hash", lambda *_: "later")
    run(trials=1, seeds=[1], accept_sources=["sources"])
    assert trained(tmp_path) == 0
    run(trials=1, seeds=[1])
    assert trained(tmp_path) == 4

    # Another data set is refused before anything is trained.
    known = read_comparison(tmp_path / "out")
    other = dataclasses.replace(known.design, facts={**known.design.facts, "fingerprint": "0" * 40})
    write_results(tmp_path / "out", other, known.runs)
    with pytest.raises(ValueError, match=r"are of another data set \(fingerprint 000000000000\) than .* holds"):
        run(trials=1, seeds=[1, 3])
    assert trained(tmp_path) == 0


def test_a_failed_run_is_reported_the_others_go_on_and_it_is_tried_again(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "broken").write_text(json.dumps({"fails": ["muon", 2]}))
    with pytest.raises(ValueError, match=r"(?s)1 of 6 runs have failed; start the same.*no memory"):
        run(trials=1)
    comparison = read_comparison(tmp_path / "out")
    assert [len(comparison.finals(arm)) for arm in ("control", "muon")] == [2, 1]
    trained(tmp_path)
    (tmp_path / "out" / "broken").unlink()
    assert len(run(trials=1).finals("muon")) == 2
    assert trained(tmp_path) == 1


def test_runs_that_start_unlike_stop_the_comparison(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "broken").write_text(json.dumps({"other order": "muon"}))
    with pytest.raises(ValueError, match=r"did not start alike: they differ in epoch_order \(o0 and x\)"):
        run(trials=1)
    assert trained(tmp_path) == 2


def test_one_comparison_at_a_time_writes_to_a_folder(run, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(ValueError, match=r"another process is at work on the comparison in .*--report shows"),
    ):
        run(trials=1)
    assert not (tmp_path / "out" / RESULTS).exists()
    run(trials=1, seeds=[1])
    run(trials=1, seeds=[1])  # the lock is let go


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": "adamw"}, "control 'adamw' is none of the arms: control, muon"),
        ({"arms": {"control": {"rates": {"x": ["adamw.lr"]}}}}, "arms.control tunes x, but there is no such grid"),
        ({"arms": {"muon": {}}}, "none of the arms: muon; arms takes the place of one-rate, control, muon"),
        ({"grids": {"desne": [0.1]}}, "grids has desne, which no rate is called; the rates are dense, rest, tables"),
        ({"arms": {"control": {"grids": {"desne": [0.1]}}}}, "arms.control.grids has desne"),
        ({"arms": {"control": {"overrides": {"data.k_core": 2}}}}, "arms.control overrides data.k_core"),
        ({"seeds": [-1, 1]}, "seeds.0: Input should be greater than or equal to 0"),
        ({"budgets": [0.5, 0.5]}, "budgets=[0.5, 0.5] was asked"),
        ({"length_bounds": [3, 3]}, "length_bounds: "),
        ({"evaluate_every": 0.1}, "evaluate_every: Input should be less than or equal to 0.02"),
        (
            {"arms": {"control": {}, "muon": {"overrides": {"schedule.warmup_fraction": 0.5}}}},
            "arm 'muon' differs from the control in schedule.warmup_fraction (0.05 and 0.5)",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(run, changes, message):
    with pytest.raises(ValueError) as error:
        run(**changes)
    assert message in str(error.value)
    assert "tables, dense" not in str(error.value)  # each name once


def test_arms_resolve_to_settings_that_differ_as_they_say(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.compared_runs.sources_hash", lambda *_: "sources")
    tree = settings(dataset, tmp_path, budgets=[1.0, 0.5], evaluate_every=0.02)
    del tree["arms"], tree["grids"]
    tree["overrides"] = {"num_steps": 1000, "data": {"seed": 0}}
    experiment = Experiment(parse_config(CompareConfig, tree, source="the test"))
    assert [(arm.name, arm.also_differs) for arm in experiment.design.arms] == [
        ("one-rate", ("tables.item.optimizer",)),
        ("control", ()),
        ("muon", ()),
    ]
    one = experiment.settings(Asked("one-rate", "tune", 1.0, 0, 0, {"one": 0.003}), tmp_path)
    assert (one.dense_optimizer.lr, one.adamw.lr, one.tables["item"].lr) == (0.003, 0.003, 0.003)
    assert one.tables["item"].optimizer == "partial_rowwise_adam"
    rates = {"dense": 0.01, "rest": 0.001, "tables": 0.4}
    muon = experiment.settings(Asked("muon", "final", 0.5, 3, None, rates), tmp_path)
    assert (muon.num_steps, muon.validation.every_steps, muon.seed, muon.fingerprints) == (500, 10, 3, True)
    assert (muon.dense_optimizer.name, muon.tables["item"].lr) == ("muon", 0.4)
    trial = experiment.settings(Asked("muon", "tune", 0.5, 0, 3, rates), tmp_path)
    assert trial.validation.every_steps == 50
    control = experiment.settings(Asked("control", "final", 0.5, 3, None, rates), tmp_path)
    assert experiment.config_hash(control) != experiment.config_hash(muon)
    moved = experiment.settings(Asked("muon", "final", 0.5, 3, None, rates), tmp_path / "elsewhere")
    assert experiment.config_hash(moved) == experiment.config_hash(muon)
    # A run starts from what a file holds, wherever it lies.
    for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(weights)
    a, b, c = (
        experiment.config_hash(control.model_copy(update={"init_from": tmp_path / name})) for name in ("a", "b", "c")
    )
    assert len({a, c, experiment.config_hash(control)}) == 3 and a == b
    assert muon.schedule == control.schedule


def test_the_shipped_comparisons_are_valid_and_the_command_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for path in sorted((ROOT / "configs" / "compare").glob("*.yaml")):
        config = load_config(CompareConfig, path)
        for arm in config.arms.values():  # without the data that an Experiment asks for
            tree = read_yaml(ROOT / config.train)
            for key, value in {**flat(config.overrides), **arm.overrides}.items():
                set_at(tree, key, value)
            for rate, paths in arm.rates.items():
                for key in paths:
                    set_at(tree, key, {**config.grids, **arm.grids}[rate][0])
            parse_config(TrainConfig, tree, source=path.name)
    with pytest.raises(SystemExit):
        main([])
    assert "give the YAML file of a comparison" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["configs/compare/demo.yaml", "--report", "out/compare/demo"])
    assert "is not for --aggregate and --report" in capsys.readouterr().err
    assert main(["--aggregate", "no/such/folder"]) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_stages_end_to_end(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(settings(dataset, tmp_path / "out", trials=1, seeds=[1])))
    assert main([str(path)]) == 0
    comparison = read_comparison(tmp_path / "out")
    assert "muon reaches test NDCG@10" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "figures" / "spectra-1.png").is_file()
    assert len(comparison.current) == 4
    control, muon = (comparison.finals(arm)[0] for arm in ("control", "muon"))
    assert control.fingerprints == muon.fingerprints and len(muon.fingerprints) == 3
    assert muon.curve_step == (1, 2, 3, 4, 5, 6)
    assert muon.test["ndcg@10"] == pytest.approx(muon.per_target("ndcg@10").mean())
    assert 0 < muon.optimizer_share < 1 and muon.peak_memory_bytes > 2**20 and muon.device == "cpu"
    assert {(one.what, one.step) for one in muon.spectra} == {(w, s) for w in ("weight", "update") for s in range(1, 7)}

    def stable_ranks(run):
        return [one.stable_rank for one in run.spectra if one.what == "update" and "feedforward.0" in one.name]

    # The paper's mechanism: Muon's update has nearly the full rank, 8 here.
    assert min(stable_ranks(muon)) > max(stable_ranks(control))
    assert os.listdir(tmp_path / "out" / "runs")


def test_the_help_lists_the_settings_and_the_arms_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    for name in (*CompareConfig.model_fields, *(f"arms.NAME.{name}" for name in ArmConfig.model_fields)):
        assert re.search(rf"^  {re.escape(name)}  |^{name}, which", told, re.MULTILINE), name
    assert all(f"    {arm}:\n" in told for arm in ("one-rate", "control", "muon"))
