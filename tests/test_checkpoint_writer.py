"""Checkpoints written beside the training: what they hold, when they are there, and how a failure is told."""

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from muonrec import checkpoint
from muonrec.checkpoint import writing
from muonrec.config import load_config
from pipeline.train import train
from pipeline.train_config import TrainConfig
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import joined, sharded, whole
from tests.pipeline import test_train
from tests.pipeline.test_train import config_file, losses, this_rank, train_from, validations
from tests.test_checkpoint import load_and_go_on, trained_to
from tests.test_supervision import interrupted, terminate

dataset = test_train.dataset  # the fixture


class held:
    """Within it nothing is written until it is let go, `writing._write` waits."""

    def __enter__(self):
        self.write, self.go = writing._write, threading.Event()

        def waiting(*work, **settings):
            assert self.go.wait(60)
            self.write(*work, **settings)

        writing._write = waiting
        return self.go

    def __exit__(self, *_):
        self.go.set()
        writing._write = self.write


def save_beside_three_steps(root, dense):
    """Save at step 3 and train 3 more before anything is written; state at step 3, later losses, what was there."""
    dmp, _ = sharded(dense=dense)
    optimizer = joined(dmp)
    trained_to(0, 3, dmp, optimizer)
    weights = {name: whole(value) for name, value in dmp.state_dict().items()}
    with checkpoint.Writer(Path(root), keep=1, asynchronous=True) as writer:
        with held():
            writer.save(3, dmp, optimizer, progress={"step": 3})
            later = trained_to(3, 6, dmp, optimizer)
            before = checkpoint.newest(root)
        writer.finish()
        after = checkpoint.newest(root)
    return weights, later, before, after


def test_the_thread_that_writes_is_on_the_device_of_its_rank(tmp_path, monkeypatch):
    devices = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda to: devices.update({threading.current_thread().name: to}))
    with checkpoint.Writer(tmp_path, keep=1, asynchronous=True) as writer:
        writer.save(1, torch.nn.Linear(2, 2))
    assert devices == {"muonrec-checkpoint": 3}
    assert checkpoint.newest(tmp_path)


@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_what_is_written_beside_the_training_is_the_state_at_the_save(tmp_path, dense):
    weights, later, before, after = run_on_ranks(2, save_beside_three_steps, str(tmp_path), dense)[0]
    assert before is None and after.name == "step-00000003"
    for progress, got, got_losses in run_on_ranks(2, load_and_go_on, str(after), dense, "row_wise"):
        assert progress == {"step": 3}
        assert all(torch.equal(got[name], weights[name]) for name in weights)
        assert got_losses == later


def test_a_run_with_asynchronous_checkpoints_is_the_run_with_others_and_resumes_bit_for_bit(dataset, tmp_path):
    path, beside = config_file(dataset, tmp_path, num_steps=20), "checkpoints.asynchronous=true"
    run_on_ranks(2, train_from, path, f"output={tmp_path / 'whole'}")
    run_on_ranks(2, train_from, path, beside)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert test_train.checkpoints(tmp_path / "run") == test_train.checkpoints(tmp_path / "whole")
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest.name == "step-00000020"
    (newest / "COMMITTED").unlink()
    run_on_ranks(2, train_from, path, beside)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert validations(tmp_path / "run") == validations(tmp_path / "whole")


def pauses(root, asynchronous):
    """For which saves held up their caller, where writing takes two seconds."""
    dmp, _ = sharded()
    record_files, found = writing.record_files, []
    writing.record_files = lambda *work: time.sleep(2.0) or record_files(*work)
    try:
        with checkpoint.Writer(Path(root), keep=1, asynchronous=asynchronous) as writer:
            for step in (1, 2):
                writer.save(step, dmp)
                found.append(writer.pause_s)
                assert asynchronous or checkpoint.newest(root).name == f"step-0000000{step}"
    finally:
        writing.record_files = record_files
    return found, [folder.name for folder in checkpoint.finished(root)]


def test_training_stands_still_for_the_copy_alone_and_the_next_save_waits_for_the_one_before(tmp_path):
    for (first, second), kept in run_on_ranks(2, pauses, tmp_path / "beside", True):
        assert first < 1.5 < second and kept == ["step-00000002"]
    for (first, second), kept in run_on_ranks(2, pauses, tmp_path / "in place", False):
        assert first > 1.5 < second and kept == ["step-00000002"]


def train_where_rank_1_cannot_write(path, from_step):
    """Train until writing fails on one rank; how it ended here."""
    record_files = writing.record_files

    def full(folder, names):
        if dist.get_rank() == 1 and int(folder.name.removeprefix("step-")) >= from_step:
            raise OSError(28, "No space left on device")
        return record_files(folder, names)

    writing.record_files = full
    try:
        train(load_config(TrainConfig, path, ["checkpoints.asynchronous=true"]), this_rank())
    except OSError as error:
        return str(error)
    finally:
        writing.record_files = record_files
    return "well"


def test_a_failure_of_the_writing_ends_the_run_on_every_rank_and_the_one_before_is_newest(dataset, tmp_path):
    path = config_file(
        dataset, tmp_path, num_steps=400, checkpoints={"every_steps": 400}, validation={"every_steps": 60}
    )
    ended = run_on_ranks(2, train_where_rank_1_cannot_write, path, 120)
    assert all("No space left on device" in how for how in ended)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step-00000060"
    assert losses(tmp_path / "run")[-1][0] < 170  # at the next step or so, and not at the next save


def save_what_was_taken_over(root):
    dmp, _ = sharded()
    try:
        with checkpoint.Writer(Path(root), keep=1, asynchronous=True, may_commit=lambda: False) as writer:
            writer.save(1, dmp)
    except ValueError as error:
        return str(error), checkpoint.newest(root)


def test_a_run_that_was_taken_over_while_it_wrote_commits_nothing(tmp_path):
    for message, newest in run_on_ranks(2, save_what_was_taken_over, str(tmp_path)):
        assert "was left unfinished: another start of the run has taken it over" in message and newest is None


def interrupted_while_it_writes(path):
    """SIGTERM at step 6, where writing takes half a second; where and how it ended, and the newest checkpoint."""
    record_files = writing.record_files
    writing.record_files = lambda *work: time.sleep(0.5) or record_files(*work)
    try:
        last, status = interrupted(path, 6, 0, terminate)
    finally:
        writing.record_files = record_files
    return last + 1, status, checkpoint.newest(path.parent / "run" / "checkpoints").name


def test_sigterm_waits_for_what_is_being_written(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=20, checkpoints={"every_steps": 4, "asynchronous": True})
    for step, status, newest in run_on_ranks(2, interrupted_while_it_writes, path):
        assert status == 143 and newest == f"step-{step:08d}"


def end_at_once(root):
    for _ in range(30):
        with checkpoint.Writer(Path(root), keep=1, asynchronous=True):
            pass  # as a run that had finished and is started again
    return "well"


def test_a_writer_that_ends_at_once_waits_for_the_ranks_that_still_join(tmp_path):
    assert run_on_ranks(2, end_at_once, tmp_path) == ["well"] * 2
