"""The train stage as a user runs it: killed and started again, resumed, refused, and stopped by a bad loss."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from muonrec.config import load_config
from muonrec.data.synthetic import SyntheticSource
from muonrec.embeddings.fused import fused_tables
from muonrec.mesh import Ranks
from pipeline.data import DataConfig, build_dataset
from pipeline.train import Clock, Run, TrainConfig, load_run, train
from tests.distributed.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "data"
    build_dataset(DataConfig(source=SyntheticSource(format="synthetic", num_users=300, num_items=120), output=folder))
    return folder


def config_file(dataset, tmp_path, **settings):
    tree = {
        "output": str(tmp_path / "run"),
        "data": {"source": {"format": "synthetic", "num_users": 300, "num_items": 120}, "output": str(dataset)},
        "model": {"name": "sasrec", "embedding_dim": 32, "dropout": 0.2, "max_length": 30},
        "loss": {"name": "sampled_softmax", "num_negatives": 32},
        "tables": {"item": {"lr": 0.1, "sharding": "row_wise"}},
        "batch_size": 64,
        "num_steps": 30,
        "log_every_steps": 1,
        "tensorboard": False,
        "validation": {"every_steps": 10, "max_users": 100},
        "checkpoints": {"every_steps": 4, "keep": 2},
        **settings,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss_nats"]) for line in lines if "loss_nats" in line]


def validations(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["valid_ndcg@10"]) for line in lines if "valid_ndcg@10" in line]


def this_rank():
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.device("cpu"))


def train_from(path, *overrides):
    train(load_config(TrainConfig, path, overrides), this_rank())


def torchrun(path, *overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "-m", "pipeline.train", str(path), *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(process):
    """SIGKILL for torchrun; its ranks lead sessions of their own, and die with it since `join_ranks` says so."""
    process.kill()
    process.wait(timeout=30)


@pytest.mark.timeout(240)
def test_killed_at_a_random_step_and_started_again_the_losses_are_those_of_the_uninterrupted_run(dataset, tmp_path):
    path = config_file(dataset, tmp_path)
    run_on_ranks(2, train_from, path, f"output={tmp_path / 'whole'}", timeout_s=120)
    expected = losses(tmp_path / "whole")
    assert [step for step, _ in expected] == list(range(1, 31))

    process = torchrun(path)
    kill_at = random.Random(time.time_ns()).randint(6, 28)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and len(losses_so_far(metrics)) >= kill_at:
            break
        time.sleep(0.005)
    kill(process)
    output = process.stdout.read()  # ends when the last rank has
    written = len(losses_so_far(metrics))
    assert written >= kill_at, output

    run_on_ranks(2, train_from, path, timeout_s=120)
    assert losses(tmp_path / "run") == expected, f"killed after step {written}"
    assert validations(tmp_path / "run") == validations(tmp_path / "whole")


def losses_so_far(metrics):
    return [line for line in metrics.read_text().splitlines() if '"loss_nats"' in line]


def resumed_at(path):
    config = load_config(TrainConfig, path)
    run = Run.start(config, this_rank())
    return run.resume(config.output / "checkpoints")[0]


def test_a_finished_run_is_not_trained_again_and_other_ranks_can_load_it(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=12, dense_sharding="fsdp2")
    run_on_ranks(2, train_from, path)
    before = losses(tmp_path / "run")
    run_on_ranks(2, train_from, path)
    assert losses(tmp_path / "run") == before
    assert run_on_ranks(2, resumed_at, path) == [12, 12]
    for which in ("best", "last"):
        vectors = run_on_ranks(1, item_vectors, tmp_path / "run", which)[0]
        for got in run_on_ranks(2, item_vectors, tmp_path / "run", which):
            assert torch.equal(got, vectors)


def test_a_data_set_that_was_rebuilt_from_another_source_is_noticed(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=4)
    run_on_ranks(1, train_from, path)
    saved = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert load_config(TrainConfig, saved / "resolved.yaml") == load_config(TrainConfig, path)
    progress = json.loads((saved / "progress.json").read_text())
    (saved / "progress.json").write_text(json.dumps({**progress, "data": "of another log"}))
    assert "was trained on other data" in run_on_ranks(1, refusal, path)[0]


def item_vectors(run, which):
    encoder, _, _, _ = load_run(run, which, this_rank())
    return encoder.item_vectors(torch.arange(120))


def poisoned(path):
    """A run whose table turns bad after four steps; the table before and after the step that must not happen."""
    config = load_config(TrainConfig, path)
    run = Run.start(config, this_rank())
    run.model.train()
    batches = run.loader.iterate(0, 6)
    for _ in range(4):
        batch = next(batches)
        run.optimizer.zero_grad()
        run.model(batch)[0].backward()
        run.optimizer.step()
    with torch.no_grad():
        run.model.module.tower.position.weight[0, 0] = float("nan")
    table = run.model.state_dict()["embeddings.embeddings.item.weight"].local_shards()[0].tensor
    before = table.clone()
    run.optimizer.zero_grad()
    try:
        run.model(next(batches))[0].backward()
    except FloatingPointError as error:
        return str(error), torch.equal(before, table)
    return "no error", False


def test_a_loss_that_is_not_finite_stops_every_rank_before_the_tables_swallow_it(dataset, tmp_path):
    for message, unchanged in run_on_ranks(2, poisoned, config_file(dataset, tmp_path)):
        assert "the loss of step 4 is nan on rank 0" in message
        assert unchanged


def test_early_stopping_ends_the_run_and_keeps_the_best(dataset, tmp_path):
    # With rates this small nothing improves for long.
    path = config_file(
        dataset,
        tmp_path,
        num_steps=400,
        tables={"item": {"lr": 1e-12, "sharding": "row_wise"}},
        dense_optimizer={"name": "adamw", "lr": 1e-12},
        adamw={"lr": 1e-12},
        validation={"every_steps": 2, "max_users": 50, "patience": 3},
    )
    run_on_ranks(1, train_from, path)
    stopped_at = losses(tmp_path / "run")[-1][0]
    assert stopped_at < 400
    run_on_ranks(1, train_from, path)
    assert losses(tmp_path / "run")[-1][0] == stopped_at


class Cut(BaseException):
    """Stands for SIGKILL: nothing after it is done."""


def cut_after(path, num_writes):
    """Train until the ``num_writes``-th file of the run is about to be written or moved into place."""
    left, write_text, rename = [num_writes], Path.write_text, Path.rename

    def counted(function):
        def call(self, *arguments, **settings):
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            return function(self, *arguments, **settings)

        return call

    Path.write_text, Path.rename = counted(write_text), counted(rename)
    try:
        train_from(path)
    except (Cut, OSError):  # within DCP it arrives as the failure of the save
        return True
    finally:
        Path.write_text, Path.rename = write_text, rename
    return False


@pytest.mark.timeout(240)
def test_cut_before_any_file_is_written_the_run_goes_on_as_if_nothing_had_happened(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=4, checkpoints={"every_steps": 3}, validation={"every_steps": 2})
    run_on_ranks(1, train_from, path)
    expected = [losses(tmp_path / "run"), validations(tmp_path / "run"), checkpoints(tmp_path / "run")]
    shutil.rmtree(tmp_path / "run")
    num_writes, is_cut = 0, True
    while is_cut:
        is_cut = run_on_ranks(1, cut_after, path, num_writes)[0]  # each goes on where the one before was cut
        num_writes += 1
    assert num_writes > 10
    assert [losses(tmp_path / "run"), validations(tmp_path / "run"), checkpoints(tmp_path / "run")] == expected


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def rates_of(path):
    run = Run.start(load_config(TrainConfig, path), this_rank())
    return run.set_rates(0), [table.lr for table in fused_tables(run.model)]


def test_every_rank_logs_the_rate_of_the_table_that_another_one_holds(dataset, tmp_path):
    schedule = {"name": "constant", "warmup_fraction": 0.1}
    path = config_file(dataset, tmp_path, tables={"item": {"lr": 0.1, "sharding": "table_wise"}}, schedule=schedule)
    for rates, table_lrs in run_on_ranks(2, rates_of, path):
        assert rates == pytest.approx({"lr_tables": 0.1 / 3, "lr_muon": 3e-3 / 3, "lr_adamw": 1e-3 / 3})
        assert table_lrs == pytest.approx([0.1])  # the rate reaches FBGEMM with the step


def test_the_clock_stands_while_it_is_paused():
    clock = Clock(already_s=5.0)
    with clock.paused():
        before = clock.seconds
        time.sleep(0.02)
        assert clock.seconds == before
    assert 5.0 <= clock.seconds < before + 0.02


def test_a_seed_of_any_size_is_taken(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=1, seed=2**40)
    run_on_ranks(1, train_from, path)
    assert len(losses(tmp_path / "run")) == 1


def test_a_config_that_differs_from_the_run_in_its_folder_is_refused(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=2)
    run_on_ranks(1, train_from, path)
    message = run_on_ranks(1, refusal, path, "batch_size=96")[0]
    assert "holds a run whose batch_size differ from this config" in message
    assert run_on_ranks(1, refusal, path, "dense_sharding=fsdp2")[0] == "accepted"


def refusal(path, *overrides):
    try:
        train_from(path, *overrides)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bath_size=3", "bath_size: is not a known setting"),
        ("tables.item.optimizer=adam", "tables.item.optimizer: .* 'rowwise_adagrad', 'adagrad' or 'sgd'"),
        ("dense_optimizer=sgd", "dense_optimizer: .*'muon', 'adamw'"),
        ("num_epochs=3", "give num_epochs or num_steps, one of them"),
        ("loss.temperature=0", "loss.temperature: .*greater than 0"),
        ("model.dropout", "is not of the form key=value"),
    ],
)
def test_a_setting_that_is_wrong_is_named_by_its_path(dataset, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(TrainConfig, config_file(dataset, tmp_path), [override])


def test_a_choice_can_be_made_by_name_alone(dataset, tmp_path):
    path = config_file(dataset, tmp_path, dense_optimizer={"name": "muon", "lr": 0.02, "momentum": 0.9})
    config = load_config(TrainConfig, path, ["dense_optimizer=adamw", "dense_optimizer.lr=0.01"])
    assert (config.dense_optimizer.name, config.dense_optimizer.lr) == ("adamw", 0.01)
