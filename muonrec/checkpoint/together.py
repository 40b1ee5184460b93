"""What the ranks of a checkpoint do together: share what they found, and raise the error of one on all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

T = TypeVar("T")


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Do ``work``; if it fails on one rank, its error is raised on every rank, so that none waits for that one."""
    mine: Exception | None = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        mine = error
    for failure in gather(mine, group):
        if failure is not None:
            raise failure
    return result


def gather(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What each rank has, by rank; alone without a process group."""
    if not dist.is_initialized():
        return [mine]
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def rank() -> int:
    """This process among the ranks."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait for all ranks."""
    if num_ranks() > 1:
        dist.barrier(group)


@contextmanager
def dcp_errors(message: str, *, otherwise: type[Exception] = OSError) -> Iterator[None]:
    """Turn what DCP raises on every rank into an OSError, or into ``otherwise`` where the cause is none."""
    # TorchRec's ShardedTensor warns of its own deprecation once per tensor and rank.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            yield
        except dcp.CheckpointException as error:  # the failures of all ranks, on every rank; not even an Exception
            rank, (failure, _) = next(iter(error.failures.items()))
            kind = OSError if isinstance(failure, OSError) else otherwise
            raise kind(f"{message}: {failure!r} on rank {rank}") from error
