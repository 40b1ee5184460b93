"""Ranks: one call that joins the process group torchrun describes, and the facts every stage asks about it."""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import datetime
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# What a collective waits for a rank that hangs; every group needs it, since torch's default for gloo is half an hour.
TIMEOUT = datetime.timedelta(minutes=10)
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among the others: ``rank`` of ``num_ranks`` (global), on ``device``."""

    rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the process group described by torchrun's environment, or be the only rank without it.

    gloo on a CPU, NCCL on CUDA (gloo beside it for CPU tensors). A collective that waits longer than `TIMEOUT`
    fails instead of blocking. The group is destroyed on leaving the block, unless several ranks leave it by an error:
    gloo's then ends with the process, since one rank is still to say for all what went wrong; NCCL's is left, since it
    would wait for what others have begun, who wait for this rank. Under torchrun on Linux a rank dies with its
    launcher.

    float32 means float32 on CUDA, too: cuDNN would round what it multiplies to TF32.

    Yields:
        Ranks: on CUDA, the device ``LOCAL_RANK`` names is made current.

    Raises:
        ValueError: this machine has fewer GPUs than ranks.
        ConnectionError: the ranks could not meet.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        # A rank that outlives a killed torchrun would go on writing to a run that has been started again elsewhere.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU of its own, since this machine shows {torch.cuda.device_count()}; "
                "start as many ranks (torchrun --nproc-per-node), or train on the CPU (CUDA_VISIBLE_DEVICES=)"
            )
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except dist.DistError as error:
            place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise ConnectionError(
                f"rank {os.environ['RANK']} could not meet the others at {place}: {error}; see whether all have "
                "started, and whether this address is free and can be reached"
            ) from None
        # A rank that ends at once would break the connection of one that still joins, whose error would hide the cause.
        dist.all_reduce(torch.zeros(1))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device)
    try:
        yield ranks
    except BaseException as error:
        if ranks.num_ranks == 1 or isinstance(error, SystemExit):  # by which all ranks stop alike
            dist.destroy_process_group()
        elif not cuda:
            atexit.register(_end_group)
        raise
    dist.destroy_process_group()


def _end_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
