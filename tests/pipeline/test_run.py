"""The driver submits in order, stops at the first failure with its cause, and goes on where it stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torchx", reason="pip install 'muonrec[torchx]'")

from torchx.specs import AppState, AppStatus

from pipeline import run as driver

ROOT = Path(__file__).parents[2]
# A stand-in for the three stages, found first in the working directory of local_cwd.
STAGE = """
import os, pathlib, sys, time
where, stage = pathlib.Path.cwd(), os.environ["STAGE"]
with (where / "calls").open("a") as calls:
    calls.write(" ".join([stage, *sys.argv[1:]]) + chr(10))
if (where / f"break-{stage}").exists():
    sys.exit(f"{stage}: the disk is full; free some space")
if (where / f"hang-{stage}").exists():
    time.sleep(100)
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder as the clone's root, with stages that only write down how they were called."""
    shutil.copytree(ROOT / "components", tmp_path / "components")
    (tmp_path / "pipeline").mkdir()
    for stage, module in (("data", "data"), ("train", "train"), ("evaluate", "eval")):
        text = f"import os\nos.environ['STAGE'] = '{stage}'\n{STAGE}"
        (tmp_path / "pipeline" / f"{module}.py").write_text(text)
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    # test_stages.py runs the real torchrun, which takes seconds to load torch.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "torchrun").write_text('#!/bin/bash\nwhile [ "$1" != -m ]; do shift; done\nexec python "$@"\n')
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    monkeypatch.setattr(driver, "Driver", partial(driver.Driver, sleep=lambda _: time.sleep(0.02)))
    monkeypatch.chdir(tmp_path)
    tools = (str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"])
    monkeypatch.setenv("PATH", os.pathsep.join(tools))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():  # the driver has taken them over
        signal.signal(number, handler)


def calls(clone):
    path = clone / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def state(clone):
    return json.loads((clone / "out" / "a.launch.json").read_text())["stages"]


def test_stages_run_in_order_and_a_second_start_does_nothing(clone, caplog):
    arguments = ["a.yaml", "data.k_core=5", "num_steps=3", "--settings", "mask_seen=true", "--j", "1x1"]
    assert driver.main(arguments) == 0
    run = state(clone)["train"]["run"]
    assert run == f"out/{state(clone)['train']['handle'].rpartition('/')[2]}"
    assert calls(clone) == [
        "data a.yaml data.k_core=5",
        f"train a.yaml output={run} data.k_core=5 num_steps=3",
        f"evaluate {run} mask_seen=true",
    ]
    assert driver.main(arguments) == 0
    assert calls(clone) == []
    # Other settings of the eval stage make that stage alone run again.
    arguments[4] = "mask_seen=false"
    assert driver.main(arguments) == 0
    assert calls(clone) == [f"evaluate {run} mask_seen=false"]


def test_the_first_failure_stops_with_its_cause_and_the_next_start_goes_on_in_the_same_folder(clone, caplog):
    (clone / "break-train").touch()
    arguments = ["a.yaml", "--j", "1x1", "--train", "--max_restarts 0"]
    assert driver.main(arguments) == 1
    assert "train ended as FAILED" in caplog.text and "train: the disk is full; free some space" in caplog.text
    run = state(clone)["train"]["run"]
    assert [line.split()[0] for line in calls(clone)] == ["data", "train"]
    (clone / "break-train").unlink()
    assert driver.main(arguments) == 0
    train, evaluate = calls(clone)
    assert train.endswith(f" output={run}") and evaluate == f"evaluate {run}"  # the last override of a setting wins
    assert state(clone)["train"]["run"] == run


def test_another_request_does_not_go_on_with_the_progress_of_this_one(clone, caplog):
    (clone / "break-data").touch()
    assert driver.main(["a.yaml"]) == 1
    assert driver.main(["a.yaml", "num_steps=4"]) == 1
    assert "holds the progress of a request with another overrides; pass --state ANOTHER.json" in caplog.text
    (clone / "a.yaml").write_text("seed: 2\n")
    assert driver.main(["a.yaml"]) == 1
    assert "another config" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.yaml", "--scheduler", "slrum"], "--scheduler slrum is not known; pass one of"),
        (["a.yaml", "output=there"], "pass --out instead of output="),
        (["b.yaml"], "config b.yaml does not exist"),
    ],
)
def test_what_cannot_be_submitted_says_what_to_do(clone, caplog, arguments, message):
    assert driver.main(arguments) == 1
    assert message in caplog.text and calls(clone) == []


def test_the_driver_needs_the_root_of_the_clone(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert driver.main(["a.yaml"]) == 1
    assert "start from the root of the clone" in caplog.text


def test_a_dry_run_prints_three_requests_and_submits_none(clone, capsys):
    assert driver.main(["a.yaml", "--scheduler", "slurm", "--cfg", "partition=gpu", "--out", "/o", "--dryrun"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("#SBATCH --job-name") == 3 and printed.count("--partition=gpu") == 3
    assert "-m pipeline.eval '\"'\"'/o/<id of train>'\"'\"'" in printed
    assert calls(clone) == []


def test_ctrl_c_ends_the_jobs_of_this_machine_and_the_next_start_goes_on(clone):
    (clone / "hang-data").touch()
    # Not by PYTHONPATH, which the stages would inherit.
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline import run; sys.exit(run.main(['a.yaml']))"
    started = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert started.stderr is not None
    deadline = time.monotonic() + 60
    while not (clone / "calls").exists() or state(clone)["data"]["state"] != "submitted":
        assert time.monotonic() < deadline and started.poll() is None, started.stderr.read()
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130 and "stopped by Ctrl-C; start the same command again to go on" in said
    assert state(clone)["data"]["state"] == "submitted"


def test_the_driver_needs_no_torch():
    program = (
        "import sys, pipeline.run, torchx.runner; print(sorted({'torch', 'torchrec', 'fbgemm_gpu'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# What a cluster does that this machine's scheduler does not ----------------------------------------------------------


class Cluster:
    """A runner whose jobs have the states one gives them; ``None``: unknown, an exception: no answer."""

    scheduler = "slurm://torchx/"

    def __init__(self, **states):
        self.states = {handle: list(of) for handle, of in states.items()}
        self.submitted = []

    def dryrun_component(self, component, arguments, scheduler, cfg):
        role = SimpleNamespace(num_replicas=2)
        return SimpleNamespace(
            app=SimpleNamespace(roles=[role]), arguments=arguments, stage=component.rpartition(":")[2]
        )

    def schedule(self, request):
        self.submitted.append(request.arguments)
        return f"{self.scheduler}{request.stage}{len(self.submitted)}"

    def status(self, handle):
        states = self.states[handle.rpartition("/")[2]]
        found = states.pop(0) if len(states) > 1 else states[0]
        if isinstance(found, Exception):
            raise found
        return None if found is None else AppStatus(AppState[found])

    def log_lines(self, handle, role, replica, streams=None):
        return [f"line {number} of {role}/{replica}\n" for number in range(100)]


def drive(tmp_path, cluster, **records):
    """Complete the train stage, given what an earlier driver wrote down."""
    path = tmp_path / "state.json"
    known = driver.State(path, {}, {stage: {"settings": [], "replicas": 2, **of} for stage, of in records.items()})
    options = SimpleNamespace(
        scheduler="slurm", overrides=[], out="/o", config="a.yaml", j=None, image=None, env=None, mounts=None, pod=None,
        settings="", data="", train="", evaluate="",
    )  # fmt: skip
    driver.Driver(cluster, options, {}, sleep=lambda _: None).complete("train", known)
    return json.loads(path.read_text())["stages"]["train"]


def test_a_job_that_still_runs_is_waited_for_and_not_submitted_again(tmp_path):
    cluster = Cluster(j7=["RUNNING", "PENDING", "RUNNING", "SUCCEEDED"])
    record = drive(tmp_path, cluster, train={"state": "submitted", "handle": "slurm://torchx/j7", "run": "/o/j7"})
    assert (cluster.submitted, record["state"], record["run"]) == ([], "SUCCEEDED", "/o/j7")


@pytest.mark.parametrize("before", [{"state": "FAILED"}, {"state": "submitted"}])
def test_a_run_that_failed_goes_on_in_its_folder_as_another_job(tmp_path, before):
    cluster = Cluster(j7=["FAILED"], train1=["SUCCEEDED"])
    record = drive(tmp_path, cluster, train={**before, "handle": "slurm://torchx/j7", "run": "/o/j7"})
    assert record["run"] == "/o/j7" and record["handle"].endswith("/train1")
    assert cluster.submitted == [["--config", "a.yaml", "--out", "/o", "--", "output=/o/j7"]]


def test_a_job_that_looks_failed_until_slurm_requeues_it_has_not_failed(tmp_path):
    cluster = Cluster(train1=["RUNNING", "FAILED", "PENDING", "RUNNING", "SUCCEEDED"])
    assert drive(tmp_path, cluster)["state"] == "SUCCEEDED"


@pytest.mark.parametrize("scheduler", ["slurm://torchx/", "local_cwd://torchx/", "kubernetes://torchx/muonrec:"])
def test_the_runs_folder_is_named_by_the_app_id(tmp_path, scheduler):
    cluster = Cluster(**{f"{scheduler}train1".rpartition("/")[2]: ["SUCCEEDED"]})
    cluster.scheduler = scheduler
    assert drive(tmp_path, cluster)["run"] == "/o/train1"


def test_a_failure_shows_the_end_of_every_replicas_log(tmp_path):
    with pytest.raises(driver.StageFailed, match="train ended as CANCELLED: slurm://torchx/train1") as failure:
        drive(tmp_path, Cluster(train1=["RUNNING", "CANCELLED"]))
    lines = str(failure.value).splitlines()
    assert lines[1:3] == ["--- train/0", "line 60 of train/0"] and "line 99 of train/1" in lines


def test_a_scheduler_that_does_not_answer_for_a_while_is_asked_again(tmp_path):
    cluster = Cluster(train1=[None, OSError("squeue: timed out"), "RUNNING", None, "SUCCEEDED"])
    assert drive(tmp_path, cluster)["state"] == "SUCCEEDED"


def test_a_job_that_nobody_knows_any_more_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "_PATIENCE_S", -1.0)
    with pytest.raises(OSError, match=r"has said nothing of slurm://torchx/train1 .* the job was left alone"):
        drive(tmp_path, Cluster(train1=[None]))


def test_a_silent_scheduler_does_not_make_a_second_job(tmp_path):
    cluster = Cluster(j7=[OSError("squeue: timed out")])
    with pytest.raises(OSError, match="does not answer about slurm://torchx/j7"):
        drive(tmp_path, cluster, train={"state": "submitted", "handle": "slurm://torchx/j7", "run": "/o/j7"})
    assert cluster.submitted == []


def test_a_driver_ended_while_it_submitted_says_so(tmp_path, caplog):
    drive(tmp_path, Cluster(train1=["SUCCEEDED"]), train={"state": "submitting"})
    assert "if a job of it runs, cancel one of the two" in caplog.text
