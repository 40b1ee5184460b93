"""The command line of a stage and its app: how nodes find each other, on a laptop, on SLURM and on Kubernetes alike."""

import shlex
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torchx.specs as specs
import yaml
from torchx.specs import macros

# User and group of the image (Dockerfile); a volume must be writable for them.
IMAGE_GROUP = 1000
# What Kubernetes waits beyond torchrun's own patience, so that torchrun still says what happened.
GRACE_BEYOND_TORCHRUN_S = 15

# The macro becomes the name of the variable that holds the first node's host: SLURM_JOB_NODELIST_HET_GROUP_0,
# VC_TRAIN_0_HOSTS or TORCHX_RANK0_HOST. $${...} leaves its expansion to bash on the node (string.Template).
_FIRST_HOST = f"$${{{macros.rank0_env}:=localhost}}"
# Two jobs may share a host. Below 32768, where Linux begins to hand out ports by itself.
_DERIVED_PORT = f"$$((20000 + $$(printf %s {macros.app_id} | cksum | cut -d' ' -f1) % 10000))"


def python_command(module: str, arguments: Sequence[str]) -> str:
    """``python -m module arguments`` as one line for bash; ``${app_id}`` and its like stay open for TorchX."""
    return " ".join(["exec", "python", "-m", module, *(_quote(argument) for argument in arguments)])


def spark_command(module: str, arguments: Sequence[str], *, j: str, cpu: int, port: int = 0) -> str:
    """`python_command` on one node; on several, ``module`` as the driver of a Spark cluster of these nodes.

    Args:
        module: a stage with a setting ``data.engine``.
        arguments: of the stage; quoted here.
        j: ``{nnodes}x1``.
        cpu: cores of each node.
        port: where the first node's master listens; 0 derives it from the id of the job.

    Raises:
        ValueError: ``j`` is not of that form.
    """
    nnodes, nproc_per_node = parse_j(j)
    if nproc_per_node != 1:
        raise ValueError(f"j={j!r}: Spark has a process per node, which takes all its cores; pass j={nnodes}x1")
    driver = python_command(module, arguments)
    if nnodes == 1:
        return driver
    command: List[str] = [
        "exec", "python", "-m", "muonrec.data.spark_cluster",
        "--replica", macros.replica_id, "--num-replicas", str(nnodes), "--hosts", f'"{_FIRST_HOST}"',
        "--port", str(port or _DERIVED_PORT), "--cores", str(cpu), "--",
    ]  # fmt: skip
    return " ".join([*command, driver[len("exec ") :], "data.engine=spark"])


def torchrun_command(
    module: str, arguments: Sequence[str], *, j: str, grace_s: int, max_restarts: int = 0, rdzv_port: int = 0
) -> str:
    """``torchrun -m module arguments`` over ``j`` ranks as one line for bash.

    Args:
        module: a stage, such as ``pipeline.train``.
        arguments: of the stage; quoted here.
        j: ``{nnodes}x{nproc_per_node}``.
        grace_s: seconds from SIGTERM until torchrun kills what has not ended; torchrun alone would give 30.
        max_restarts: of all ranks in place, by torchrun.
        rdzv_port: where the first node listens; 0 derives it from the id of the job, since two jobs may share a host.

    Raises:
        ValueError: ``j`` is not of that form.
    """
    nnodes, nproc_per_node = parse_j(j)
    if nnodes == 1:
        rendezvous = ["--standalone"]
    else:
        endpoint = f"{_FIRST_HOST}:{rdzv_port or _DERIVED_PORT}"
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f'"{endpoint}"', "--rdzv-id", macros.app_id]
    command: List[str] = [
        "exec", "torchrun", *rendezvous,
        "--nnodes", str(nnodes), "--nproc-per-node", str(nproc_per_node), "--max-restarts", str(max_restarts),
        "--shutdown-timeout", str(grace_s),
        "-m", module, *(_quote(argument) for argument in arguments),
    ]  # fmt: skip
    return " ".join(command)


def app(
    name: str,
    command: str,
    *,
    j: str,
    cpu: int,
    gpu: int,
    memMB: int,
    image: str,
    env: Optional[Dict[str, str]],
    mounts: Optional[List[str]],
    pod: str,
    max_retries: int,
    grace_s: int,
    rdzv_port: int = 0,
) -> specs.AppDef:
    """One role of ``command`` on as many replicas as ``j`` has nodes.

    Raises:
        ValueError: a value of ``env`` holds a comma, or ``mounts`` is not as TorchX wants it.
        OSError: the file ``pod`` cannot be read.
    """
    nnodes, nproc_per_node = parse_j(j)
    if with_comma := [key for key, value in (env or {}).items() if "," in value]:
        # TorchX hands the environment to srun as --export=ALL,K=V,K=V.
        raise ValueError(f"env: {', '.join(with_comma)} has a comma in its value, which SLURM would cut there; drop it")
    role = specs.Role(
        name=name,
        image=image,
        entrypoint="bash",
        args=["-c", command],
        num_replicas=nnodes,
        resource=specs.Resource(cpu=cpu, gpu=gpu, memMB=memMB),
        env={
            "OMP_NUM_THREADS": str(max(1, cpu // nproc_per_node)),
            # Restarted ranks otherwise meet the stale keys of the agents' own store: gloo over two nodes fails or hangs
            # (pytorch#135712, still so in 2.13.0).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **(env or {}),
        },
        port_map={"c10d": rdzv_port} if rdzv_port else {},
        mounts=_parse_mounts(mounts or []),
        max_retries=max_retries,
        retry_policy=specs.RetryPolicy.APPLICATION,
        metadata={"kubernetes": {"V1Pod": pod_overlay(grace_s, pod)}},
    )
    return specs.AppDef(name=f"muonrec-{name}", roles=[role])


def pod_overlay(grace_s: int, file: str) -> Dict[str, Any]:
    """What the pod gets beside TorchX's own fields (requests, limits, GPUs, /dev/shm, volumes); ``file`` wins.

    TorchX merges it into every pod it renders; TorchX 0.7 ignores it.
    """
    spec: Dict[str, Any] = {
        # Kubernetes kills 30 s after SIGTERM unless told otherwise, and a checkpoint of large tables takes longer.
        "terminationGracePeriodSeconds": grace_s + GRACE_BEYOND_TORCHRUN_S,
        # The image does not run as root: without a group of its own it could not write to most volumes. Only where the
        # volume's root is of another group, since changing every file of a large volume takes minutes.
        "securityContext": {"fsGroup": IMAGE_GROUP, "fsGroupChangePolicy": "OnRootMismatch"},
        # Otherwise every service of the namespace becomes some variables of the environment.
        "enableServiceLinks": False,
    }
    given = (yaml.safe_load(Path(file).read_text()) or {}) if file else {}
    return {**given, "spec": {**spec, **given.get("spec", {})}}


def parse_j(j: str) -> "tuple[int, int]":
    """Nodes and ranks per node of ``2x8``. Raises ValueError."""
    nnodes, _, nproc_per_node = j.partition("x")
    if not (nnodes.isdecimal() and nproc_per_node.isdecimal() and int(nnodes) > 0 and int(nproc_per_node) > 0):
        raise ValueError(f"j={j!r} is not {{nnodes}}x{{nproc_per_node}}; pass for instance j=1x2 or j=4x8")
    return int(nnodes), int(nproc_per_node)


def _parse_mounts(mounts: List[str]) -> "List[Any]":
    try:
        return list(specs.parse_mounts(mounts))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"mounts={','.join(mounts)!r}: {error.args[0]}; pass for instance "
            "type=volume,src=CLAIM,dst=/data,readonly,type=volume,src=CLAIM,dst=/out"
        ) from None


def _quote(argument: str) -> str:
    """Quote for bash and for string.Template, but leave TorchX's ``${app_id}`` open.

    A ``$`` of the user's own is doubled, so that a path such as ``$HOME/out`` reaches the stage as it was typed and an
    unknown ``${name}`` does not upset the template.
    """
    placeholder = "\0"
    literal = argument.replace(macros.app_id, placeholder).replace("$", "$$")
    return macros.app_id.join(shlex.quote(part) if part else "" for part in literal.split(placeholder)) or "''"
