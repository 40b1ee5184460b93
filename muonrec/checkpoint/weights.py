"""Weights for other programs: a safetensors file of the unsharded model, written and read a shard at a time.

The format (https://github.com/huggingface/safetensors) is a length, a JSON header and the bytes of the tensors. The
library of that name writes whole tensors from memory; a table larger than that is written here into a mapped file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from muonrec.checkpoint.contents import read_chunk, read_contents
from muonrec.checkpoint.marker import UnusableCheckpoint, find_faults, read_marker

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def export_weights(folder: str | Path, path: str | Path, *, notes: dict[str, str] | None = None) -> None:
    """Write the model of a checkpoint as one safetensors file, under the names of the unsharded model.

    One process, no model: memory holds one saved shard at a time.

    Args:
        folder: of a finished checkpoint.
        path: replaced if it exists; appears whole or not at all.
        notes: kept in the file's header.

    Raises:
        UnusableCheckpoint: the checkpoint is unfinished or damaged.
        OSError: the file cannot be written, as on a full disk.
    """
    folder, path = Path(folder), Path(path)
    files = read_marker(folder)
    if faults := find_faults(folder, files):
        raise UnusableCheckpoint(f"{folder} is damaged: {'; '.join(faults)}")
    contents = read_contents(folder, files)
    saved = {key: entry for key, entry in contents.tensors.items() if key.startswith("model.")}

    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(notes or {})}}
    end = 0
    for key, entry in sorted(saved.items(), key=lambda item: (-item[1].properties.dtype.itemsize, item[0])):
        begin, end = end, end + math.prod(entry.size) * entry.properties.dtype.itemsize
        dtype, shape = _DTYPES[entry.properties.dtype], list(entry.size)
        header[key.removeprefix("model.")] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors, widest elements first, are then aligned

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            # Reserved, since a disk that fills up under a mapped file kills the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
            else:  # macOS
                os.truncate(file.fileno(), 8 + len(text) + end)
            tensors = _views(mmap.mmap(file.fileno(), 0), header, first_byte=8 + len(text))
            for key, entry in saved.items():
                for chunk in entry.chunks:
                    piece = tensors[key.removeprefix("model.")][_slices(chunk.offsets, chunk.sizes)]
                    piece.copy_(read_chunk(folder, contents, key, chunk))
            del tensors
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_notes(path: str | Path) -> dict[str, str]:
    """The notes in the header of a safetensors file. Raises ValueError if it is none."""
    return dict(_read_header(Path(path))[0].get("__metadata__", {}))


def import_weights(path: str | Path, model: nn.Module, *, grows: Collection[str] = ()) -> dict[str, str]:
    """Load a safetensors file into a model in place, sharded or not; each rank reads the rows it holds.

    Every rank may call it; there is no communication.

    Args:
        path: of the file.
        model: written in place.
        grows: weights of ``model`` that may have more rows than the file; those keep the values they have.

    Returns:
        The notes of the file's header.

    Raises:
        ValueError: the file is no safetensors file, or its names or shapes are not the model's; names them.
    """
    path = Path(path)
    header, first_byte = _read_header(path)
    state = model.state_dict()
    there = {name: list(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    here = {name: list(value.size()) for name, value in state.items()}
    there |= {name: here[name] for name in grows if name in there and is_grown(there[name], here[name])}
    if there != here:
        raise ValueError(f"{path} is of another model: {differences(there, here)}")
    with path.open("rb") as file:
        # Private: torch wants memory it may write to.
        tensors = _views(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), header, first_byte=first_byte)
    with torch.no_grad():
        for name, value in state.items():
            for piece, offsets in local_pieces(value):
                saved = tensors[name][_slices(offsets, piece.shape)]  # ends where the file's rows end
                piece[_slices([0] * piece.dim(), saved.shape)].copy_(saved)
    return dict(header.get("__metadata__", {}))


def local_pieces(value: torch.Tensor) -> Iterator[tuple[torch.Tensor, Sequence[int]]]:
    """What this rank holds of a tensor, each piece with its offsets in the whole."""
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            yield shard.tensor.detach(), shard.metadata.shard_offsets
    elif isinstance(value, DTensor):
        _, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        yield value.to_local().detach(), offsets
    else:
        yield value.detach(), [0] * value.dim()


def is_grown(there: list[int], here: list[int]) -> bool:
    """Whether the shape ``here`` is that of ``there`` with more rows."""
    return len(there) == len(here) > 0 and there[1:] == here[1:] and there[0] < here[0]


def differences(there: dict[str, list[int]], here: dict[str, list[int]], *, shown: int = 4) -> str:
    """How the names and shapes of what was saved differ from those of what shall be loaded, the first few."""
    both = [name for name in here if name in there and there[name] != here[name]]
    faults = [f"{name} is {there[name]} there and {here[name]} here" for name in both]
    faults += [f"{name} is not in it" for name in here if name not in there]
    faults += [f"it has {name}, which the model has not" for name in there if name not in here]
    more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
    return "; ".join(faults[:shown]) + more


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, checked against the size of the file, and where the tensors begin."""
    dtypes = {text: dtype for dtype, text in _DTYPES.items()}
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            num_bytes = os.fstat(file.fileno()).st_size - 8 - length
            if num_bytes < 0:
                raise ValueError("it ends within its header")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end <= num_bytes:
                    raise ValueError(f"{name} lies outside of the file")
                if end - begin != math.prod(entry["shape"]) * dtypes[entry["dtype"]].itemsize:
                    raise ValueError(f"{name} has {end - begin} bytes, which is not its shape and dtype")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    return header, 8 + length


def _views(memory: mmap.mmap, header: dict[str, Any], *, first_byte: int) -> dict[str, torch.Tensor]:
    dtypes = {text: dtype for dtype, text in _DTYPES.items()}
    views = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = dtypes[entry["dtype"]], entry["shape"]
        if 0 in shape:
            views[name] = torch.empty(shape, dtype=dtype)
            continue
        begin = first_byte + entry["data_offsets"][0]
        views[name] = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=begin).view(shape)
    return views


def _slices(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
