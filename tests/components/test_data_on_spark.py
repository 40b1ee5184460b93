"""The data stage on several nodes: the same line on every replica makes a Spark cluster, which ends with its driver."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchx", reason="pip install 'muonrec[torchx]'")

from components import stages
from muonrec.data.manifest import read_manifest, verify_dataset
from pipeline.data import build_dataset, load_data_config
from tests.components.test_stages import ROOT, TorchxRun, render, torchx_run  # noqa: F401
from tests.data.test_spark import needs_spark

DEMO = str(ROOT / "configs" / "demo" / "sasrec.yaml")
SMALL = ["data.source.num_users=300", "data.k_core=3", "data.num_shards=3", "data.memory_limit=600MiB"]


def test_one_node_needs_no_spark() -> None:
    assert "spark" not in stages.data(j="1x1").roles[0].args[1]
    with pytest.raises(ValueError, match="pass j=2x1"):
        stages.data(j="2x4")


@pytest.mark.parametrize(("scheduler", "first_host"), [
    ("local_cwd", "${TORCHX_RANK0_HOST:=localhost}"), ("slurm", "${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}"),
])  # fmt: skip
def test_every_replica_runs_the_same_line_but_for_its_number(scheduler: str, first_host: str) -> None:
    rendered = render(stages.data("data.seed=3", config="a.yaml", j="2x1", cpu=4), scheduler)
    for replica in range(2):
        assert f"muonrec.data.spark_cluster --replica {replica} --num-replicas 2" in rendered
    assert first_host in rendered
    assert "--cores 4 -- python -m pipeline.data a.yaml data.seed=3 data.engine=spark" in rendered


def replica(number: int, num_replicas: int, port: int, *command: str, wait_s: int = 300) -> subprocess.Popen:
    where = ["--hosts", "127.0.0.1", "--port", str(port), "--cores", "1", "--wait-s", str(wait_s)]
    who = ["--replica", str(number), "--num-replicas", str(num_replicas)]
    line = [sys.executable, "-m", "muonrec.data.spark_cluster", *who, *where, "--", *command]
    return subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        leader = replica(0, 1, port, "true")
        assert f"port {port} of 127.0.0.1 is taken; pass another --port" in leader.communicate(timeout=60)[1]
    assert leader.returncode == 1


def test_a_worker_whose_master_never_comes_says_so() -> None:
    worker = replica(1, 2, 1, "true", wait_s=1)
    assert "1 s went by before the master listened at 127.0.0.1:1" in worker.communicate(timeout=60)[1]
    assert worker.returncode == 1


class TestTwoReplicas:
    pytestmark = needs_spark

    def test_two_replicas_build_what_one_process_builds(self, tmp_path: Path, torchx_run: TorchxRun) -> None:  # noqa: F811
        build_dataset(load_data_config(DEMO, [*SMALL, f"data.output={tmp_path / 'alone'}"]))
        output = tmp_path / "together"
        size = ("--j", "2x1", "--cpu", "1")
        torchx_run(ROOT, "data", "--config", DEMO, *size, "--", *SMALL, f"data.output={output}", timeout_s=800)
        together = verify_dataset(output, verify_hashes=True)
        assert together.config["engine"] == "spark"
        assert together.files == read_manifest(tmp_path / "alone").files

    def test_the_status_of_the_driver_is_that_of_the_job(self) -> None:
        master = "spark://127.0.0.1:24311"
        driver = f"import os, sys; sys.exit(7 if '{master}' in os.environ['PYSPARK_SUBMIT_ARGS'] else 1)"
        worker, leader = (replica(number, 2, 24311, sys.executable, "-c", driver) for number in (1, 0))
        try:
            assert leader.wait(400) == 7
            assert worker.wait(60) == 0  # has left because the master has
        finally:
            for process in (worker, leader):
                process.terminate()
