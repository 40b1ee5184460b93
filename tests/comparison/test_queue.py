"""The queue, over commands that are small Python programs."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from muonrec.comparison.queue import QUEUE_STATE, Job, Queue, available_cores, slots, steps_done
from muonrec.runlog import Progress

# Three steps; how it ends is the second argument, and `mark` files in its folder say what happened.
TRAIN = """
import json, pathlib, signal, sys, time
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
with (folder / "starts").open("a") as file:
    file.write("x")
starts = len((folder / "starts").read_text())
if how == "waits":
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").write_text(""), sys.exit(143)))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\\n")
    if starts == 1:
        time.sleep(60)
if how == "fails" or (how == "fails once" and starts == 1):
    print("no memory", file=sys.stderr)
    sys.exit(1)
if how == "diverges":
    print("E the loss of step 3 is nan on rank 0")
    prefix = "E1122 08:00:00.000 7 torch/distributed/elastic/multiprocessing/api.py:984] "
    print(prefix + "failed (exitcode: 1) local_rank: 0 (pid: 9) of binary: python", *["=" * 60] * 40, sep="\\n")
    sys.exit(1)
(folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s}) + "\\n" for s in (1, 2, 3)))
"""
EVALUATE = "import pathlib, sys; pathlib.Path(sys.argv[1], 'evaluated').write_text(sys.argv[2])"


def job(folder, how):
    train = (sys.executable, "-c", TRAIN, str(folder), how)
    evaluate = (sys.executable, "-c", EVALUATE, str(folder), "once")
    return Job(folder, (train, evaluate), 3, how)


def run(jobs, *, num_slots=2, tries=2):
    ended, progress = {}, Progress("compare", "steps", total=3 * len(jobs), enabled=False)
    Queue([{}] * num_slots, progress, tries=tries).run(jobs, lambda job, how: ended.update({job.folder.name: how}))
    return ended, progress


def test_failures_are_tried_again_then_reported_and_stop_nobody(tmp_path):
    jobs = [job(tmp_path / how.replace(" ", "-"), how) for how in ("fails", "fine", "fails once", "diverges")]
    ended, progress = run(jobs)
    statuses = {name: how.status for name, how in ended.items()}
    assert statuses == {"fine": "done", "fails": "failed", "fails-once": "done", "diverges": "diverged"}
    assert ended["fails"].fault == "exit status 1\nno memory"
    assert ended["diverges"].fault == "E the loss of step 3 is nan on rank 0"  # and not what torchrun said after it
    starts = {name: len((tmp_path / name / "starts").read_text()) for name in statuses}
    assert starts == {"fine": 1, "fails": 2, "fails-once": 2, "diverges": 1}
    assert (tmp_path / "fine" / "evaluated").read_text() == "once"
    assert not (tmp_path / "fails" / "evaluated").exists()
    assert ended["fine"].wall_s > 0
    assert progress.done == 12

    (tmp_path / "fine" / "evaluated").unlink()  # done before, as when results.parquet was lost
    ended, _ = run(jobs[1:2])
    assert ended["fine"].status == "done"
    assert len((tmp_path / "fine" / "starts").read_text()) == 1
    assert not (tmp_path / "fine" / "evaluated").exists()


def test_an_interrupted_queue_lets_its_runs_save_and_goes_on_with_them(tmp_path):
    waiting = job(tmp_path / "waits", "waits")

    def interrupt():
        while not (tmp_path / "waits" / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    # Other libraries leave handlers of their own behind in a test process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run([waiting, job(tmp_path / "later", "fine")], num_slots=1)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert time.monotonic() - started < 30
    assert (tmp_path / "waits" / "saved").exists()
    assert not (tmp_path / "later").exists()
    assert json.loads((tmp_path / "waits" / QUEUE_STATE).read_text())["commands_done"] == 0

    ended, progress = run([waiting])
    assert ended["waits"].status == "done"
    assert (tmp_path / "waits" / "evaluated").exists()
    assert progress.done == 2  # the first step was done before


def test_an_error_of_the_caller_stops_what_runs(tmp_path):
    def refuse(job, how):
        raise ValueError("not alike")

    jobs = [job(tmp_path / "waits", "waits"), job(tmp_path / "fine", "fine")]
    with pytest.raises(ValueError, match="not alike"):
        Queue([{}, {}], Progress("compare", "steps", total=6, enabled=False)).run(jobs, refuse)
    assert (tmp_path / "waits" / "saved").exists() or not (tmp_path / "waits" / "metrics.jsonl").exists()


def test_steps_are_read_from_the_last_whole_line(tmp_path):
    assert steps_done(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss_nats": 1.0}\n{"step": 20}\n{"step": 3')
    assert steps_done(tmp_path) == 20


def test_cores_are_those_of_the_affinity_and_of_the_containers_limit(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    for limit, cores in (("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("6400000 100000", 4)):
        monkeypatch.setattr("pathlib.Path.is_file", lambda _: True)
        monkeypatch.setattr("pathlib.Path.read_text", lambda _, limit=limit: f"{limit}\n")
        assert available_cores() == cores
    monkeypatch.setattr("pathlib.Path.is_file", lambda _: False)
    assert available_cores() == 4


def test_slots_share_cores_and_divide_devices(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots(None, ranks=2, devices=0, cores=8) == [{"OMP_NUM_THREADS": "1"}] * 4
    assert slots(1, ranks=2, devices=0, cores=8) == [{"OMP_NUM_THREADS": "4"}]
    for asked, got in (("1", "1"), ("64", "4")):  # fewer are the user's wish, more would be all of a job's cores
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert slots(1, ranks=2, devices=0, cores=8) == [{"OMP_NUM_THREADS": got}]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(None, ranks=2, devices=5, cores=8)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(None, ranks=1, devices=2, cores=8)] == ["4", "6"]
    with pytest.raises(ValueError, match="2 parallel runs of 2 ranks were asked, but there are 2 devices"):
        slots(2, ranks=2, devices=2, cores=8)
