"""A checksum of weights that does not depend on how they are sharded, nor on the number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from muonrec.checkpoint.weights import local_pieces
from muonrec.mesh import Ranks

# Knuth's multiplicative hashing: neighbours get weights that have nothing in common. As a signed 64-bit number.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_ELEMENTS_AT_ONCE = 2**22
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def state_checksum(state: Mapping[str, torch.Tensor], ranks: Ranks) -> str:
    """Checksum of all tensors of ``state`` by name, to the bit; every rank must call it.

    Args:
        state: on every rank the same names; a plain tensor counts as replicated.
        ranks: this rank among the others.

    Returns:
        16 hexadecimal digits, the same on every rank. Against mistakes, not against malice.
    """
    names = sorted(state)
    sums = torch.zeros(len(names), dtype=torch.int64, device=ranks.device)
    for index, name in enumerate(names):
        value = state[name]
        if ranks.is_first or isinstance(value, ShardedTensor | DTensor):
            sums[index] = _sum(value)
    if ranks.num_ranks > 1:
        dist.all_reduce(sums)  # wraps around, as the sums themselves do
    digest = hashlib.sha256()
    for name, total in zip(names, sums.tolist(), strict=True):
        digest.update(f"{name} {list(state[name].size())} {total}\n".encode())
    return digest.hexdigest()[:16]


def _sum(value: torch.Tensor) -> int:
    """The sum over the elements held here of their bits times a weight by place in the whole, modulo 2^64."""
    total, columns = 0, value.size(-1) if value.dim() else 1
    for piece, offsets in local_pieces(value):
        width = piece.size(-1) if piece.dim() else 1
        first = _place(offsets, list(value.size()))
        bits = piece.contiguous().view(-1).view(_INTEGERS[piece.element_size()])
        for start in range(0, bits.numel(), _ELEMENTS_AT_ONCE):
            part = bits[start : start + _ELEMENTS_AT_ONCE].to(torch.int64)
            at = torch.arange(start, start + part.numel(), device=part.device)
            places = first + torch.div(at, width, rounding_mode="floor") * columns + at % width
            total += int((part * ((places + 1) * _GOLDEN | 1)).sum())
    return (total + 2**63) % 2**64 - 2**63


def _place(offsets: object, sizes: list[int]) -> int:
    """Index of the element at ``offsets`` in the whole, flattened."""
    place = 0
    for offset, size in zip(list(offsets), sizes, strict=True):  # type: ignore[call-overload]
        place = place * size + int(offset)
    return place
