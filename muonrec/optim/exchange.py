"""Moves many tensors of any shape and dtype between ranks in one or two collectives, packed as bytes."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Every tensor starts at a multiple of this, so that the bytes can be viewed as any dtype and copied in wide words.
ALIGNMENT_BYTES = 16

# torch 2.13 renamed it, and warns of the older name.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Parcel:
    """One tensor on its way; ``rank`` is where it goes or whence it comes, ``dtype`` what it is packed as."""

    rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """In the buffer, up to the next parcel."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def should_deal_out(loads: Sequence[int]) -> bool:
    """Whether what every rank is to get goes by `Broadcast`; otherwise its owner packs a copy for each other rank.

    No matter where all own alike, much where few own anything.

    Args:
        loads: bytes by owning rank.
    """
    return len(loads) * max(loads) > 2 * sum(loads)


def even_share(loads: Sequence[int]) -> int:
    """Bytes that `Broadcast` deals out to each rank, in the units of alignment, so that none starts amid a word."""
    return -(-sum(loads) // (len(loads) * ALIGNMENT_BYTES)) * ALIGNMENT_BYTES


class Exchange:
    """A packed all-to-all from each rank to each, to be started once a step; sizes are summed up here, once.

    Args:
        sends: what this rank sends, of one destination in the order in which that rank expects it.
        receives: what this rank receives, of one source in the order in which that rank sends it.
        num_ranks: of the group.
    """

    def __init__(self, sends: Sequence[Parcel], receives: Sequence[Parcel], num_ranks: int) -> None:
        self._sends, self._receives = _Packing(sends, num_ranks), _Packing(receives, num_ranks)

    def start(self, tensors: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device) -> "Pending":
        """Pack and send ``tensors``, one for each of ``sends``; every rank of the group must start it."""
        sent, received = self._sends.pack(tensors, device), self._receives.buffer(device)
        work = dist.all_to_all_single(
            received, sent, self._receives.sizes, self._sends.sizes, group=group, async_op=True
        )
        return Pending(work, sent, received, self._receives)


class Broadcast:
    """Every rank's tensors to all ranks, from a buffer that does not grow with their number; once a step.

    In two collectives: an all-to-all deals all bytes out evenly, and an all-gather joins them on every rank, as a
    large broadcast is done (van de Geijn: scatter, then gather). So a rank that has much to say is no bottleneck,
    at most 16 bytes a rank are padding, and a rank sends no more than its own bytes and then its even share to each.

    Args:
        parcels: of all ranks, in any order that is the same on all of them; ``rank`` is where a parcel comes from.
        rank: this one.
        num_ranks: of the group.
    """

    def __init__(self, parcels: Sequence[Parcel], rank: int, num_ranks: int) -> None:
        self._stream = _Packing(parcels, num_ranks)
        self._own = _Packing([parcel for parcel in parcels if parcel.rank == rank], num_ranks)
        total = sum(self._stream.sizes)
        self._share = even_share(self._stream.sizes)
        self._num_ranks = num_ranks
        starts = list(itertools.accumulate(self._stream.sizes, initial=0))
        own = (starts[rank], starts[rank + 1])
        shares = [(min(i * self._share, total), min((i + 1) * self._share, total)) for i in range(num_ranks)]
        self._sent_sizes = [_overlap(own, share) for share in shares]
        self._received_sizes = [_overlap(shares[rank], (starts[i], starts[i + 1])) for i in range(num_ranks)]

    def start(self, tensors: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device) -> "Pending":
        """Pack and send ``tensors``, one for each parcel of this rank; every rank of the group must start it."""
        sent = self._own.pack(tensors, device)
        share = torch.empty(self._share, dtype=torch.uint8, device=device)
        work = dist.all_to_all_single(
            share[: sum(self._received_sizes)], sent, self._received_sizes, self._sent_sizes, group=group, async_op=True
        )

        def join() -> Tensor:
            everything = torch.empty(self._num_ranks * self._share, dtype=torch.uint8, device=device)
            all_gather_single(everything, share, group=group)
            return everything

        return Pending(work, sent, join, self._stream)


class Pending:
    """A collective under way."""

    def __init__(self, work: Any, sent: Tensor, received: Any, packing: "_Packing") -> None:
        self._work = work
        self._sent = sent  # kept until the collective has read it
        self._received = received
        self._packing = packing

    def wait(self) -> list[Tensor]:
        """What arrived, in the order of the parcels; views of one buffer. To be called once, by every rank."""
        self._work.wait()
        received = self._received() if callable(self._received) else self._received
        return self._packing.unpack(received)


class _Packing:
    """Where parcels lie in a buffer: those of one rank together, the ranks in order."""

    def __init__(self, parcels: Sequence[Parcel], num_ranks: int) -> None:
        self._parcels = parcels
        self._offsets = [0] * len(parcels)
        self.sizes = [0] * num_ranks  # bytes by rank
        offset = 0
        for i in sorted(range(len(parcels)), key=lambda i: parcels[i].rank):
            self._offsets[i] = offset
            offset += parcels[i].num_bytes
            self.sizes[parcels[i].rank] += parcels[i].num_bytes

    def buffer(self, device: torch.device) -> Tensor:
        return torch.empty(sum(self.sizes), dtype=torch.uint8, device=device)

    def pack(self, tensors: Sequence[Tensor], device: torch.device) -> Tensor:
        buffer = self.buffer(device)
        for tensor, view in zip(tensors, self.unpack(buffer), strict=True):
            view.copy_(tensor)
        return buffer

    def unpack(self, buffer: Tensor) -> list[Tensor]:
        views = []
        for parcel, offset in zip(self._parcels, self._offsets, strict=True):
            num_bytes = math.prod(parcel.shape) * parcel.dtype.itemsize
            views.append(buffer[offset : offset + num_bytes].view(parcel.dtype).view(parcel.shape))
        return views


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
