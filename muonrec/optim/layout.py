"""Which part of a matrix each rank holds, worked out from the placements of a DTensor without asking the others."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from muonrec.optim.ownership import shard_range

# R = rows, C = columns of a parameter taken as a matrix

Range = tuple[int, int]  # (start, stop)


class Part:
    """What one rank holds of a matrix: ranges of its rows by ranges of its columns, stored one after the other.

    More than one range where shards interleave (`_StridedShard`); ``(0, 0)`` alone where the rank holds nothing.

    Attributes:
        ranges: along rows and along columns.
        sections: the same as ``(where it begins in the part, where in the matrix, how long it is)``.
        shape: of what is held.
    """

    def __init__(self, rows: Sequence[Range], columns: Sequence[Range]) -> None:
        self.ranges = (_merged(rows), _merged(columns))
        self.sections = (_sections(self.ranges[0]), _sections(self.ranges[1]))
        self.shape = (_length(rows), _length(columns))

    @property
    def is_empty(self) -> bool:
        return 0 in self.shape

    def of(self, matrix_RC: Tensor) -> Tensor:
        """Cut the part out of the whole; a view where it is one rectangle."""
        for dim, ranges in enumerate(self.ranges):
            if self.shape[dim] == matrix_RC.shape[dim]:
                continue
            pieces = [matrix_RC.narrow(dim, start, stop - start) for start, stop in ranges]
            matrix_RC = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
        return matrix_RC


def assemble(parts: Sequence[tuple[Part, Tensor]]) -> Tensor:
    """Put a whole ``(R, C)`` together from the parts of all ranks, each part once and empty ones left out.

    The shards of a mesh are the squares of a grid: all that begin in one row are equally high.
    """
    if len(parts) == 1:
        return parts[0][1]
    pieces = []
    for part, tensor in parts:
        for offset, row, size in part.sections[0]:
            band = tensor.narrow(0, offset, size)
            pieces += [(row, column, band.narrow(1, left, width)) for left, column, width in part.sections[1]]
    pieces.sort(key=lambda piece: piece[:2])
    bands = [[piece for *_, piece in band] for _, band in itertools.groupby(pieces, key=lambda piece: piece[0])]
    return _cat([_cat(band, 1) for band in bands], 0)


class Mesh:
    """Where each rank of a process group stands in its device mesh.

    Args:
        shape: of the mesh.
        coordinates: by rank of the process group, one number per axis of the mesh. Two ranks with equal coordinates
            are copies of each other: they stand in meshes side by side, as two tensor-parallel groups do.
    """

    def __init__(self, shape: Sequence[int], coordinates: Mapping[int, tuple[int, ...]]) -> None:
        self.shape = tuple(shape)
        self.coordinates = coordinates
        self._holders: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}

    def holders(self, axes: tuple[int, ...]) -> dict[tuple[int, ...], list[int]]:
        """The ranks that share their coordinates on these axes, by those."""
        if axes not in self._holders:
            groups = self._holders[axes] = {}
            for rank, coordinate in sorted(self.coordinates.items()):
                groups.setdefault(tuple(coordinate[axis] for axis in axes), []).append(rank)
        return self._holders[axes]


class Layout:
    """How one parameter lies on the ranks of a process group.

    Args:
        shape: of the whole parameter, before it is taken as a matrix.
        placements: one per axis of the mesh; none for a plain tensor, which every rank holds whole.
        mesh: of the parameter.

    Raises:
        ValueError: a placement other than ``Replicate()``, or ``Shard`` and ``_StridedShard`` of dimensions 0 and 1.
    """

    def __init__(self, shape: Sequence[int], placements: Sequence[Placement], mesh: Mesh) -> None:
        self.shape = tuple(shape)
        self.mesh = mesh
        self._shards: list[tuple[int, Shard | _StridedShard]] = []
        for axis, place in enumerate(placements):
            if isinstance(place, Shard | _StridedShard) and 0 <= place.dim <= 1:
                self._shards.append((axis, place))
            elif not isinstance(place, Replicate):
                raise ValueError(
                    f"{place!r} is not supported, use Replicate(), Shard(0), Shard(1), or what fully_shard makes of it"
                )
        self._parts: dict[tuple[int, ...], Part] = {}

    @property
    def is_replicated(self) -> bool:
        """Every rank holds the whole parameter."""
        return not self._shards

    @cached_property
    def _axes(self) -> tuple[int, ...]:
        return tuple(axis for axis, _ in self._shards)

    def part(self, rank: int) -> Part:
        """What a rank holds of the matrix."""
        return self._part(self._place(rank))

    def holders(self, rank: int) -> list[int]:
        """The ranks, in order, that hold the same as this one; it is among them."""
        return self.mesh.holders(self._axes)[self._place(rank)]

    def parts(self) -> list[tuple[Part, list[int]]]:
        """Every part that is not empty, with the ranks that hold it; together they are the matrix."""
        held = [(self._part(place), ranks) for place, ranks in self.mesh.holders(self._axes).items()]
        return [(part, ranks) for part, ranks in held if not part.is_empty]

    def _place(self, rank: int) -> tuple[int, ...]:
        coordinate = self.mesh.coordinates[rank]
        return tuple(coordinate[axis] for axis in self._axes)

    def _part(self, place: tuple[int, ...]) -> Part:
        if place not in self._parts:
            ranges: list[list[Range]] = [[(0, size)] for size in self.shape[:2]]
            # From the first axis to the last, each shards what the ones before have left, as DTensor does.
            for (axis, placement), index in zip(self._shards, place, strict=True):
                ranges[placement.dim] = _shard(ranges[placement.dim], placement, self.mesh.shape[axis], index)
            # Dim 1 of a convolution kernel (out, in, k) is in * k columns of the matrix.
            stride = math.prod(self.shape[2:])
            rows, columns = ranges
            self._parts[place] = Part(rows, [(start * stride, stop * stride) for start, stop in columns])
        return self._parts[place]


class Placing(NamedTuple):
    """Where a tensor says that it lies; a plain one has no placements, and no mesh."""

    placements: tuple[Placement, ...]
    mesh_ranks: tuple[int, ...]  # global, row by row
    mesh_shape: tuple[int, ...]


def placing_of(tensor: Tensor) -> Placing:
    """Read a tensor's placements and mesh."""
    if not isinstance(tensor, DTensor):
        return Placing((), (), ())
    mesh = tensor.device_mesh
    return Placing(tuple(tensor.placements), tuple(mesh.mesh.flatten().tolist()), tuple(mesh.shape))


def find_problem(name: str, param: Tensor, group_ranks: Sequence[int]) -> str | None:
    """Say what of a parameter's layout is not supported in a group of these global ranks, or None."""
    if not isinstance(param, DTensor):
        return None
    placements, mesh_ranks, mesh_shape = placing_of(param)
    where = f"'{name}' is placed as {placements} on a mesh of shape {mesh_shape}"
    try:
        if not set(mesh_ranks) <= set(group_ranks):
            return (
                f"{where} over ranks {list(mesh_ranks)}, but process_group is of ranks {list(group_ranks)}; "
                "pass a process_group that holds every rank of every parameter's mesh"
            )
        coordinate = param.device_mesh.get_coordinate()
        if coordinate is None:
            return f"{where}, which this rank is not in; construct DistributedMuon with what its ranks hold"
        part = Layout(param.shape, placements, Mesh(mesh_shape, {0: tuple(coordinate)})).part(0)
    except ValueError as error:
        return f"{where}; {error}"
    local = param.to_local()
    if part.shape != (local.shape[0], math.prod(local.shape[1:])):
        return (
            f"{where}, by which rank {dist.get_rank()} holds {part.shape[0]} x {part.shape[1]} of it, but its local "
            f"tensor is {tuple(local.shape)}; choose sizes that the ranks of the mesh divide"
        )
    return None


def find_gradient_problem(name: str, param: Tensor) -> str | None:
    """Say how a gradient lies otherwise than its parameter, or None."""
    if param.grad is None or not isinstance(param, DTensor):
        return None
    grad = param.grad
    if not isinstance(grad, DTensor):
        return f"the gradient of '{name}' is a plain tensor but the parameter a DTensor; place it like the parameter"
    if grad.placements != param.placements or grad.device_mesh != param.device_mesh:
        return (
            f"the gradient of '{name}' is placed as {grad.placements} but the parameter as {param.placements}, on "
            f"meshes of shape {tuple(grad.device_mesh.shape)} and {tuple(param.device_mesh.shape)}; redistribute it "
            "before step()"
        )
    return None


def _shard(ranges: list[Range], placement: Shard | _StridedShard, num_shards: int, index: int) -> list[Range]:
    """What one of the shards of these ranges holds, of which it sees the length alone, as if they were one."""
    if not isinstance(placement, _StridedShard):
        return _select(ranges, *shard_range(_length(ranges), num_shards, index))
    # As if a later axis of the mesh had cut first, into split_factor pieces: this axis takes its share of each.
    shares = []
    split_factor = int(placement.split_factor)
    for i in range(split_factor):
        piece = _select(ranges, *shard_range(_length(ranges), split_factor, i))
        shares += _select(piece, *shard_range(_length(piece), num_shards, index))
    return shares


def _select(ranges: Iterable[Range], start: int, stop: int) -> list[Range]:
    """What lies from ``start`` to ``stop`` in ranges that are counted through."""
    selected = []
    for first, last in ranges:
        low, high = first + max(start, 0), min(first + stop, last)
        if low < high:
            selected.append((low, high))
        start, stop = start - (last - first), stop - (last - first)
    return selected


def _merged(ranges: Iterable[Range]) -> list[Range]:
    merged: list[Range] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged or [(0, 0)]


def _sections(ranges: Sequence[Range]) -> list[tuple[int, int, int]]:
    sizes = [stop - start for start, stop in ranges]
    offsets = itertools.accumulate(sizes, initial=0)
    return [(offset, start, size) for offset, (start, _), size in zip(offsets, ranges, sizes, strict=False)]


def _length(ranges: Iterable[Range]) -> int:
    return sum(stop - start for start, stop in ranges)


def _cat(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
