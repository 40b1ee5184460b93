"""What ranks ask each other: once whether all were given the same parameters, and at each step who has gradients."""

import itertools
from collections.abc import Sequence
from operator import contains
from typing import Any

import torch
import torch.distributed as dist

from muonrec.optim.exchange import all_gather_single
from muonrec.optim.layout import Mesh
from muonrec.optim.ownership import plan_hash


def agree_on_plan(
    rows: Sequence[Sequence[Any]], meshes: Sequence[tuple[int, ...]], problem: str | None, group: dist.ProcessGroup
) -> list[list[tuple[int, ...]]]:
    """Refuse, on every rank, a plan that differs between ranks or is refused by one; every rank must call it.

    Args:
        rows: what must be the same on every rank, in plain values; names first.
        meshes: the ranks of meshes that may differ from rank to rank.
        problem: what this rank refuses, or None.
        group: the ranks.

    Returns:
        By rank, its ``meshes``.

    Raises:
        ValueError: names the first parameter that differs, or says what a rank refuses.
    """
    num_ranks = dist.get_world_size(group)
    said: list[Any] = [None] * num_ranks
    dist.all_gather_object(said, (problem, plan_hash(rows), list(meshes)), group=group)
    problems = [problem for problem, *_ in said if problem is not None]
    if problems:
        raise ValueError(problems[0])
    hashes = [fingerprint for _, fingerprint, _ in said]
    if len(set(hashes)) == 1:
        return [meshes for *_, meshes in said]

    plans: list[Any] = [None] * num_ranks
    dist.all_gather_object(plans, rows, group=group)
    other = next(rank for rank in range(num_ranks) if hashes[rank] != hashes[0])
    ours, theirs = [{row[0]: row for row in plans[rank]} for rank in (0, other)]
    # Absent ones first: one name too many moves the owners of others.
    differing = [name for name in ours | theirs if (name in ours) != (name in theirs)]
    differing = differing or [name for name in ours if ours[name] != theirs[name]] or ["their order"]
    raise ValueError(
        f"ranks 0 and {other} were given different parameters: they differ in {differing[0]}"
        f" ({ours.get(differing[0], 'absent')} and {theirs.get(differing[0], 'absent')}), {len(differing)} in all; "
        "give every rank the same names, shapes, dtypes, placements, splits and settings in the same order"
    )


def join_meshes(
    name: str, shape: tuple[int, ...], meshes: Sequence[tuple[int, ...]], group_ranks: Sequence[int]
) -> Mesh:
    """One description of meshes of one shape that lie side by side, as tensor-parallel groups do.

    Args:
        name: of a parameter on them.
        shape: of each.
        meshes: by rank of the group, the global ranks of its mesh, row by row.
        group_ranks: by rank of the group, its global rank.

    Raises:
        ValueError: they do not divide the group among them.
    """
    if shape == ():
        return Mesh(shape, dict.fromkeys(range(len(group_ranks)), ()))
    distinct = dict.fromkeys(meshes)
    if sorted(itertools.chain(*distinct)) != sorted(group_ranks) or not all(map(contains, meshes, group_ranks)):
        raise ValueError(
            f"'{name}' is on the meshes {list(map(list, distinct))}, which do not divide the ranks {list(group_ranks)} "
            "of process_group among them; use one mesh over all of them, or equal slices of one"
        )
    local_ranks = {global_rank: rank for rank, global_rank in enumerate(group_ranks)}
    places = list(itertools.product(*map(range, shape)))
    located = [(rank, place) for mesh in distinct for rank, place in zip(mesh, places, strict=True)]
    return Mesh(shape, {local_ranks[rank]: place for rank, place in located})


def agree_on_gradients(
    flags: Sequence[bool], *, is_refused: bool, group: dist.ProcessGroup, device: torch.device
) -> list[frozenset[int] | None] | None:
    """Find out which ranks have which gradients, in one small all-reduce, and one all-gather where they disagree.

    It copies to the host, so the host waits for the device. Every rank must call it.

    Args:
        flags: whether this rank has a gradient, by parameter.
        is_refused: whether this rank refuses a gradient.
        group: the ranks.
        device: where the group communicates.

    Returns:
        By parameter, the ranks that have a gradient, or None for all ranks. None for the whole if any rank refuses.
    """
    num_ranks = dist.get_world_size(group)
    shared = torch.tensor([is_refused, *flags], dtype=torch.int32, device=device)
    dist.all_reduce(shared, group=group)
    num_refused, *counts = shared.tolist()
    if num_refused:
        return None
    having = [None if count == num_ranks else frozenset[int]() for count in counts]
    disputed = [i for i, count in enumerate(counts) if 0 < count < num_ranks]
    if disputed:
        mine = torch.tensor([flags[i] for i in disputed], dtype=torch.uint8, device=device)
        everyone = torch.empty(num_ranks * len(disputed), dtype=torch.uint8, device=device)
        all_gather_single(everyone, mine, group=group)
        for i, present in zip(disputed, everyone.view(num_ranks, -1).T.tolist(), strict=True):
            having[i] = frozenset(rank for rank, is_present in enumerate(present) if is_present)
    return having
