"""Tests of the packed collectives."""

import itertools

import pytest
import torch
import torch.distributed as dist

from muonrec.optim import exchange as module
from muonrec.optim.exchange import Broadcast, Exchange, Parcel
from tests.distributed.ranks import run_on_ranks

CPU = torch.device("cpu")

# By source and destination rank: shape and dtype of each parcel. Odd sizes, empty parcels, ranks that get nothing.
PARCELS = {
    (0, 0): [((3,), torch.float32)],
    (0, 1): [((3, 5), torch.bfloat16), ((0, 4), torch.float32), ((2, 2), torch.float64)],
    (1, 0): [((1, 1), torch.uint8), ((7,), torch.float64)],
    (2, 1): [((5, 3), torch.float32)],
}
# By source rank. Rank 1 has much to say, rank 2 nothing.
SPOKEN = {0: [((3, 5), torch.bfloat16)], 1: [((40, 30), torch.float32), ((0, 2), torch.float64), ((7,), torch.float64)]}


def _parcels(source, destination):
    specs = PARCELS.get((source, destination), [])
    return [(torch.full(shape, 10.0 * source + destination + i), dtype) for i, (shape, dtype) in enumerate(specs)]


def _exchange():
    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    sends = [(Parcel(there, tuple(t.shape), dtype), t) for there in ranks for t, dtype in _parcels(rank, there)]
    receives = [Parcel(there, tuple(t.shape), dtype) for there in ranks for t, dtype in _parcels(there, rank)]
    # The order among destinations, and among sources, is free.
    sends.sort(key=lambda send: -send[0].rank)
    receives.sort(key=lambda parcel: -parcel.rank)
    exchange = Exchange([parcel for parcel, _ in sends], receives, len(ranks))
    for _ in range(2):
        received = exchange.start([tensor for _, tensor in sends], dist.group.WORLD, CPU).wait()
    return [(parcel.rank, tensor) for parcel, tensor in zip(receives, received, strict=True)]


def test_parcels_of_any_shape_and_dtype_arrive_in_order():
    for rank, received in enumerate(run_on_ranks(3, _exchange)):
        for source in range(3):
            expected = [tensor.to(dtype) for tensor, dtype in _parcels(source, rank)]
            found = [tensor for there, tensor in received if there == source]
            assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]
            assert all(map(torch.equal, found, expected))


def _spoken(source):
    generator = torch.Generator().manual_seed(source)
    return [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in SPOKEN.get(source, [])]


def _broadcast():
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    parcels = [Parcel(source, shape, dtype) for source in (1, 0) for shape, dtype in SPOKEN[source]]
    sizes, originals = [], {name: getattr(module, name) for name in ("all_gather_single",)}
    all_to_all = dist.all_to_all_single

    def measured(name, original):
        def call(output, input, *args, **kwargs):
            sizes.append((name, input.numel()))
            return original(output, input, *args, **kwargs)

        return call

    module.all_gather_single = measured("all-gather", originals["all_gather_single"])
    dist.all_to_all_single = measured("all-to-all", all_to_all)
    try:
        received = Broadcast(parcels, rank, num_ranks).start(_spoken(rank), dist.group.WORLD, CPU).wait()
    finally:
        module.all_gather_single, dist.all_to_all_single = originals["all_gather_single"], all_to_all
    return received, sizes


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_broadcast_brings_everything_to_every_rank_in_even_shares(num_ranks):
    expected = list(itertools.chain(_spoken(1), _spoken(0)))
    # Padded to 16 bytes each: 15 bfloat16; 1200 float32, and 7 float64.
    own = {0: 32, 1: 4800 + 64}
    for rank, (received, sizes) in enumerate(run_on_ranks(num_ranks, _broadcast)):
        assert all(map(torch.equal, received, expected)) and len(received) == len(expected)
        share = -(-sum(own.values()) // (16 * num_ranks)) * 16
        assert sizes == [("all-to-all", own.get(rank, 0)), ("all-gather", share)]
