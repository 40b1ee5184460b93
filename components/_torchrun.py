"""The torchrun line: how a role of N nodes finds itself, on a laptop, on SLURM and on Kubernetes alike."""

import shlex
from typing import Dict, List, Optional, Sequence

import torchx.specs as specs
from torchx.specs import macros


def python_command(module: str, arguments: Sequence[str]) -> str:
    """``python -m module arguments`` as one line for bash; ``${app_id}`` and its like stay open for TorchX."""
    return " ".join(["exec", "python", "-m", module, *(_quote(argument) for argument in arguments)])


def torchrun_command(
    module: str, arguments: Sequence[str], *, j: str, max_restarts: int = 0, rdzv_port: int = 29500
) -> str:
    """``torchrun -m module arguments`` over ``j`` ranks as one line for bash.

    Args:
        module: a stage, such as ``pipeline.train``.
        arguments: of the stage; quoted here.
        j: ``{nnodes}x{nproc_per_node}``.
        max_restarts: of all ranks in place, by torchrun.
        rdzv_port: where the first node listens; two jobs at once on one host need two ports.

    Raises:
        ValueError: ``j`` is not of that form.
    """
    nnodes, nproc_per_node = parse_j(j)
    if nnodes == 1:
        rendezvous = ["--standalone"]
    else:
        # The macro becomes the name of the variable that holds the first node's host: SLURM_JOB_NODELIST_HET_GROUP_0,
        # VC_TRAIN_0_HOSTS or TORCHX_RANK0_HOST. $${...} leaves its expansion to bash on the node (string.Template).
        endpoint = f"$${{{macros.rank0_env}:=localhost}}:{rdzv_port}"
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f'"{endpoint}"', "--rdzv-id", macros.app_id]
    command: List[str] = [
        "exec", "torchrun", *rendezvous,
        "--nnodes", str(nnodes), "--nproc-per-node", str(nproc_per_node), "--max-restarts", str(max_restarts),
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
    max_retries: int,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """One role of ``command`` on as many replicas as ``j`` has nodes."""
    nnodes, nproc_per_node = parse_j(j)
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
        port_map={"c10d": rdzv_port},
        max_retries=max_retries,
        retry_policy=specs.RetryPolicy.APPLICATION,
    )
    return specs.AppDef(name=f"muonrec-{name}", roles=[role])


def parse_j(j: str) -> "tuple[int, int]":
    """Nodes and ranks per node of ``2x8``. Raises ValueError."""
    nnodes, _, nproc_per_node = j.partition("x")
    if not (nnodes.isdecimal() and nproc_per_node.isdecimal() and int(nnodes) > 0 and int(nproc_per_node) > 0):
        raise ValueError(f"j={j!r} is not {{nnodes}}x{{nproc_per_node}}; pass for instance j=1x2 or j=4x8")
    return int(nnodes), int(nproc_per_node)


def _quote(argument: str) -> str:
    """Quote for bash and for string.Template, but leave TorchX's ``${app_id}`` open.

    A ``$`` of the user's own is doubled, so that a path such as ``$HOME/out`` reaches the stage as it was typed and an
    unknown ``${name}`` does not upset the template.
    """
    placeholder = "\0"
    literal = argument.replace(macros.app_id, placeholder).replace("$", "$$")
    return macros.app_id.join(shlex.quote(part) if part else "" for part in literal.split(placeholder)) or "''"
