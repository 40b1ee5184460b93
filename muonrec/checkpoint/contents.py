"""What a DCP folder holds, read as data: nothing that stands in a checkpoint is ever run.

Stock DCP unpickles ``.metadata`` and every entry that is no tensor, and a pickle is a program. Here the metadata's
pickle may name the classes that DCP writes and nothing else, and builds inert records in their place; an entry that is
no tensor is refused. Tensors are read by ``torch.load(weights_only=True)``, as stock DCP does.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.utils import _create_file_view

from muonrec.checkpoint.marker import UnusableCheckpoint

METADATA = ".metadata"

_DCP = "torch.distributed.checkpoint"
_RECORDS = {
    *((f"{_DCP}.metadata", kind) for kind in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Chunk", "Bytes")),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
}
# Called by the pickle for what is not read: the member of an enum, a layout, the path it was once saved under.
_IGNORED = {
    ("builtins", "getattr"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", kind) for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(("pathlib._local", kind) for kind in ("Path", "PosixPath", "WindowsPath")),  # Python 3.13
}


class Contents(NamedTuple):
    """The tensors of a DCP folder by name, and where their saved chunks lie."""

    tensors: dict[str, TensorStorageMetadata]
    places: dict[MetadataIndex, _StorageInfo]


def read_contents(folder: Path, files: Collection[str]) -> Contents:
    """What a DCP folder holds, from its ``.metadata``.

    Args:
        folder: of the checkpoint.
        files: names of its files; the metadata may point to no other.

    Raises:
        UnusableCheckpoint: the pickle names anything that DCP's metadata does not, or is not as DCP writes it.
    """
    try:
        records = _Records(io.BytesIO((folder / METADATA).read_bytes())).load()
        tensors, places = records.state["state_dict_metadata"], records.state["storage_data"]
        contents = Contents(
            {str(name): _tensor(name, record) for name, record in tensors.items()},
            {_index(index): _place(place, files) for index, place in places.items()},
        )
        for name, tensor in contents.tensors.items():
            for chunk in tensor.chunks:
                contents.places[MetadataIndex(name, chunk.offsets)]
        return contents
    except Exception as error:  # whatever a pickle that DCP did not write may bring about
        raise UnusableCheckpoint(
            f"{folder / METADATA} is not the metadata of a checkpoint: {error}; nothing of it was run or loaded"
        ) from None


def read_chunk(folder: Path, contents: Contents, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
    """One saved piece of the tensor ``name``, on the CPU."""
    place = contents.places[MetadataIndex(name, chunk.offsets)]
    with (folder / place.relative_path).open("rb") as file:
        view: Any = _create_file_view(file, place.offset, place.length)
        piece = torch.load(view, map_location="cpu", weights_only=True)
    if piece.shape != chunk.sizes:
        raise UnusableCheckpoint(f"{folder} holds {list(piece.shape)} of {name}, its metadata says {chunk.sizes}")
    return piece


class TensorReader(FileSystemReader):
    """DCP's reader, with contents that have been read already."""

    def __init__(self, folder: Path, contents: Contents) -> None:
        super().__init__(folder)
        self._contents = contents

    def read_metadata(self) -> Metadata:  # type: ignore[override]  # with kwargs DCP would ask for a rank's own, too
        tensors, places = self._contents
        return Metadata({**tensors}, storage_data=places, storage_meta=StorageMeta())


class TensorPlanner(DefaultLoadPlanner):
    """DCP's planner that loads tensors only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UnusableCheckpoint(f"{read_item.dest_index.fqn} is no tensor, and only tensors are loaded")


class _Record:
    """Stands for an instance of one of DCP's classes."""

    state: Any = None

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Records(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            # A new class every time: a pickle can also set attributes of the classes it names.
            return type(name, (_Record,), {})
        if (module, name) in _IGNORED:
            ignored: Callable[..., None] = lambda *_: None  # noqa: E731
            return ignored
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _tensor(name: str, record: _Record) -> TensorStorageMetadata:
    if type(record).__name__ != "TensorStorageMetadata":
        raise ValueError(f"{name} is no tensor, and only tensors are loaded")
    dtype = record.state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} has no dtype")
    chunks = [
        ChunkStorageMetadata(_size(chunk.state["offsets"]), _size(chunk.state["sizes"]))
        for chunk in record.state["chunks"]
    ]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _size(record.state["size"]), chunks)


def _index(record: _Record) -> MetadataIndex:
    return MetadataIndex(str(record.state["fqn"]), _size(record.state["offset"]), record.state.get("index"))


def _place(record: _Record, files: Collection[str]) -> _StorageInfo:
    path = record.state["relative_path"]
    if path not in files:
        raise ValueError(f"it points to {path!r}, which is no file of the checkpoint")
    if record.state.get("transform_descriptors"):
        raise ValueError("its files are transformed, which muonrec does not write")
    return _StorageInfo(path, int(record.state["offset"]), int(record.state["length"]))


def _size(numbers: Any) -> torch.Size:
    return torch.Size([int(number) for number in numbers])
