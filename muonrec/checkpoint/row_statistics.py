"""Row statistics of tables, such as row-wise Adagrad's sums, between column-wise and other shardings.

TorchRec keeps one statistic per row and *column shard*, the shards' vectors one behind the other, so the state of a
table of R rows in n column shards has size n R, and R under any other sharding. A statistic is a mean over the columns
of what it sums. Hence the mean over the shards, weighted by their widths, is exactly the statistic that the undivided
rows would have for the same gradients; the other way, every shard starts from the statistic of the whole row, which is
right on average over the shards and not for each.
"""

# R = rows of the table, n = column shards

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def table_rows(key: str, state: Mapping[str, torch.Tensor]) -> tuple[str, int] | None:
    """Key of the weight that the optimizer state under ``key`` belongs to, and its rows; None without a weight."""
    for name, weight in state.items():
        if name.startswith("model.") and key.startswith(f"optimizer.state.{name.removeprefix('model.')}."):
            return name, weight.size(0)
    return None


def is_convertible(key: str, state: Mapping[str, torch.Tensor], there: Mapping[str, TensorStorageMetadata]) -> bool:
    """Whether the row statistics saved under ``key`` have another size only for another number of column shards."""
    num_saved, table = there[key].size.numel(), table_rows(key, state)
    if table is None or len(there[key].size) != 1 or state[key].dim() != 1:
        return False
    weight, rows = table
    if state[key].size(0) % rows or weight not in there:
        return False
    return num_saved in (rows, rows * len(_widths(there[weight])))


def convert(
    saved: torch.Tensor, key: str, state: Mapping[str, torch.Tensor], there: Mapping[str, TensorStorageMetadata]
) -> torch.Tensor:
    """The whole saved vector ``[n R]`` as the sharding of ``state`` wants it, ``[m R]``.

    Args:
        saved: all of it.
        key: under which it was saved.
        state: to be loaded, by name.
        there: what was saved, by name.
    """
    table = table_rows(key, state)
    assert table is not None
    weight, rows = table
    if saved.size(0) > rows:
        widths_n = torch.tensor(_widths(there[weight]), dtype=torch.float64)
        saved = ((widths_n / widths_n.sum()) @ saved.view(-1, rows).double()).to(saved.dtype)
    return saved.repeat(state[key].size(0) // rows)


def _widths(weight: TensorStorageMetadata) -> list[int]:
    """Widths of the column shards in the order of their columns; empty if the shards do not hold whole columns."""
    shards = sorted(weight.chunks, key=lambda shard: shard.offsets[1])
    if any(shard.sizes[0] != weight.size[0] for shard in shards):
        return []
    return [shard.sizes[1] for shard in shards]
