"""Tests of the packed all-to-all."""

import torch
import torch.distributed as dist

from muonrec.optim.exchange import Exchange
from tests.distributed.ranks import run_on_ranks

# By source and destination rank: shape and dtype of each parcel. Odd sizes, empty parcels, ranks that get nothing.
PARCELS = {
    (0, 0): [((3,), torch.float32)],
    (0, 1): [((3, 5), torch.bfloat16), ((0, 4), torch.float32), ((2, 2), torch.float64)],
    (1, 0): [((1, 1), torch.uint8), ((7,), torch.float64)],
    (2, 1): [((5, 3), torch.float32)],
}


def _parcels(source, destination):
    specs = PARCELS.get((source, destination), [])
    return [(torch.full(shape, 10.0 * source + destination + i), dtype) for i, (shape, dtype) in enumerate(specs)]


def _exchange():
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    outgoing = [_parcels(rank, destination) for destination in range(num_ranks)]
    incoming = [[(t.shape, dtype) for t, dtype in _parcels(source, rank)] for source in range(num_ranks)]
    exchange = Exchange(outgoing, incoming, dist.group.WORLD, torch.device("cpu"))
    return [list(tensors) for tensors in exchange.wait()]


def test_parcels_of_any_shape_and_dtype_arrive_in_order():
    for rank, received in enumerate(run_on_ranks(3, _exchange)):
        for source, tensors in enumerate(received):
            expected = [tensor.to(dtype) for tensor, dtype in _parcels(source, rank)]
            assert len(tensors) == len(expected)
            for found, wanted in zip(tensors, expected, strict=True):
                torch.testing.assert_close(found, wanted, atol=0, rtol=0)


def test_without_a_group_parcels_come_back():
    transposed_RC = torch.arange(6.0).view(2, 3).mT
    exchange = Exchange([[(transposed_RC, torch.float32)]], [[((3, 2), torch.float32)]], None, torch.device("cpu"))
    (received,) = exchange.wait()
    assert torch.equal(next(received), transposed_RC)
