"""One look for all stages: lines, progress, errors that a user can mend, and a record that says when it is damaged."""

from __future__ import annotations

import json
import logging
import time

import pytest
import torch.distributed as dist

from muonrec import runlog
from muonrec.runlog import (
    Progress,
    RunLog,
    Stopwatch,
    configure_logging,
    peak_memory_bytes,
    read_metrics,
    run_stage,
)
from tests.distributed.ranks import run_on_ranks


@pytest.fixture
def configured():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(path, *texts):
    path.write_text("\n".join(texts) + "\n")
    return path


def test_only_a_cut_last_line_of_the_record_is_left_out(tmp_path):
    path = lines(tmp_path / "metrics.jsonl", '{"step": 1}', '{"step": 2}', '{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    lines(path, '{"step": 1}', '{"st', '{"step": 3}')
    with pytest.raises(ValueError, match=r"line 2 of 3 is damaged .*; mend or delete that line"):
        read_metrics(path)


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path):
    path = lines(tmp_path / "metrics.jsonl", '{"step": 1}', '{"step": 2}', '{"step": 3}')
    with RunLog(tmp_path, enabled=True, start_step=2, num_steps=4, tensorboard=False) as log:
        log.write(3, loss_nats=0.5)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss_nats": 0.5}]


def test_other_ranks_write_nothing(tmp_path):
    with RunLog(tmp_path, enabled=False, start_step=0, num_steps=4) as log:
        log.write(1, loss_nats=0.5)
        log.show(1, loss_nats=0.5, events_per_s=1.0)
        log.say("nothing")
    assert list(tmp_path.iterdir()) == []


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("asked a, found b; do c"), 1, "asked a, found b; do c"),
        (ImportError("pip install it"), 1, "pip install it"),
        (PermissionError(13, "Permission denied", "/there"), 1, "Permission denied: '/there'"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(configured, capsys, monkeypatch, error, status, said):
    monkeypatch.setattr(runlog, "_is_ours", lambda error: True)  # this file is not
    assert run_stage(raising(error)) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and " E " in line


def test_a_library_s_own_value_error_keeps_its_trace(configured, capsys):
    assert run_stage(lambda: json.loads("{")) == 1
    assert "Traceback" in capsys.readouterr().err
    assert run_stage(lambda: read_metrics_of_a_damaged_file()) == 1
    assert "Traceback" not in capsys.readouterr().err


def read_metrics_of_a_damaged_file():
    from muonrec.config import parse_value

    parse_value("k=[5")


def test_a_rank_that_lost_another_says_so_in_one_line_and_leaves_the_error_to_that_one(configured, capsys):
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5"
    assert run_stage(raising(RuntimeError(lost))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert " W this rank ends, since another one has ended or hangs" in line
    with pytest.raises(RuntimeError):
        run_stage(raising(RuntimeError("shapes cannot be multiplied")))


def test_our_own_bugs_are_not_hidden():
    with pytest.raises(AssertionError):
        run_stage(raising(AssertionError()))
    assert run_stage(lambda: None) == 0


def test_stages_inform_and_libraries_only_warn(configured, capsys):
    logging.getLogger("muonrec.data").info("three events")
    logging.getLogger("elsewhere").info("chatter")
    logging.getLogger("elsewhere").warning("beware")
    said = capsys.readouterr().err.splitlines()
    assert [line[9:] for line in said] == ["I three events", "W beware"]


def fail_alike(which: str) -> bool | None:
    said = None
    if which == "all" or dist.get_rank() == 1:
        said = runlog._speaks_for_all(f"the same fault of {which}")
    dist.barrier()
    return said


@pytest.mark.parametrize(("which", "expected"), [("all", [True, False]), ("one", [None, True])])
def test_several_ranks_say_an_error_once(which, expected):
    assert run_on_ranks(2, fail_alike, which) == expected


def test_progress_without_a_terminal_is_a_line_with_rate_and_eta(configured, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    with Progress("reading events", "events", total=1000) as progress:
        for _ in range(3):
            now[0] += 10.0
            progress.advance(100)
    said = [line[9:] for line in capsys.readouterr().err.splitlines()]
    assert said == ["I reading events: 200 of 1,000 events  10 events/s  ETA 80 s"]
    assert progress.done == 300 and progress.rate == 10.0


def test_progress_counts_the_rate_from_where_it_began(configured, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    progress = Progress("train", "steps", total=1000, done=900)
    now[0] = 10.0
    progress.move_to(920)  # what comes before the first count is no measure of what is to come
    now[0] = 20.0
    progress.move_to(940)
    assert "940 of 1,000 steps  2 steps/s  ETA 30 s" in capsys.readouterr().err


def test_a_stopwatch_counts_its_blocks_alone():
    stopwatch = Stopwatch()
    for _ in range(2):
        with stopwatch:
            time.sleep(0.02)
        time.sleep(0.02)
    assert 0.04 <= (seconds := stopwatch.lap()) and stopwatch.lap() == 0.0
    assert seconds < 10.0


def test_peak_memory_is_in_bytes():
    before = peak_memory_bytes()
    held = bytearray(64 * 2**20)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    # A Python with torch in it holds more than 20 MB and less than a terabyte.
    assert 20e6 < before <= peak_memory_bytes() < 1e12
