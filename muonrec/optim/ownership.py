"""Decides which rank orthogonalizes which matrix, by cost and by name, without talking to the other ranks."""

import hashlib
import heapq
import json
from collections.abc import Iterable, Mapping
from typing import Any


def newton_schulz_cost(shape: tuple[int, int], steps: int) -> int:
    """Floating-point operations to orthogonalize one ``(R, C)`` matrix.

    With ``s`` the short side and ``l`` the long one, a step is ``X X^T`` and the product with ``X`` at ``2 s^2 l``
    each, and the square of the Gram matrix at ``2 s^3``.
    """
    short, long = min(shape), max(shape)
    return steps * 2 * short**2 * (2 * long + short)


def assign_owners(costs: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """Give each matrix one rank, the longest processing time first (Graham, 1969: at most 4/3 of the best makespan).

    Equal costs go by name and equally loaded ranks by number, so every rank computes the same answer.

    Args:
        costs: by name, in any unit.
        num_ranks: 1 or more.

    Returns:
        The owning rank by name, in the order of ``costs``.
    """
    if num_ranks < 1:
        raise ValueError(f"matrices cannot be dealt out to {num_ranks} ranks; use 1 or more")
    loads = [(0, rank) for rank in range(num_ranks)]
    owners = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        load, rank = heapq.heappop(loads)
        owners[name] = rank
        heapq.heappush(loads, (load + costs[name], rank))
    return {name: owners[name] for name in costs}


# Two of each kind, so that one is orthogonalized while the other travels; more would cut the batches of equal shapes
# into pieces.
NUM_BUCKETS = 2


def assign_buckets(
    costs: Mapping[str, int], owners: Mapping[str, int], is_replicated: Mapping[str, bool], num_ranks: int
) -> dict[str, int]:
    """Divide what each rank owns among a few buckets, replicated matrices before sharded ones, which arrive meanwhile.

    Returns:
        The bucket by name, from 0 to 3; all 0 where there is one rank, and nothing travels.
    """
    if num_ranks == 1:
        return dict.fromkeys(costs, 0)
    shares: dict[tuple[int, bool], dict[str, int]] = {}
    for name, cost in costs.items():
        shares.setdefault((owners[name], is_replicated[name]), {})[name] = cost
    buckets: dict[str, int] = {}
    for (_, replicated), share in shares.items():
        first = 0 if replicated else NUM_BUCKETS
        buckets |= {name: first + bucket for name, bucket in assign_owners(share, NUM_BUCKETS).items()}
    return buckets


def plan_hash(rows: Iterable[Any]) -> str:
    """A fingerprint of a plan, the same on every rank, Python and machine; rows are of plain JSON values."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()


def shard_range(size: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """``(start, stop)`` of what a rank holds of a dimension sharded as DTensor does it: like ``torch.chunk``, so late
    ranks may hold less, or nothing.
    """
    chunk = -(-size // num_ranks)
    return min(rank * chunk, size), min((rank + 1) * chunk, size)
