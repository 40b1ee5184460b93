"""Row statistics of tables, such as row-wise Adagrad's sums, between column-wise and other shardings.

TorchRec keeps one statistic per row and *column shard*, the shards' vectors one behind the other, so the state of a
table of R rows in n column shards has size n R, and R under any other sharding. A statistic is a mean over the columns
of what it sums. Hence the mean over the shards, weighted by their widths, is exactly the statistic that the undivided
rows would have for the same gradients; the other way, every shard starts from the statistic of the whole row, which is
right on average over the shards and not for each. A table that has grown since has new rows behind the old ones of
every column shard; their statistics are zero.
"""

# Q = rows of the table when it was saved, R = now; n = its column shards when it was saved, m = now

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


class _Layout(NamedTuple):
    """Rows and column shards that a vector of statistics is made of, there (saved) and here."""

    weight: str
    rows_there: int
    shards_there: int
    rows_here: int
    shards_here: int


def is_convertible(key: str, state: Mapping[str, torch.Tensor], there: Mapping[str, TensorStorageMetadata]) -> bool:
    """Whether ``key`` is a vector of row statistics, saved for these or other column shards, of these rows or fewer."""
    layout = _layout(key, state, there)
    return (
        layout is not None
        and layout.rows_there <= layout.rows_here
        and layout.shards_there in (1, len(_widths(there[layout.weight])))
    )


def must_convert(key: str, state: Mapping[str, torch.Tensor], there: Mapping[str, TensorStorageMetadata]) -> bool:
    """Whether a statistic stands elsewhere in the saved vector than in ours."""
    layout = _layout(key, state, there)
    if layout is None or not is_convertible(key, state, there):
        return False
    is_moved = layout.rows_there != layout.rows_here and layout.shards_here > 1
    return is_moved or layout.shards_there != layout.shards_here


def convert(
    saved: torch.Tensor, key: str, state: Mapping[str, torch.Tensor], there: Mapping[str, TensorStorageMetadata]
) -> torch.Tensor:
    """The whole saved vector ``[n Q]`` as the sharding of ``state`` wants it, ``[m R]``, on the CPU.

    Args:
        saved: all of it.
        key: under which it was saved.
        state: to be loaded, by name.
        there: what was saved, by name.
    """
    layout = _layout(key, state, there)
    assert layout is not None
    saved_nQ = saved.view(layout.shards_there, layout.rows_there)
    if 1 < layout.shards_there != layout.shards_here:
        widths_n = torch.tensor(_widths(there[layout.weight]), dtype=torch.float64)
        saved_nQ = ((widths_n / widths_n.sum()) @ saved_nQ.double()).to(saved.dtype)[None]
    found_mR = torch.zeros(layout.shards_here, layout.rows_here, dtype=saved.dtype)
    found_mR[:, : layout.rows_there] = saved_nQ
    return found_mR.flatten()


def _layout(key: str, state: Mapping[str, torch.Tensor], there: Mapping[str, TensorStorageMetadata]) -> _Layout | None:
    """How the vector under ``key`` is made of rows and column shards; None if it is no vector of a table's rows."""
    weight = next(
        (
            name
            for name in state
            if name.startswith("model.") and key.startswith(f"optimizer.state.{name.removeprefix('model.')}.")
        ),
        None,
    )
    if weight is None or weight not in there or state[key].dim() != 1 or len(there[key].size) != 1:
        return None
    rows_there, rows_here = there[weight].size[0], state[weight].size(0)
    shards_there, rest_there = divmod(there[key].size[0], rows_there)
    shards_here, rest_here = divmod(state[key].size(0), rows_here)
    if rest_there or rest_here or not shards_there or not shards_here:
        return None
    return _Layout(weight, rows_there, shards_there, rows_here, shards_here)


def _widths(weight: TensorStorageMetadata) -> list[int]:
    """Widths of the column shards in the order of their columns; empty if the shards do not hold whole columns."""
    shards = sorted(weight.chunks, key=lambda shard: shard.offsets[1])
    if any(shard.sizes[0] != weight.size[0] for shard in shards):
        return []
    return [shard.sizes[1] for shard in shards]
