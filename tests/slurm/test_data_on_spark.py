"""The data stage on two nodes of SLURM, through TorchX: one Spark cluster of both, and what one process builds."""

import pytest

from muonrec.data.manifest import read_manifest, verify_dataset
from tests.data.test_spark import needs_spark
from tests.slurm.test_slurm import CONFIG, cluster  # noqa: F401

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200), *needs_spark[2:]]

SETTINGS = ["data.source.num_users=300", "data.k_core=3", "data.num_shards=3", "data.memory_limit=600MiB"]


def build(cluster, j, output):  # noqa: F811
    size = ["--config", CONFIG, "--cpu", "2", "--memMB", "6000"]
    job = cluster.submit("data", *size, "--j", j, "--", *SETTINGS, f"data.output={output}")
    assert cluster.wait(job, timeout_s=900) == "COMPLETED", cluster.log(job)[-4000:]
    return job


def test_two_nodes_build_what_one_process_builds(cluster):  # noqa: F811
    build(cluster, "1x1", "alone")
    job = build(cluster, "2x1", "together")
    assert "2 workers at spark://n1:" in cluster.log(job)
    assert "the master at n1:" in cluster.log(job)  # what the second replica says when it leaves
    together = verify_dataset(cluster.work / "together", verify_hashes=True)
    assert together.config["engine"] == "spark"
    assert together.files == read_manifest(cluster.work / "alone").files
