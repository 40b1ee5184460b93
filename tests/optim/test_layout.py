"""Tests of which part of a matrix each rank holds."""

import itertools

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from muonrec.optim.agreement import join_meshes
from muonrec.optim.layout import Layout, Mesh, Part, assemble

R, S0, S1 = Replicate(), Shard(0), Shard(1)


def mesh(*shape):
    return Mesh(shape, dict(enumerate(itertools.product(*map(range, shape)))))


def rows_of(layout, num_ranks):
    """The rows each rank holds of a matrix, in the order in which it stores them."""
    numbers = torch.arange(layout.shape[0])[:, None].expand(-1, layout.shape[1])
    return [layout.part(rank).of(numbers)[:, 0].tolist() for rank in range(num_ranks)]


def test_fsdp_after_tensor_parallelism_cuts_the_tensor_parallel_shards():
    # The example of torch's _StridedShard.
    layout = Layout((8, 8), (_StridedShard(0, split_factor=2), S0), mesh(2, 2))
    assert rows_of(layout, 4) == [[0, 1], [4, 5], [2, 3], [6, 7]]
    assert rows_of(Layout((8, 8), (S0, S0), mesh(2, 2)), 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_rank_may_hold_several_ranges_of_rows():
    layout = Layout((7, 2), (_StridedShard(0, split_factor=2),), mesh(2))
    assert rows_of(layout, 2) == [[0, 1, 4, 5], [2, 3, 6]]
    assert layout.part(0).sections[0] == [(0, 0, 2), (2, 4, 2)]
    assert layout.part(0).sections[1] == [(0, 0, 2)]


def test_channels_of_a_kernel_are_runs_of_columns():
    layout = Layout((2, 4, 3), (S1,), mesh(2))
    assert layout.part(1).ranges == ([(0, 2)], [(6, 12)])
    assert layout.part(1).shape == (2, 6)


def test_late_ranks_may_hold_nothing():
    layout = Layout((2, 4), (S0,), mesh(4))
    assert [layout.part(rank).shape for rank in range(4)] == [(1, 4), (1, 4), (0, 4), (0, 4)]
    assert [ranks for _, ranks in layout.parts()] == [[0], [1]]
    assert layout.part(3).of(torch.ones(2, 4)).shape == (0, 4)


def test_copies_of_a_shard_are_known():
    layout = Layout((4, 4), (R, S0), mesh(2, 3))
    assert [layout.holders(rank) for rank in range(6)] == [[0, 3], [1, 4], [2, 5]] * 2
    assert not layout.is_replicated
    assert Layout((4, 4), (R, R), mesh(2, 3)).is_replicated and Layout((4, 4), (), mesh()).is_replicated


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (9, 1), (12, 8), (5, 3, 2)])
@pytest.mark.parametrize(
    "placements",
    [
        (S0, S0, S0),
        (S0, S1, S0),
        (R, S1, S0),
        (_StridedShard(0, split_factor=3), R, S0),
        (S1, _StridedShard(1, split_factor=2), R),
    ],
)
def test_the_parts_of_all_ranks_are_the_matrix(shape, placements):
    layout = Layout(shape, placements, mesh(2, 2, 3))
    whole = torch.arange(torch.Size(shape).numel()).view(shape).flatten(1)
    parts = layout.parts()
    assert torch.equal(assemble([(part, part.of(whole)) for part, _ in parts[::-1]]), whole)
    holding = [rank for rank in range(12) if not layout.part(rank).is_empty]
    assert sorted(rank for _, ranks in parts for rank in ranks) == holding


def test_a_part_that_is_one_rectangle_is_a_view():
    whole = torch.zeros(4, 4)
    Part([(0, 1), (1, 3)], [(1, 2)]).of(whole).add_(1)
    assert whole.sum() == 3


def test_other_placements_are_refused():
    for placement in (Partial(), Shard(2)):
        with pytest.raises(ValueError, match=r"not supported, use Replicate\(\), Shard\(0\), Shard\(1\)"):
            Layout((4, 4, 4), (placement,), mesh(2))


def test_meshes_side_by_side_hold_copies():
    # Tensor parallelism over ranks 0, 1 and 2, 3; the group counts its ranks in another order.
    joined = join_meshes("proj", (2,), [(3, 2), (3, 2), (1, 0), (1, 0)], [2, 3, 0, 1])
    assert joined.coordinates == {0: (1,), 1: (0,), 2: (1,), 3: (0,)}
    assert Layout((4, 4), (S0,), joined).holders(0) == [0, 2]


@pytest.mark.parametrize("meshes", [[(0, 1), (0, 1), (2, 3), (2, 4)], [(0, 1), (2, 3), (2, 3), (2, 3)], [(0, 1)] * 4])
def test_meshes_that_do_not_divide_the_group_are_refused(meshes):
    with pytest.raises(ValueError, match=r"'proj' is on the meshes \[\[0, 1\].*do not divide the ranks \[0, 1, 2, 3\]"):
        join_meshes("proj", (2,), meshes, [0, 1, 2, 3])
