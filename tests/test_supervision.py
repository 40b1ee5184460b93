"""A run that is asked to stop saves at one step on all ranks, and a run that was taken over writes nothing more."""

import json
import os
import signal
import time

import pytest
import torch

from muonrec import checkpoint, supervision
from muonrec.checkpoint import writing
from muonrec.checkpoint.marker import record_files
from muonrec.config import load_config
from muonrec.mesh import Ranks
from muonrec.supervision import Lease, Superseded
from pipeline.train import Run, train
from pipeline.train_config import TrainConfig
from tests.distributed.ranks import run_on_ranks
from tests.pipeline import test_train
from tests.pipeline.test_train import config_file, losses, this_rank, train_from

dataset = test_train.dataset  # the fixture


def interrupted(path, at, rank, what):
    """Train, and at step ``at`` do ``what`` on ``rank``; the step at which this rank ended, and how."""
    seen, set_rates = [], Run.set_rates

    def watched(run, step):
        seen.append(step)
        if step == at and run.ranks.rank == rank:
            what(run)
        return set_rates(run, step)

    before = signal.getsignal(signal.SIGTERM)
    Run.set_rates = watched
    try:
        train(load_config(TrainConfig, path), this_rank())
        ended = "well"
    except SystemExit as error:
        ended = error.code
    except Superseded as error:
        ended = str(error)
    finally:
        Run.set_rates = set_rates
    assert signal.getsignal(signal.SIGTERM) == before
    return seen[-1], ended


def terminate(run):
    os.kill(os.getpid(), signal.SIGTERM)


def take_over(run):
    Lease(run.config.output).take()
    time.sleep(1.1)  # the lease is looked at once a second


@pytest.mark.parametrize(("num_ranks", "rank"), [(1, 0), (3, 2)])
def test_sigterm_on_one_rank_saves_one_step_on_all_and_the_next_start_continues_the_same_losses(
    dataset,
    tmp_path,
    num_ranks,
    rank,
):
    # Not DDP: its buckets change after the first step of every start, so that three ranks add in another order.
    path = config_file(dataset, tmp_path, num_steps=20, dense_sharding="fsdp2")
    run_on_ranks(num_ranks, train_from, path, f"output={tmp_path / 'whole'}")
    ended = run_on_ranks(num_ranks, interrupted, path, 13, rank, terminate)
    assert len(set(ended)) == 1
    last, status = ended[0]
    assert status == 143 and last in (13, 14)
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest == checkpoint.step_folder(newest.parent, last + 1)
    run_on_ranks(num_ranks, train_from, path)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_sigterm_where_a_checkpoint_has_just_been_written_does_not_write_it_again(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=20)
    assert run_on_ranks(1, interrupted, path, 6, 0, terminate) == [(7, 143)]  # at step 8, which is saved by itself
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step-00000008"


def test_a_run_that_was_taken_over_ends_on_all_ranks_and_writes_no_checkpoint(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=20)
    ended = run_on_ranks(2, interrupted, path, 6, 0, take_over)
    assert all("was taken over by process" in how and "writes nothing more" in how for _, how in ended)
    assert {last for last, _ in ended} <= {6, 7}
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step-00000004"
    run_on_ranks(2, train_from, path)
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 21))


def test_before_a_checkpoint_the_lease_is_looked_at_however_recent_the_last_look(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=20)
    ended = run_on_ranks(2, interrupted, path, 3, 0, take_at_once)
    assert all("was taken over" in how for _, how in ended)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None


def take_at_once(run):
    Lease(run.config.output).take()


def test_a_rank_that_hangs_writes_where(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervision, "_HANGS_AFTER_S", 0.2)
    with supervision.Supervision(tmp_path, Ranks(0, 1, torch.device("cpu"))) as watching:
        assert not watching.must_stop()
        time.sleep(2.0)
    said = capfd.readouterr().err
    assert "Timeout" in said and "in test_a_rank_that_hangs_writes_where" in said
    time.sleep(0.3)
    assert capfd.readouterr().err == ""  # the end of the run is no hang


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_hangs_inside_a_checkpoint_writes_where(tmp_path, monkeypatch, capfd, asynchronous):
    monkeypatch.setattr(supervision, "_HANGS_AFTER_S", 0.5)
    monkeypatch.setattr(writing, "record_files", hanging)
    with (
        supervision.Supervision(tmp_path, Ranks(0, 1, torch.device("cpu"))) as watching,
        checkpoint.Writer(tmp_path, keep=1, asynchronous=asynchronous) as writer,
    ):
        assert not watching.must_stop()
        writer.save(1, torch.nn.Linear(2, 2))
        writer.finish()
    said = capfd.readouterr().err
    assert "Timeout" in said and " in hanging" in said


def hanging(folder, names):
    time.sleep(1.5)
    return record_files(folder, names)


def collective_timeouts(path):
    """Of every process group of a run with asynchronous checkpoints, where the training's is the test's own."""
    watching = supervision.Supervision(path, this_rank())
    writer = checkpoint.Writer(path, keep=1, asynchronous=True)
    groups = (watching._group, writer._group)
    found = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    with watching, writer:
        return found


def test_no_collective_waits_for_half_an_hour(tmp_path):
    assert run_on_ranks(2, collective_timeouts, tmp_path) == [[600.0, 600.0]] * 2


def test_a_lease_belongs_to_whoever_took_it_last(tmp_path):
    first, second = Lease(tmp_path / "run"), Lease(tmp_path / "run")
    first.take()
    assert first.is_ours() and not second.is_ours()
    second.take()
    assert second.is_ours() and not first.is_ours()
    assert json.loads((tmp_path / "run" / "lease.json").read_text())["pid"] == os.getpid()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lease.json"]


def test_a_superseded_torchrun_does_not_take_the_lease_back_by_restarting_its_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    old = Lease(tmp_path)
    old.take()
    Lease(tmp_path).take()  # a restart in place
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    new = Lease(tmp_path)
    new.take()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    with pytest.raises(Superseded, match="was taken over by process"):
        Lease(tmp_path).take()
    assert new.is_ours()


def test_a_job_that_slurm_started_again_ends_well_and_a_different_job_with_an_error(tmp_path, monkeypatch):
    # A script of TorchX requeues its job after a failure: that of a lost node would requeue the copy that took over.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    old = Lease(tmp_path)
    old.take()
    Lease(tmp_path).take()
    assert old.end_of_it().code == 0
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert isinstance(old.end_of_it(), Superseded)


def test_a_run_whose_folder_was_deleted_may_not_write(tmp_path):
    lease = Lease(tmp_path)
    lease.take()
    (tmp_path / "lease.json").unlink()
    assert not lease.is_ours() and "the file is gone" in str(lease.end_of_it())
