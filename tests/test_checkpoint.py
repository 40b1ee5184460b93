"""Checkpoints: whole or nothing, by name, for another number of ranks and another sharding."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from muonrec import checkpoint
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import CPU, batches_of, joined, sharded, whole


def trained_to(step, end, dmp, optimizer):
    pipeline = TrainPipelineSparseDist(dmp, optimizer, CPU)
    dmp.train()
    batches = batches_of("full_softmax").iterate(step, end)
    return [pipeline.progress(batches)["loss_nats"] for _ in range(step, end)]


def save_at_three(folder, dense, sharding):
    """Train 3 steps, save, train 3 more; the later losses and the state at step 3."""
    dmp, _ = sharded(dense=dense, sharding=sharding)
    optimizer = joined(dmp)
    trained_to(0, 3, dmp, optimizer)
    checkpoint.save(folder, dmp, optimizer, progress={"step": 3})
    weights = {name: whole(value) for name, value in dmp.state_dict().items()}
    return weights, trained_to(3, 6, dmp, optimizer)


def load_and_go_on(folder, dense, sharding):
    dmp, _ = sharded(dense=dense, sharding=sharding, std=0.5)
    optimizer = joined(dmp)
    progress = checkpoint.load(folder, dmp, optimizer)
    weights = {name: whole(value) for name, value in dmp.state_dict().items()}
    return progress, weights, trained_to(progress["step"], 6, dmp, optimizer)


@pytest.mark.parametrize(
    ("num_ranks", "dense", "sharding"),
    [(2, "ddp", "row_wise"), (1, "ddp", "table_wise"), (3, "fsdp2", "row_wise"), (2, "fsdp2", "table_wise")],
)
def test_a_checkpoint_of_two_ranks_continues_on_others(tmp_path, num_ranks, dense, sharding):
    weights, losses = run_on_ranks(2, save_at_three, str(tmp_path / "step-3"), "ddp", "row_wise")[0]
    for progress, got, got_losses in run_on_ranks(num_ranks, load_and_go_on, str(tmp_path / "step-3"), dense, sharding):
        assert progress == {"step": 3}
        for name in weights:
            assert torch.equal(got[name], weights[name]), name
        if (num_ranks, dense, sharding) == (2, "ddp", "row_wise"):
            assert got_losses == losses  # same ranks: bit for bit
        else:
            assert got_losses == pytest.approx(losses, rel=1e-5)  # float32 sums in another order


def interrupted(folder):
    dmp, _ = sharded()
    optimizer = joined(dmp)
    messages = []
    (Path(folder) / "half").mkdir(exist_ok=True)
    for attempt in (
        lambda: checkpoint.load(f"{folder}/half", dmp, optimizer),
        lambda: checkpoint.save(f"{folder}/step-00000002", dmp, optimizer),
        lambda: checkpoint.load(f"{folder}/old", dmp, optimizer),
    ):
        try:
            attempt()
        except ValueError as error:
            messages.append(str(error))
    return messages


def committed(folder, version=checkpoint.SCHEMA_VERSION):
    folder.mkdir(parents=True)
    (folder / "COMMITTED").write_text(json.dumps({"schema_version": version, "files": {}}))


def test_only_what_is_finished_counts(tmp_path):
    for step in (2, 10):
        committed(checkpoint.step_folder(tmp_path, step))
    checkpoint.step_folder(tmp_path, 30).mkdir()  # cut off before its marker
    assert checkpoint.newest(tmp_path) == checkpoint.step_folder(tmp_path, 10)
    assert checkpoint.newest(tmp_path / "nothing") is None
    committed(tmp_path / "old", version=0)
    half, finished, old = run_on_ranks(1, interrupted, str(tmp_path))[0]
    assert "half is not a finished checkpoint" in half
    assert "is a finished checkpoint already" in finished
    assert "schema 0, this version of muonrec reads 2" in old


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5):
        committed(checkpoint.step_folder(tmp_path, step))
    checkpoint.prune(tmp_path, keep=2, best=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (2, 4, 5)]


def test_what_cut_off_saves_and_deletions_left_is_cleared(tmp_path):
    committed(checkpoint.step_folder(tmp_path, 9))
    for step in (3, 12):
        checkpoint.step_folder(tmp_path, step).mkdir()
    checkpoint.prune(tmp_path, keep=1, best=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009"]


def full_disk(folder):
    dmp, _ = sharded()
    write_item, writer = filesystem._write_item, filesystem
    if dist.get_rank() == 1:
        writer._write_item = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    try:
        checkpoint.save(folder, dmp)
    except OSError as error:
        return str(error), checkpoint.is_committed(folder)
    finally:
        writer._write_item = write_item


def test_a_full_disk_on_one_rank_is_an_error_on_every_rank_and_commits_nothing(tmp_path):
    for message, is_committed in run_on_ranks(2, full_disk, str(tmp_path / "step-1")):
        assert "step-1 could not be written" in message and "No space left on device') on rank 1" in message
        assert not is_committed


def replaced(folder):
    dmp, _ = sharded()
    left = Path(folder) / "step-1"
    if dist.get_rank() == 0:
        left.mkdir()
        (left / "garbage").write_text("of an interrupted save")
    dist.barrier()
    checkpoint.save(left, dmp, progress={"step": 1}, files={"resolved.yaml": "seed: 0"})
    assert (left / "resolved.yaml").read_text() == "seed: 0"
    return (left / "garbage").exists(), checkpoint.is_committed(left), checkpoint.read_progress(left)


def test_an_unfinished_checkpoint_is_replaced(tmp_path):
    assert run_on_ranks(2, replaced, str(tmp_path)) == [(False, True, {"step": 1})] * 2
