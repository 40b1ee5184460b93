"""What the ranks of a checkpoint do together: share what they found, and raise the error of one on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def together(work: Callable[[], T]) -> T:
    """Do ``work``; if it fails on one rank, its error is raised on every rank, so that none waits for that one."""
    mine: Exception | None = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        mine = error
    for failure in gather(mine):
        if failure is not None:
            raise failure
    return result


def gather(mine: T) -> list[T]:
    """What each rank has, by rank; alone without a process group."""
    if not dist.is_initialized():
        return [mine]
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def rank() -> int:
    """This process among the ranks."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if num_ranks() > 1:
        dist.barrier()
