"""Adam of the tables where FBGEMM has none, on the CPU: on the rows a batch has touched, or on all of them."""

# R = rows of all tables of one kernel, D = width, T = ids looked up, U = rows updated: those touched, or all

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbedding, EmbeddingFusedOptimizer
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingModule
from torchrec.optim.fused import EmptyFusedOptimizer

# Beside FBGEMM's settings of a table: whether rows that no batch has touched are updated as well.
EVERY_ROW = "every_row"
# Of an update of every row, so that what it computes with stays in the cache.
_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class AdamArgs:
    """What FBGEMM calls the optimizer's arguments, under its names; decay is always decoupled, as in its kernel."""

    eps: float
    beta1: float
    beta2: float
    weight_decay: float
    gradient_clipping: bool = False
    max_gradient: float = 1.0


def adam(
    rows_UD: torch.Tensor,
    gradient_UD: torch.Tensor,
    exp_avg_UD: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float,
    args: AdamArgs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New rows and moments, by the rule of FBGEMM's CUDA kernels ADAM and PARTIAL_ROWWISE_ADAM.

    On all rows of a table the first is `torch.optim.AdamW` on an `nn.Embedding`.

    Args:
        rows_UD: the rows to update. Nothing is modified.
        gradient_UD: their gradients.
        exp_avg_UD: first moment, per element.
        exp_avg_sq: second moment, ``[U, D]`` per element or ``[U]`` per row: of the mean of the row's squared gradient.
        step: steps of the *table*, this one included, for the bias of the moments; a row seen for the first time late
            is corrected as if it had been there from the start. FBGEMM's kernels count forward passes, so that there
            micro-batches age the bias faster.
        lr: rate.
        args: the rest.
    """
    exp_avg_UD = args.beta1 * exp_avg_UD + (1 - args.beta1) * gradient_UD
    square = gradient_UD.square()
    square = square.mean(1) if exp_avg_sq.ndim == 1 else square
    exp_avg_sq = args.beta2 * exp_avg_sq + (1 - args.beta2) * square
    mean_UD = exp_avg_UD / (1 - args.beta1**step)
    size = (exp_avg_sq / (1 - args.beta2**step)).sqrt() + args.eps
    update_UD = mean_UD / (size[:, None] if size.ndim == 1 else size) + args.weight_decay * rows_UD
    return rows_UD - lr * update_UD, exp_avg_UD, exp_avg_sq


class AdamTables(nn.Module):
    """Lookup and Adam of a dense kernel's tables, in place of FBGEMM's lookup and under the names of its TBE.

    FBGEMM's dense CPU lookup pools although none was asked for, and its gradient is as large as the table. This one
    returns a row per id, and its gradient holds the rows looked up, until an update of every row. (Bags of length one
    would get round the first, but
    each rank would send a row for every id of every rank, and the table would have another name than on CUDA.)

    Args:
        kernel: its weights are taken over; all tables of it have one width.
    """

    is_nobag = use_cpu = True

    def __init__(self, kernel: BatchedDenseEmbedding) -> None:
        super().__init__()
        dense, settings = kernel.emb_module, kernel.config.fused_params or {}
        self.weights = dense.weights  # TorchRec's names for the tables are views of it
        self.table_rows = torch.tensor([rows for rows, _ in dense.embedding_specs])
        self.first_row = self.table_rows.cumsum(0) - self.table_rows
        self.table_of_feature = torch.tensor(kernel._feature_table_map)
        self.features = kernel.config.feature_names()
        self.names = [table.name for table in kernel.config.embedding_tables]
        self.num_embeddings, self.row_offsets = kernel._num_embeddings, kernel._row_offset
        (width,) = {width for _, width in dense.embedding_specs}
        self.rows_RD = nn.Parameter(self.weights.detach().view(-1, width))
        self.exp_avg_RD = torch.zeros_like(self.rows_RD, requires_grad=False)
        self.optimizer: EmbOptimType = settings["optimizer"]
        self.every_row = bool(settings.get(EVERY_ROW))
        is_row_wise = self.optimizer is EmbOptimType.PARTIAL_ROWWISE_ADAM
        self.exp_avg_sq = torch.zeros(len(self.rows_RD)) if is_row_wise else torch.zeros_like(self.exp_avg_RD)
        self.iter = torch.zeros(1, dtype=torch.int64)
        self.learning_rate = float(settings["learning_rate"])
        names = {field.name for field in dataclasses.fields(AdamArgs)}
        self.optimizer_args = AdamArgs(**{name: settings[name] for name in names & settings.keys()})

    def forward(self, indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Rows ``[T, D]`` of ``indices`` ``[T]``; ``offsets`` are those of every feature's bags, feature by feature.

        Raises:
            IndexError: an id is no row of its table.
        """
        if not len(indices):
            return F.embedding(indices, self.rows_RD, sparse=True)
        num_ids = torch.diff(offsets).reshape(len(self.features), -1).sum(1)
        table_T = self.table_of_feature.repeat_interleave(num_ids)
        outside_T = (indices < 0) | (indices >= self.table_rows[table_T])
        if outside_T.any():
            place = int(outside_T.nonzero()[0])
            feature = self.features[int((num_ids.cumsum(0) <= place).sum())]
            table = int(table_T[place])
            raise IndexError(
                f"feature {feature!r} asks for row {int(indices[place]) + self.row_offsets[table]} of table "
                f"{self.names[table]!r}, which has {self.num_embeddings[table]} rows; ids start at 0"
            )
        return F.embedding(indices + self.first_row[table_T], self.rows_RD, sparse=True)

    @torch.no_grad()
    def update(self) -> None:
        """One step on the rows that were looked up since the last, those of zero gradient included, or on every row."""
        gradient, self.rows_RD.grad = self.rows_RD.grad, None
        if gradient is None:  # no backward pass since the last step; without ids it is empty
            return
        self.iter += 1
        ids_T, values_TD = gradient._indices()[0], gradient._values()
        if self.optimizer_args.gradient_clipping:
            # As FBGEMM: each element, before the gradients of one row are added up.
            size = self.optimizer_args.max_gradient
            values_TD = values_TD.clamp(-size, size)
        if self.every_row:
            gradient_RD = torch.zeros_like(self.rows_RD).index_add_(0, ids_T, values_TD)
            for first in range(0, len(gradient_RD), _ROWS_AT_ONCE):
                rows = slice(first, first + _ROWS_AT_ONCE)
                self._update_rows(rows, gradient_RD[rows])
        else:
            ids_U, place_T = ids_T.unique(return_inverse=True)
            gradient_UD = values_TD.new_zeros(len(ids_U), values_TD.size(1)).index_add_(0, place_T, values_TD)
            self._update_rows(ids_U, gradient_UD)

    def _update_rows(self, rows: torch.Tensor | slice, gradient_UD: torch.Tensor) -> None:
        self.rows_RD[rows], self.exp_avg_RD[rows], self.exp_avg_sq[rows] = adam(
            self.rows_RD[rows],
            gradient_UD,
            self.exp_avg_RD[rows],
            self.exp_avg_sq[rows],
            step=int(self.iter),
            lr=self.learning_rate,
            args=self.optimizer_args,
        )

    def split_embedding_weights(self) -> list[torch.Tensor]:
        """The rows of each table; views."""
        return list(self.rows_RD.detach().split(self.table_rows.tolist()))

    def get_optimizer_state(self) -> list[dict[str, torch.Tensor]]:
        """The moments of each table, under FBGEMM's names; views."""
        sizes = self.table_rows.tolist()
        moments = zip(self.exp_avg_RD.split(sizes), self.exp_avg_sq.split(sizes))
        return [{"exp_avg": first, "exp_avg_sq": second} for first, second in moments]

    def get_learning_rate(self) -> float:
        return self.learning_rate

    def set_learning_rate(self, lr: float) -> None:
        self.learning_rate = lr


class TableAdam(EmbeddingFusedOptimizer):
    """The keyed optimizer of `AdamTables`: its state has the names and shards that TorchRec gives fused tables.

    Unlike theirs it updates in `step`, so the gradients of several backward passes add up.
    """

    def __init__(self, config: GroupedEmbeddingConfig, tables: AdamTables, group: dist.ProcessGroup) -> None:
        super().__init__(config, tables, group)
        self._tables = tables
        # What a sharded collection does to the names of its fused tables.
        self.params: dict[str, Any] = {f"embeddings.{name}": weight for name, weight in self.params.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._tables.rows_RD.grad = None

    def step(self, closure: Any = None) -> None:
        super().step(closure)  # hands over the rate
        self._tables.update()


def install_adam(model: nn.Module, names: Set[str]) -> None:
    """Let the tables ``names`` of a sharded model, all on dense kernels, train by the Adam they ask for."""
    for module in model.modules():
        if not isinstance(module, ShardedEmbeddingModule) or not hasattr(module, "_lookups"):
            continue
        for lookup in module._lookups:
            for kernel in lookup.modules():
                if isinstance(kernel, BatchedDenseEmbedding) and kernel.config.embedding_tables[0].name in names:
                    kernel._emb_module = AdamTables(kernel)
        for name in names & module.module_sharding_plan.keys():
            # No other optimizer may have it: TorchRec's mark of a fused table, on ranks without rows as well.
            module.embeddings[name].weight._in_backward_optimizers = [EmptyFusedOptimizer()]
