"""The stages as TorchX components: ``torchx run components/stages.py:train --config CONFIG -- key=value ...``.

Data, train and evaluate are three apps: TorchX starts all roles of one app together. ``python -m pipeline.run CONFIG``
submits them one after the other; compare stands for itself. docs/launch.md explains every argument, per scheduler.
"""

from typing import Dict, List, Optional

import torchx.specs as specs
from torchx.specs import macros

from components import _torchrun

IMAGE = "muonrec:0.1.0"


def data(
    *args: str,
    config: str = "configs/demo/sasrec.yaml",
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    pod: str = "",
    max_retries: int = 1,
    grace_s: int = 30,
    spark_port: int = 0,
) -> specs.AppDef:
    """Data stage: raw logs -> parquet sequences and manifest, at the place that the config names.

    On several nodes it runs on Spark, started in this job, and needs muonrec[spark], Java 17 and an output (or
    data.work) on storage that all nodes share. memMB holds data.memory_limit and 2 GB for driver and daemons.

    Args:
        args: overrides of the config, key=value, after --
        config: YAML file of the experiment
        j: {nnodes}x1; several nodes imply data.engine=spark
        cpu: processor cores per node
        gpu: GPUs
        memMB: memory per node in MB; Kubernetes requests 1024 MB less, the limit is all of it
        image: container image (Kubernetes only)
        env: extra environment, K1=V1,K2=V2; no commas within a value
        mounts: volumes, type=volume,src=CLAIM,dst=/data,readonly,type=bind,... (Kubernetes only)
        pod: YAML file of pod fields to add, such as spec.tolerations (Kubernetes only)
        max_retries: restarts by the scheduler (SLURM requeue, Volcano RestartJob)
        grace_s: seconds from SIGTERM until the stage is killed
        spark_port: of the first of several nodes, and the next; 0 derives one from the app id
    """
    command = _torchrun.spark_command("pipeline.data", [config, *args], j=j, cpu=cpu, port=spark_port)
    return _torchrun.app(
        "data", command, j=j, cpu=cpu, gpu=gpu, memMB=memMB, image=image, env=env, mounts=mounts, pod=pod,
        max_retries=max_retries, grace_s=grace_s,
    )  # fmt: skip


def train(
    *args: str,
    config: str = "configs/demo/sasrec.yaml",
    j: str = "1x2",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    pod: str = "",
    out: str = "out",
    max_retries: int = 3,
    max_restarts: int = 1,
    grace_s: int = 120,
    rdzv_port: int = 0,
) -> specs.AppDef:
    """Train stage: torchrun over j ranks; checkpoints and metrics under {out}/{app id}.

    Every restart goes on from the last checkpoint found there. On SIGTERM all ranks write one at the same step.

    Args:
        args: overrides of the config, key=value, after --; output=FOLDER replaces {out}/{app id}
        config: YAML file of the experiment
        j: {nnodes}x{nproc_per_node}
        cpu: processor cores per node
        gpu: GPUs per node
        memMB: memory per node in MB; Kubernetes requests 1024 MB less, the limit is all of it
        image: container image (Kubernetes only)
        env: extra environment, K1=V1,K2=V2; no commas within a value
        mounts: volumes, type=volume,src=CLAIM,dst=/out,type=bind,... (Kubernetes only)
        pod: YAML file of pod fields to add, such as spec.tolerations (Kubernetes only)
        out: root of the outputs, on storage that all nodes share
        max_retries: restarts by the scheduler (SLURM requeue, Volcano RestartJob)
        max_restarts: restarts of all ranks in place, by torchrun, anew in every retry
        grace_s: seconds from SIGTERM until the ranks are killed: the time that a checkpoint has
        rdzv_port: port on the first node when there are several; 0 derives one from the app id
    """
    command = _torchrun.torchrun_command(
        "pipeline.train",
        [config, f"output={out}/{macros.app_id}", *args],
        j=j,
        grace_s=grace_s,
        max_restarts=max_restarts,
        rdzv_port=rdzv_port,
    )
    return _torchrun.app(
        "train", command, j=j, cpu=cpu, gpu=gpu, memMB=memMB, image=image, env=env, mounts=mounts, pod=pod,
        max_retries=max_retries, grace_s=grace_s, rdzv_port=rdzv_port,
    )  # fmt: skip


def evaluate(
    *args: str,
    run: str,
    j: str = "1x2",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    pod: str = "",
    max_retries: int = 1,
    grace_s: int = 30,
    rdzv_port: int = 0,
) -> specs.AppDef:
    """Eval stage: the checkpoint of a run -> metrics.json and report.html beside it.

    Args:
        args: settings of the stage, key=value, after --, such as part=valid or 'compare=[OTHER_RUN]'
        run: folder that the train stage wrote
        j: {nnodes}x{nproc_per_node}
        cpu: processor cores per node
        gpu: GPUs per node
        memMB: memory per node in MB; Kubernetes requests 1024 MB less, the limit is all of it
        image: container image (Kubernetes only)
        env: extra environment, K1=V1,K2=V2; no commas within a value
        mounts: volumes, type=volume,src=CLAIM,dst=/out,type=bind,... (Kubernetes only)
        pod: YAML file of pod fields to add, such as spec.tolerations (Kubernetes only)
        max_retries: restarts by the scheduler (SLURM requeue, Volcano RestartJob)
        grace_s: seconds from SIGTERM until the ranks are killed
        rdzv_port: port on the first node when there are several; 0 derives one from the app id
    """
    command = _torchrun.torchrun_command("pipeline.eval", [run, *args], j=j, grace_s=grace_s, rdzv_port=rdzv_port)
    return _torchrun.app(
        "evaluate", command, j=j, cpu=cpu, gpu=gpu, memMB=memMB, image=image, env=env, mounts=mounts, pod=pod,
        max_retries=max_retries, grace_s=grace_s, rdzv_port=rdzv_port,
    )  # fmt: skip


def compare(
    *args: str,
    config: str = "configs/compare/demo.yaml",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    pod: str = "",
    max_retries: int = 3,
    grace_s: int = 150,
) -> specs.AppDef:
    """Compare stage: arms under one protocol -> results.parquet and a verdict, at the place that the config names.

    One node; the runs share its GPUs, or else its cores. A restart goes on with what is not finished. The data set must
    be there.

    Args:
        args: settings of the comparison, key=value, after --
        config: YAML file of the comparison
        cpu: processor cores of the node
        gpu: GPUs of the node
        memMB: memory of the node in MB; Kubernetes requests 1024 MB less, the limit is all of it
        image: container image (Kubernetes only)
        env: extra environment, K1=V1,K2=V2; no commas within a value
        mounts: volumes, type=volume,src=CLAIM,dst=/data,readonly,type=bind,... (Kubernetes only)
        pod: YAML file of pod fields to add, such as spec.tolerations (Kubernetes only)
        max_retries: restarts by the scheduler (SLURM requeue, Volcano RestartJob)
        grace_s: seconds from SIGTERM until the stage is killed: the time that the runs' checkpoints have
    """
    command = _torchrun.python_command("pipeline.compare", [config, *args])
    return _torchrun.app(
        "compare", command, j="1x1", cpu=cpu, gpu=gpu, memMB=memMB, image=image, env=env, mounts=mounts, pod=pod,
        max_retries=max_retries, grace_s=grace_s,
    )  # fmt: skip
