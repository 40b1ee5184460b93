"""Launched for real through TorchX, then broken in every way SLURM knows; each loss curve against the undisturbed one.

All share two nodes of two processors, one after another. MUONREC_KEEP_SLURM=1 keeps the cluster's folder.
"""

import json
import re
import signal
import subprocess
import sys

import pytest

from tests.slurm.cluster import Cluster, Unavailable, install, kill, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

CONFIG = "configs/demo/sasrec.yaml"
NUM_STEPS = 240
DATA = ["data.output=data", "data.source.num_users=600"]
# Without dropout the losses of other numbers of ranks can be compared; a constant rate, those of other lengths. FSDP2:
# DDP arranges its buckets anew after the first step of every start, so that three or more ranks add in another order.
SETTINGS = [
    *DATA, "num_epochs=null", f"num_steps={NUM_STEPS}", "log_every_steps=1", "tensorboard=false",
    "dense_sharding=fsdp2",
    "loss=sampled_softmax", "model.embedding_dim=32", "model.max_length=20", "model.dropout=0.0",
    "schedule={name: constant, warmup_fraction: 0}",
    "validation={every_steps: 120, max_users: 50}", "checkpoints.every_steps=20",
]  # fmt: skip
SIZE = ["--config", CONFIG, "--cpu", "2", "--memMB", "6000"]
TWO_NODES, ONE_NODE = [*SIZE, "--j", "2x2"], [*SIZE, "--j", "1x2"]
# Sums over other ranks are taken in another order, which Muon's bfloat16 iteration magnifies from step to step.
OTHER_RANKS = 2e-2


@pytest.fixture(scope="module")
def cluster():
    try:
        install()
    except Unavailable as why:
        pytest.skip(f"no SLURM here: {why}")
    with Cluster.started() as cluster:
        yield cluster


def driver(cluster, *arguments):
    command = [sys.executable, "-m", "pipeline.run", CONFIG, "--scheduler", "slurm", "--cfg", "partition=debug"]
    size = "--cpu 2 --memMB 6000"
    return [*command, "--j", "2x2", "--data", size, "--train", size, "--evaluate", size, *arguments, *SETTINGS]


@pytest.fixture(scope="module")
def undisturbed(cluster):
    """The run of the three stages, 2 nodes of 2 ranks, by the driver."""
    said = cluster.call(*driver(cluster), timeout_s=900)
    stages = json.loads((cluster.work / "out" / "demo-sasrec.launch.json").read_text())["stages"]
    return cluster.work / stages["train"]["run"], said


@pytest.fixture(scope="module")
def losses(undisturbed):
    return losses_of(undisturbed[0])


def losses_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss_nats"] for line in lines if "loss_nats" in line}


def steps_done(run):
    path = run / "metrics.jsonl"
    return path.read_text().count('"loss_nats"') if path.exists() else 0


def running(cluster, *arguments, step=45, cfg="partition=debug", settings=SETTINGS, **env):
    """A train job that has made ``step`` steps, and its folder."""
    job = cluster.submit("train", *arguments, "--", *settings, cfg=cfg, **env)
    run = cluster.work / "out" / job
    try:
        wait_for(lambda: steps_done(run) >= step, 300, f"step {step} of job {job}")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.job(job)}\n{cluster.log(job)[-4000:]}") from None
    return job, run


def restarts(cluster, job):
    return int(cluster.job(job).get("Restarts", 0))


def restarted(cluster, job):
    """Wait until SLURM has put the job back into its queue."""
    wait_for(lambda: restarts(cluster, job) == 1, 180, f"the requeue of job {job}")


def resumed_at(cluster, job):
    return [int(step) for step in re.findall(r"resumed from \S+step-(\d+)", cluster.log(job))]


# The road ------------------------------------------------------------------------------------------------------------


def test_the_driver_takes_three_stages_through_slurm(cluster, undisturbed, losses):
    run, said = undisturbed
    assert re.findall(r"(\w+): SUCCEEDED", said) == ["data", "train", "evaluate"]
    assert list(losses) == list(range(1, NUM_STEPS + 1)) and losses[NUM_STEPS] < losses[1] - 1
    assert json.loads((run / "metrics.json").read_text())["num_users"] == 600
    assert (run / "report.html").is_file()
    again = cluster.call(*driver(cluster))
    assert again.count("done before (slurm://torchx/") == 3


def test_status_log_list_cancel_and_a_driver_that_comes_back(cluster, undisturbed):
    state = ("--state", "other.json")
    first = subprocess.Popen(
        driver(cluster, *state), cwd=cluster.work, env=cluster.env, stderr=subprocess.PIPE, text=True
    )  # fmt: skip

    def handle():
        path = cluster.work / "other.json"
        return path.exists() and json.loads(path.read_text())["stages"].get("train", {}).get("handle")

    handle = wait_for(handle, 180, "the submission of train")
    job = handle.rpartition("/")[2]
    wait_for(lambda: steps_done(cluster.work / "out" / job) >= 5, 300, "some steps")
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130 and f"torchx cancel {handle} ends it" in said

    assert "State: RUNNING" in cluster.torchx("status", handle)
    assert "optimizer of each parameter" in cluster.torchx("log", "--streams", "stderr", handle)
    assert handle in cluster.torchx("list", "-s", "slurm")

    second = subprocess.Popen(
        driver(cluster, *state), cwd=cluster.work, env=cluster.env, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    wait_for(lambda: "waited for" in (second.stderr.readline()), 60, "the second driver")
    cluster.torchx("cancel", handle)
    assert cluster.wait(job) == "CANCELLED"
    _, said = second.communicate(timeout=120)
    assert second.returncode == 1 and f"train ended as CANCELLED: {handle}" in said
    assert "CANCELLED" in cluster.torchx("status", handle)


def test_the_plain_script_trains_without_torchx(cluster, losses):
    said = cluster.call(
        "sbatch", "--parsable", "--nodes", "2", "--mem", "6G", "--output", "plain-%j.err",
        "docs/launch/train.sbatch", CONFIG, *SETTINGS, OUT="out", PROCS="2",
    )  # fmt: skip
    job = said.strip()
    assert cluster.wait(job) == "COMPLETED", (cluster.work / f"plain-{job}.err").read_text()[-3000:]
    assert losses_of(cluster.work / "out" / job) == losses


# Faults --------------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_restarted_in_place(cluster, losses):
    job, run = running(cluster, *TWO_NODES)
    kill(cluster.workers(job)[3], signal.SIGKILL)
    assert cluster.wait(job) == "COMPLETED"
    assert restarts(cluster, job) == 0 and len(resumed_at(cluster, job)) == 1
    assert losses_of(run) == losses


def test_a_preempted_job_saves_at_once_and_goes_on_from_there(cluster, losses):
    job, run = running(cluster, *TWO_NODES, "--max_retries", "0")
    cluster.call("scontrol", "requeue", job)
    restarted(cluster, job)
    assert cluster.wait(job) == "COMPLETED"
    (stopped,) = map(int, re.findall(r"stopped by SIGTERM at step (\d+), which is saved", cluster.log(job)))
    assert stopped >= 45 and resumed_at(cluster, job) == [stopped]
    assert losses_of(run) == losses  # and no retry was needed for it: there was none


def test_a_lost_node_requeues_the_job(cluster, losses):
    job, run = running(cluster, *TWO_NODES)
    cluster.lose_node(job, "n2")
    try:
        restarted(cluster, job)
    finally:
        cluster.start_slurmd("n2")
    assert cluster.wait(job) == "COMPLETED"
    assert len(resumed_at(cluster, job)) >= 1 and losses_of(run) == losses


def test_a_copy_that_outlives_its_nodes_daemon_writes_nothing_more(cluster, losses):
    cluster.call("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
    try:
        job, run = running(cluster, *ONE_NODE, settings=[*SETTINGS, "num_steps=1500"])
        old = cluster.tasks(job, "n2")
        assert len(old) >= 3
    finally:
        cluster.call("scontrol", "update", "NodeName=n1", "State=RESUME")
    lease = run / "lease.json"
    before = lease.read_text()
    cluster.kill_slurmd("n2")
    try:
        restarted(cluster, job)
        wait_for(lambda: lease.read_text() != before, 180, "the second copy")
        assert cluster.workers(job).keys() and cluster.tasks(job, "n2"), "SLURM ended the first copy: nothing is tested"
        wait_for(lambda: not cluster.tasks(job, "n2"), 60, "the end of the first copy")
        assert cluster.tasks(job, "n1")
        assert f"SLURM has started job {job} again" in cluster.log(job)
    finally:
        cluster.start_slurmd("n2")
    assert cluster.wait(job) == "COMPLETED"
    assert restarts(cluster, job) == 1
    got = losses_of(run)
    assert list(got) == list(range(1, 1501))
    assert [got[step] for step in losses] == pytest.approx(list(losses.values()), rel=OTHER_RANKS)


def test_a_job_that_reaches_its_time_limit_has_saved_before(cluster, losses):
    settings = [*SETTINGS, "num_steps=1000000"]
    job, run = running(
        cluster, *TWO_NODES, step=1, cfg="partition=debug,time=1", settings=settings, SBATCH_SIGNAL="TERM@30"
    )  # fmt: skip
    restarted(cluster, job)
    (stopped,) = map(int, re.findall(r"stopped by SIGTERM at step (\d+), which is saved", cluster.log(job)))
    wait_for(lambda: resumed_at(cluster, job), 300, "the second start")
    assert resumed_at(cluster, job) == [stopped]
    wait_for(lambda: steps_done(run) > stopped, 60, "a step after it")
    cluster.torchx("cancel", f"slurm://torchx/{job}")
    assert cluster.wait(job) == "CANCELLED"
    got = losses_of(run)
    assert len(got) > stopped
    assert all(got[step] == losses[step] for step in losses if step in got)


def test_a_job_that_always_fails_stops_after_its_retries_with_the_cause_in_the_log(cluster):
    job = cluster.submit(
        "train", *ONE_NODE, "--max_retries", "1", "--max_restarts", "0", "--", "data.output=nowhere"
    )  # fmt: skip
    assert cluster.wait(job) == "FAILED"
    assert restarts(cluster, job) == 1
    assert "nowhere" in cluster.log(job) and "python -m pipeline.data" in cluster.log(job)


def test_a_plain_script_that_always_fails_stops_after_its_retries_too(cluster):
    job = cluster.call(
        "sbatch", "--parsable", "--nodes", "1", "--mem", "6G", "--output", "plain-%j.err",
        "docs/launch/train.sbatch", CONFIG, "data.output=nowhere", OUT="out", PROCS="1", RETRIES="1",
    ).strip()  # fmt: skip
    assert cluster.wait(job) == "FAILED" and restarts(cluster, job) == 1
    assert (cluster.work / f"plain-{job}.err").read_text().count("python -m pipeline.data") >= 2


def test_a_job_goes_on_with_another_number_of_nodes(cluster, losses):
    job, run = running(cluster, *TWO_NODES)
    cluster.torchx("cancel", f"slurm://torchx/{job}")
    assert cluster.wait(job) == "CANCELLED"
    other = cluster.submit("train", *ONE_NODE, "--", *SETTINGS, f"output=out/{job}")
    assert cluster.wait(other) == "COMPLETED"
    (start,) = resumed_at(cluster, other)
    got = losses_of(run)
    assert list(got) == list(losses) and start >= 40
    assert [got[step] for step in range(1, start + 1)] == [losses[step] for step in range(1, start + 1)]
    assert list(got.values()) == pytest.approx(list(losses.values()), rel=OTHER_RANKS)
