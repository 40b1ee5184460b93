"""Sends many tensors of any shape and dtype between ranks in one collective, packed as bytes."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Every parcel starts at a multiple of this, so that the bytes can be viewed as any dtype and copied in wide words.
ALIGNMENT_BYTES = 16

Outgoing = tuple[Tensor, torch.dtype]  # cast to this dtype on the way into the buffer
Incoming = tuple[Sequence[int], torch.dtype]


class Exchange:
    """One packed all-to-all under way.

    Every rank of the group must start it, in the same order as its other collectives.

    Args:
        outgoing: by destination rank, what is sent there, in the order in which that rank expects it.
        incoming: by source rank, the shapes and dtypes of what arrives from there.
        group: None where there is one rank; nothing is communicated then, nor in a group of one.
        device: where the tensors are.
    """

    def __init__(
        self,
        outgoing: Sequence[Sequence[Outgoing]],
        incoming: Sequence[Sequence[Incoming]],
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._incoming = incoming
        sent_sizes = [sum(_num_bytes(tensor.shape, dtype) for tensor, dtype in parcels) for parcels in outgoing]
        self._received_sizes = [sum(_num_bytes(*parcel) for parcel in parcels) for parcels in incoming]

        # Kept until the collective has read it.
        self._sent = torch.empty(sum(sent_sizes), dtype=torch.uint8, device=device)
        views = _views(self._sent, [(tensor.shape, dtype) for parcels in outgoing for tensor, dtype in parcels])
        for (tensor, _), view in zip((parcel for parcels in outgoing for parcel in parcels), views, strict=True):
            view.copy_(tensor)

        self._work = None
        if group is None or len(outgoing) == 1:
            self._received = self._sent
            return
        self._received = torch.empty(sum(self._received_sizes), dtype=torch.uint8, device=device)
        self._work = dist.all_to_all_single(
            self._received, self._sent, self._received_sizes, sent_sizes, group=group, async_op=True
        )

    def wait(self) -> list[Iterator[Tensor]]:
        """What arrived, by source rank, each in its sender's order; views of one buffer."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        buffers = self._received.split(self._received_sizes)
        return [iter(_views(buffer, parcels)) for buffer, parcels in zip(buffers, self._incoming, strict=True)]


def _num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _views(buffer: Tensor, parcels: Sequence[Incoming]) -> list[Tensor]:
    views, start = [], 0
    for shape, dtype in parcels:
        num_bytes = math.prod(shape) * dtype.itemsize
        views.append(buffer[start : start + num_bytes].view(dtype).view(tuple(shape)))
        start += _num_bytes(shape, dtype)
    return views
