"""The train stage as a user runs it: killed and started again, resumed, refused, and stopped by a bad loss."""

import json
import logging
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from muonrec import checkpoint
from muonrec.checkpoint.marker import MARKER, record_files, write_marker
from muonrec.checkpoint.weights import local_pieces
from muonrec.config import load_config
from muonrec.data.synthetic import SyntheticSource
from muonrec.embeddings.fused import fused_tables
from muonrec.embeddings.joined import AccumulatedStep
from muonrec.losses import NextItemLoss
from muonrec.mesh import Ranks
from muonrec.models import SASRec, SASRecConfig
from muonrec.runlog import Clock
from pipeline import export
from pipeline.data import DataConfig, build_dataset
from pipeline.train import Run, load_run, train
from pipeline.train_config import TrainConfig
from tests.chaos.starts import Start, TorchrunStart
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import whole

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


@pytest.mark.parametrize("launch", [Start, pytest.param(TorchrunStart, marks=pytest.mark.slow)])
def test_killed_at_a_random_step_and_started_again_the_losses_are_those_of_the_uninterrupted_run(
    dataset,
    tmp_path,
    launch,
):
    path = config_file(dataset, tmp_path)
    run_on_ranks(2, train_from, path, f"output={tmp_path / 'whole'}")
    expected = losses(tmp_path / "whole")
    assert [step for step, _ in expected] == list(range(1, 31))

    start = launch(2, path, tmp_path / "start")
    kill_at = random.Random(time.time_ns()).randint(6, 28)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not start.is_over():
        if metrics.is_file() and len(losses_so_far(metrics)) >= kill_at:
            break
        time.sleep(0.005)
    start.kill()
    written = len(losses_so_far(metrics))
    assert written >= kill_at, start.log()

    run_on_ranks(2, train_from, path)
    assert losses(tmp_path / "run") == expected, f"killed after step {written}"
    assert validations(tmp_path / "run") == validations(tmp_path / "whole")


@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_three_ranks_started_again_repeat_the_sums_of_the_uninterrupted_run(dataset, tmp_path, dense):
    # Three addends can be added in several orders; DDP's buckets, arranged anew after a first step, would change them.
    path = config_file(dataset, tmp_path, num_steps=20, dense_sharding=dense)
    run_on_ranks(3, leg, path, 20, [f"output={tmp_path / 'whole'}"])
    for end in (8, 20):
        run_on_ranks(3, leg, path, end, [])
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


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
    write_marker(saved, record_files(saved, [path.name for path in saved.iterdir() if path.name != MARKER]))
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


def damage(folder, kind):
    """Spoil a checkpoint; what the warning must say of it."""
    shard = folder / "__0_0.distcp"
    data = shard.read_bytes()
    at = random.Random(kind).randrange(len(data))
    if kind == "truncated":
        shard.write_bytes(data[:at])
        return f"has {at:,} bytes"
    if kind == "bit flipped":
        shard.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        return "__0_0.distcp was altered"
    if kind == "file missing":
        (folder / ".metadata").unlink()
        return ".metadata is missing"
    if kind == "other version":
        (folder / MARKER).write_text(json.dumps({"schema_version": 99, "files": {}}))
        return "checkpoint schema 99"
    # Of another model: a whole one, under the name of this.
    shutil.rmtree(folder)
    shutil.copytree(Path(kind), folder)
    return "is of another model"


def train_and_listen(path, *overrides):
    """Train; what was warned of."""
    warned = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("muonrec").addHandler(handler)
    try:
        train_from(path, *overrides)
    finally:
        logging.getLogger("muonrec").removeHandler(handler)
    return warned


def test_a_checkpoint_that_cannot_be_used_is_named_and_the_one_before_used(dataset, tmp_path):
    settings = {"num_steps": 6, "validation": {"every_steps": 3}, "checkpoints": {"every_steps": 2}}
    path = config_file(dataset, tmp_path, **settings)
    narrow = {"name": "sasrec", "embedding_dim": 16, "max_length": 30}
    run_on_ranks(2, train_from, path, f"model={json.dumps(narrow)}", f"output={tmp_path / 'narrow'}")
    run_on_ranks(2, train_from, path)
    expected, last = losses(tmp_path / "run"), tmp_path / "run" / "checkpoints" / "step-00000006"
    foreign = tmp_path / "narrow" / "checkpoints" / last.name
    for kind in ("truncated", "bit flipped", "file missing", "other version", str(foreign)):
        fault = damage(last, kind)
        warned, others = run_on_ranks(2, train_and_listen, path)
        assert len(warned) == 2 and fault in warned[0] and others == [], kind
        assert "step-00000006" in warned[0] and warned[0].endswith("; step-00000004 is used instead")
        assert warned[1] == f"{last} is renamed to unusable-step-00000006"
        assert losses(tmp_path / "run") == expected, kind
        assert (last.parent / "unusable-step-00000006").is_dir() and last.is_dir()


def test_when_no_checkpoint_can_be_used_nothing_starts_anew(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=4, checkpoints={"every_steps": 2})
    run_on_ranks(1, train_from, path)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        damage(folder, "truncated")
    message = run_on_ranks(1, refusal, path)[0]
    assert "no checkpoint in" in message and "step-00000002" in message and "step-00000004" in message
    assert checkpoints(tmp_path / "run") == ["step-00000002", "step-00000004"]


class Stopped(BaseException):
    """Ends a leg after a checkpoint."""


def leg(path, until, overrides):
    """Train until the checkpoint of step ``until``; ``[(step, user ids)]`` of this rank's batches."""
    seen, save, batches = [], Run.save, Run.batches

    def stop(self, root, step, best):
        save(self, root, step, best)
        if step == until:
            raise Stopped

    def watched(self, step, end):
        for batch in batches(self, step, end):
            seen.append((batch.step, sorted(batch.user_ids.tolist())))
            yield batch

    Run.save, Run.batches = stop, watched
    try:
        train_from(path, *overrides)
    except Stopped:
        pass
    finally:
        Run.save, Run.batches = save, batches
    return seen


def global_batches(of_ranks):
    """User ids of each step's global batch, and that no step was seen twice by a rank."""
    batches = {}
    for seen in of_ranks:
        assert len({step for step, _ in seen}) == len(seen)
        for step, users in seen:
            batches[step] = sorted(batches.get(step, []) + users)
    return batches


@pytest.mark.parametrize(
    "legs",
    [
        [(2, "ddp", "row_wise"), (3, "fsdp2", "table_wise"), (1, "ddp", "table_wise"), (4, "fsdp2", "row_wise")],
        [(4, "fsdp2", "table_wise"), (1, "fsdp2", "row_wise"), (3, "ddp", "row_wise"), (2, "ddp", "table_wise")],
    ],
)
def test_any_ranks_and_shardings_one_after_another_see_the_same_batches_and_losses(dataset, tmp_path, legs):
    # Dropout is drawn by each rank for its own users, so losses can be compared without it alone.
    model = {"name": "sasrec", "embedding_dim": 32, "dropout": 0.0, "max_length": 30}
    every = {"validation": {"every_steps": 5, "max_users": 50}, "checkpoints": {"every_steps": 100}}
    path = config_file(dataset, tmp_path, num_steps=20, model=model, **every)
    whole = global_batches(run_on_ranks(1, leg, path, 20, [f"output={tmp_path / 'whole'}"]))
    found = {}
    for number, (num_ranks, dense, sharding) in enumerate(legs, start=1):
        overrides = [f"dense_sharding={dense}", f"tables.item.sharding={sharding}"]
        new = global_batches(run_on_ranks(num_ranks, leg, path, 5 * number, overrides))
        assert not new.keys() & found.keys()  # none twice
        found.update(new)
    assert found == whole  # none lost
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert [step for step, _ in got] == list(range(1, 21))
    # Sums over ranks are taken in another order, which Muon's bfloat16 iteration magnifies.
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in expected], rel=2e-4)


def state_at_start(path, *overrides):
    """What a run starts from: weights, this rank's part of the optimizers' state, and what the log says."""
    config = load_config(TrainConfig, path, overrides)
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("pipeline.train")
    level, _ = logger.level, logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        run = Run.start(config, this_rank())
        step, _ = run.resume(config.output / "checkpoints")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    weights = {name: whole(value) for name, value in run.model.state_dict().items()}
    state = {
        f"{name}/{key}": torch.cat([piece.flatten().clone() for piece, _ in local_pieces(value)])
        for name, of_parameter in run.optimizer.state_dict()["state"].items()
        for key, value in of_parameter.items()
    }
    return step, weights, state, [line for line in said if line.startswith("started from")]


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_goes_on_with_the_other_dense_optimizer(dataset, tmp_path, before, after):
    path = config_file(dataset, tmp_path, num_steps=4, dense_optimizer=before)
    run_on_ranks(1, train_from, path)
    other = f"dense_optimizer={after}"
    message = run_on_ranks(1, refusal, path, other)[0]
    assert "whose dense_optimizer differ from this config; pass output=another/folder" in message
    assert f"to go on from its weights with the other optimizer, add init_from={tmp_path / 'run'}" in message

    onwards = (other, f"output={tmp_path / 'onwards'}", f"init_from={tmp_path / 'run'}")
    _, weights, state, _ = run_on_ranks(1, state_at_start, path)[0]
    step, got_weights, got_state, said = run_on_ranks(1, state_at_start, path, *onwards)[0]
    assert step == 0
    assert said == [
        f"started from {tmp_path}/run/checkpoints/step-00000004, step 4: weights and the tables' optimizer state are "
        "kept, the momentum of the dense optimizers starts afresh"
    ]
    assert all(torch.equal(got_weights[name], weights[name]) for name in weights)
    for name, value in got_state.items():
        if name.startswith("embeddings."):
            assert torch.equal(value, state[name]) and value.any()
        else:
            assert not value.any(), name
    # It is a run of its own from here on, which resumes from itself.
    run_on_ranks(1, train_from, path, *onwards)
    assert [step for step, _ in losses(tmp_path / "onwards")] == [1, 2, 3, 4]
    assert losses(tmp_path / "onwards")[0][1] < losses(tmp_path / "run")[0][1]
    step, _, _, said = run_on_ranks(1, state_at_start, path, *onwards)[0]
    assert (step, said) == (4, [])


def exported(run, file):
    """What `python -m pipeline.export` returns, and the file loaded into a plain model of one process."""
    status = export.main([str(run), str(file)])
    model = SASRec(SASRecConfig(embedding_dim=32, max_length=30), num_items=120, loss=NextItemLoss("full_softmax"))
    model.embeddings.to_empty(device="cpu")
    notes = checkpoint.import_weights(file, model)
    return status, notes, {name: value.clone() for name, value in model.state_dict().items()}


def test_a_run_is_exported_and_another_starts_from_the_file(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=4, dense_sharding="fsdp2")
    run_on_ranks(3, train_from, path)
    file = tmp_path / "weights.safetensors"
    status, notes, plain = run_on_ranks(1, exported, tmp_path / "run", file)[0]
    assert status == 0 and notes["step"] == "4"
    _, weights, _, _ = run_on_ranks(1, state_at_start, path)[0]
    assert plain.keys() == weights.keys() and all(torch.equal(plain[name], weights[name]) for name in weights)

    onwards = (f"output={tmp_path / 'onwards'}", f"init_from={file}")
    for _, got, state, said in run_on_ranks(2, state_at_start, path, *onwards):
        assert all(torch.equal(got[name], weights[name]) for name in weights)
        assert not any(value.any() for value in state.values())
        assert said == [] or "every optimizer starts afresh, tables too" in said[0]
    narrow = json.dumps({"name": "sasrec", "embedding_dim": 16, "max_length": 30})
    message = run_on_ranks(1, refusal, path, *onwards, f"model={narrow}")[0]
    assert f"{file} is of another model" in message and "item.weight is [120, 32] there and [120, 16] here" in message


def test_a_start_from_what_is_no_run_says_what_to_pass(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=1)
    message = run_on_ranks(1, refusal, path, f"init_from={tmp_path / 'nothing'}")[0]
    assert "is no run with a finished checkpoint, no checkpoint and no file" in message


# Micro-batches and precision -----------------------------------------------------------------------------------------


def accumulated_gradients(path, accumulate_steps, dense):
    """Of the last, ragged step of an epoch: dense gradients and loss; after each micro-batch whether the table moved,
    and the gradient of a bias on this rank.
    """
    overrides = [f"accumulate_steps={accumulate_steps}", f"dense_sharding={dense}"]
    run = Run.start(load_config(TrainConfig, path, overrides), this_rank())
    run.model.train()
    accumulated, last = AccumulatedStep(run.optimizer, run.model), run.steps_per_epoch - 1
    batches, loss, moved, biases = run.batches(last, last + 1), 0.0, [], []
    table, bias = "embeddings.embeddings.item.weight", run.model.module.tower.norm.bias
    for _ in accumulated.over(run.micro_steps(last)):
        before = whole(run.model.state_dict()[table])
        accumulated.zero_grad()
        part, statistics = run.model(next(batches))
        part.backward()
        loss += statistics["loss_nats"]
        moved.append(not torch.equal(before, whole(run.model.state_dict()[table])))
        biases.append(bias.grad.clone() if dense == "ddp" else None)
    gradients = {name: whole(p.grad) for name, p in run.model.named_parameters() if "embeddings" not in name}
    return loss, gradients, moved, biases


@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
@pytest.mark.parametrize("accumulate_steps", [2, 4])
def test_micro_batches_add_up_to_the_gradient_of_the_global_batch(dataset, tmp_path, accumulate_steps, dense):
    path = config_file(
        dataset,
        tmp_path,
        loss="full_softmax",
        model={"name": "sasrec", "embedding_dim": 32, "dropout": 0.0, "max_length": 30},
        tables={"item": {"lr": 1e-7, "optimizer": "sgd"}},  # moves at every micro-batch, and too little to be seen
        num_streams=8,
    )
    loss, gradients, moved, _ = run_on_ranks(1, accumulated_gradients, path, 1, "ddp")[0]
    assert moved == [True]
    found = run_on_ranks(2, accumulated_gradients, path, accumulate_steps, dense)
    if dense == "ddp":  # reduces with the last micro-batch, and not before
        are_equal = [torch.equal(first, second) for first, second in zip(found[0][3], found[1][3], strict=True)]
        assert are_equal == [False] * (len(are_equal) - 1) + [True]
    for got_loss, got, got_moved, _ in found:
        assert got_loss == pytest.approx(loss, rel=1e-5)
        assert len(got_moved) in range(2, accumulate_steps + 1) and all(got_moved)
        assert got.keys() == gradients.keys()
        for name, expected in gradients.items():
            # float32 sums in another order
            torch.testing.assert_close(got[name], expected, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_in_micro_batches_follows_the_run_in_whole_ones_and_resumes(dataset, tmp_path):
    path = config_file(
        dataset,
        tmp_path,
        loss="full_softmax",
        model={"name": "sasrec", "embedding_dim": 32, "dropout": 0.0, "max_length": 30},
        tables={"item": {"lr": 0.01, "optimizer": "sgd"}},
        num_streams=8,
        num_epochs=2,
        num_steps=None,
    )
    of = {}
    for num_ranks, accumulate_steps in [(1, 1), (2, 2), (2, 4)]:
        output = tmp_path / str(accumulate_steps)
        settings = (f"accumulate_steps={accumulate_steps}", f"output={output}")
        run_on_ranks(num_ranks, train_from, path, *settings)
        of[accumulate_steps] = losses(output)
        newest = sorted((output / "checkpoints").iterdir())[-1]
        shutil.rmtree(newest)
        run_on_ranks(num_ranks, train_from, path, *settings)
        assert losses(output) == of[accumulate_steps]  # resumed in the middle of an epoch: bit for bit
    for accumulate_steps in (2, 4):
        assert [step for step, _ in of[accumulate_steps]] == [step for step, _ in of[1]]
        # The table has moved a little between the micro-batches.
        assert [x for _, x in of[accumulate_steps]] == pytest.approx([x for _, x in of[1]], rel=1e-3)


def test_bf16_trains_like_fp32_and_keeps_everything_that_is_kept_in_float32(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=12, loss={"name": "sampled_softmax", "num_negatives": 32})
    for precision in ("fp32", "bf16"):
        settings = (f"precision={precision}", f"output={tmp_path / precision}")
        run_on_ranks(2, train_from, path, *settings)
        _, weights, state, _ = run_on_ranks(2, state_at_start, path, *settings)[0]
        assert {value.dtype for value in (*weights.values(), *state.values())} == {torch.float32}
    fp32, bf16 = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert fp32 != bf16
    # Three digits of bfloat16.
    assert [x for _, x in bf16] == pytest.approx([x for _, x in fp32], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_trains_like_fp32_on_cuda(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=12)
    for precision in ("fp32", "bf16"):
        command = [sys.executable, "-m", "pipeline.train", path, f"precision={precision}"]
        subprocess.run([*command, f"output={tmp_path / precision}"], cwd=ROOT, check=True)
    fp32, bf16 = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert fp32 != bf16
    assert [x for _, x in bf16] == pytest.approx([x for _, x in fp32], rel=1e-2)  # three digits of bfloat16


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
        time.sleep(0.5)
        assert clock.seconds == before
    assert 5.0 <= clock.seconds < before + 0.5


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
        ("tables.item.optimizer=adamax", "tables.item.optimizer: .* 'rowwise_adagrad', 'adagrad'"),
        ("dense_optimizer=sgd", "dense_optimizer: .*'muon', 'adamw'"),
        ("dense_optimizer={name: muon, ns_coefficients: polar}", "ns_coefficients: .*'jordan' or 'polar_express'"),
        ("dense_optimizer={name: muon, normuon_beta2: 1}", "normuon_beta2: .*less than 1"),
        ("num_epochs=3", "give num_epochs or num_steps, one of them"),
        ("precision=fp16", "precision: .*'fp32' or 'bf16'"),
        ("accumulate_steps=3", "batch_size 64 is not a multiple of accumulate_steps 3 times num_streams 32"),
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
    assert load_config(TrainConfig, path, ["schedules.tables=constant"]).schedules["tables"].name == "constant"


MUON_OPTIONS = {
    "normuon_beta2": 0.95, "cautious_weight_decay": True, "ns_coefficients": "polar_express", "ns_gram": True,
    "momentum": 0.9, "nesterov": False, "ns_steps": 4, "weight_decay": 0.2, "adjust_lr_fn": "original",
}  # fmt: skip


def options_of_muon(path):
    run = Run.start(load_config(TrainConfig, path), this_rank())
    (group,) = run.optimizer.parts["muon"].param_groups
    return {key: group[key] for key in MUON_OPTIONS}


def test_every_option_of_muon_reaches_it_and_its_state_resumes(dataset, tmp_path):
    muon = {"name": "muon", "lr": 0.01, **MUON_OPTIONS}
    path = config_file(dataset, tmp_path, num_steps=6, checkpoints={"every_steps": 3}, dense_optimizer=muon)
    assert run_on_ranks(2, options_of_muon, path) == [MUON_OPTIONS] * 2
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    run_on_ranks(2, train_from, path)
    whole_run = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    run_on_ranks(2, train_from, path)
    assert losses(tmp_path / "run")[-3:] == whole_run[-3:]
