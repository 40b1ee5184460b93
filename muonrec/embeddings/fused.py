"""Optimizers fused into the backward pass of tables: attached before sharding, read back and checked after it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.batched_embedding_kernel import (
    BaseBatchedEmbedding,
    BaseBatchedEmbeddingBag,
    BatchedFusedEmbedding,
    BatchedFusedEmbeddingBag,
)
from torchrec.distributed.embedding_types import ShardedEmbeddingModule, ShardedEmbeddingTable
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import optimizers
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from muonrec.embeddings.cpu_adam import EVERY_ROW, AdamTables, TableAdam
from muonrec.embeddings.tables import SparseOptimizer, TableConfig

# What each name asks of FBGEMM: the class TorchRec translates, and the kernel that must come of it. TorchRec's own
# classes only carry settings, whatever FBGEMM calls them.
_FUSED: dict[SparseOptimizer, tuple[type[torch.optim.Optimizer], EmbOptimType]] = {
    "rowwise_adagrad": (RowWiseAdagrad, EmbOptimType.EXACT_ROWWISE_ADAGRAD),
    "adagrad": (optimizers.Adagrad, EmbOptimType.EXACT_ADAGRAD),
    "sgd": (optimizers.SGD, EmbOptimType.EXACT_SGD),
    "partial_rowwise_adam": (optimizers.PartialRowWiseAdam, EmbOptimType.PARTIAL_ROWWISE_ADAM),
    "adam": (optimizers.Adam, EmbOptimType.ADAM),
    "dense_adam": (optimizers.Adam, EmbOptimType.ADAM),
}
_ADAM = (EmbOptimType.PARTIAL_ROWWISE_ADAM, EmbOptimType.ADAM)
# On a CPU the rows are in the only memory there is.
_MEMORY = {EmbeddingLocation.MANAGED: "uvm", EmbeddingLocation.MANAGED_CACHING: "uvm_caching"}
_CHECKED = ("lr", "eps", "betas", "weight_decay", "weight_decay_mode", "max_gradient", "data_type", "memory")
_DECAY = {"l2": WeightDecayMode.L2, "decoupled": WeightDecayMode.DECOUPLE}


def fuse_optimizers(model: nn.Module, tables: Mapping[str, TableConfig]) -> None:
    """Attach to each table of an unsharded model the optimizer that FBGEMM shall run in its backward pass.

    Raises:
        ValueError: a table without settings (FBGEMM would train it by SGD at 0.01), settings without a table, or a
            table that has an optimizer already.
    """
    parameters = dict(_table_parameters(model))
    missing, unknown = sorted(parameters.keys() - tables.keys()), sorted(tables.keys() - parameters.keys())
    if missing or unknown:
        raise ValueError(
            f"tables of the model: {sorted(parameters)}; without settings: {missing}; settings for no table: {unknown}"
            "; give every table an entry under 'tables', with its optimizer and lr"
        )
    for name, parameter in parameters.items():
        if hasattr(parameter, "_optimizer_classes"):
            raise ValueError(f"table {name!r} has an optimizer in its backward pass already; set it in one place")
        # The one way in: the sharder's fused_params would be a second, and which of the two wins is easily mistaken.
        _apply_optimizer_in_backward(_FUSED[tables[name].optimizer][0], [parameter], _fbgemm_settings(tables[name]))


def _fbgemm_settings(table: TableConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {"lr": table.lr}
    if table.optimizer != "sgd":
        settings["eps"] = table.eps
    if table.is_adam:
        settings |= {"beta1": table.betas[0], "beta2": table.betas[1], "weight_decay": table.weight_decay}
        if table.optimizer == "dense_adam":
            settings[EVERY_ROW] = True
    elif table.weight_decay:
        # Without the mode FBGEMM takes the decay and ignores it.
        settings |= {"weight_decay": table.weight_decay, "weight_decay_mode": _DECAY[table.weight_decay_mode]}
    if table.max_gradient is not None:
        settings |= {"gradient_clipping": True, "max_gradient": table.max_gradient}
    return settings


@dataclasses.dataclass(frozen=True, order=True)
class FusedTable:
    """What was found to train one table.

    ``optimizer`` is FBGEMM's name of it, or `DENSE_ADAM`, `NOT_FUSED` or `NOT_ASKED`. Settings that the optimizer does
    not have stand at their defaults.
    """

    name: str
    optimizer: str
    lr: float = 0.0
    eps: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)
    weight_decay: float = 0.0
    weight_decay_mode: str = "none"
    max_gradient: float = math.inf
    data_type: str = "fp32"
    memory: str = "hbm"
    by: str = "FBGEMM, fused into the backward pass"

    def __str__(self) -> str:
        settings = [f"lr {self.lr:g}"]
        settings += [f"eps {self.eps:g}"] * bool(self.eps)
        settings += [f"betas {self.betas[0]:g} and {self.betas[1]:g}"] * any(self.betas)
        settings += [f"{self.weight_decay_mode} weight decay {self.weight_decay:g}"] * bool(self.weight_decay)
        settings += [f"gradients clamped to {self.max_gradient:g}"] * math.isfinite(self.max_gradient)
        settings += [f"{self.data_type} rows"] * (self.data_type != "fp32")
        settings += [f"memory {self.memory}"] * (self.memory != "hbm")
        return f"{self.name}: {self.optimizer} by {self.by}; {', '.join(settings)}"


DENSE_ADAM, NOT_FUSED, NOT_ASKED = "DENSE_ADAM", "no fused optimizer", "the default optimizer"


def fused_tables(model: nn.Module) -> list[FusedTable]:
    """Read back from the kernels of a sharded model what trains each of its tables; every rank must call it.

    Returns:
        The same on every rank, by name: one entry for each table that any rank holds rows of, more if ranks differ.
    """
    mine = [
        _found(table, kernel.emb_module) for _, kernel in _kernels(model) for table in kernel.config.embedding_tables
    ]
    everyone = [mine]
    if dist.is_initialized():
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
    return sorted(set().union(*everyone))


def _found(table: ShardedEmbeddingTable, table_batch: Any) -> FusedTable:
    if not hasattr(table_batch, "optimizer"):
        return FusedTable(table.name, NOT_FUSED)
    lr = float(table_batch.get_learning_rate())
    if "optimizer" not in (table.fused_params or {}):
        return FusedTable(table.name, NOT_ASKED, lr)
    kind, args = table_batch.optimizer, table_batch.optimizer_args
    mode, on_cpu = "none", table_batch.use_cpu
    if args.weight_decay and kind in _ADAM:
        mode = "decoupled"
    elif args.weight_decay and kind is EmbOptimType.EXACT_ROWWISE_ADAGRAD and (table_batch.is_nobag or not on_cpu):
        # Pooling on a CPU, FBGEMM 1.8 takes another road, which ignores the decay.
        mode = next((name for name, value in _DECAY.items() if value == args.weight_decay_mode), "none")
    found = FusedTable(
        name=table.name,
        optimizer=kind.name,
        lr=lr,
        eps=0.0 if kind is EmbOptimType.EXACT_SGD else args.eps,
        betas=(args.beta1, args.beta2) if kind in _ADAM else (0.0, 0.0),
        weight_decay=0.0 if mode == "none" else args.weight_decay,
        weight_decay_mode=mode,
        max_gradient=args.max_gradient if args.gradient_clipping else math.inf,
    )
    if isinstance(table_batch, AdamTables):
        return dataclasses.replace(
            found,
            optimizer=DENSE_ADAM if table_batch.every_row else kind.name,
            by="muonrec, on a dense kernel, after the backward pass",
        )
    location = table_batch.embedding_specs[table_batch.table_names.index(table.name)][2]
    return dataclasses.replace(
        found, data_type=table_batch.weights_precision.value, memory=_MEMORY.get(location, "hbm")
    )


def check_tables(model: DistributedModelParallel, tables: Mapping[str, TableConfig]) -> list[FusedTable]:
    """Prove that each table is trained by the optimizer and the settings asked for; every rank must call it.

    That none is trained a second time, `build_optimizer` sees to.

    Returns:
        What runs for each table, in the order of their names.

    Raises:
        ValueError: names the table, what was asked and what runs; on every rank.
    """
    found = fused_tables(model)
    if [table.name for table in found] != sorted(tables):
        raise ValueError(
            f"settings are for tables {sorted(tables)}, but the ranks hold {[table.name for table in found]}; every "
            "table must be on some rank, and run the same optimizer on each rank that has rows of it"
        )
    for table in found:
        asked = _asked(table, tables[table.name])
        if table.optimizer != asked.optimizer:
            raise ValueError(f"table {table.name!r} asks for {asked.optimizer}, but {table.optimizer} runs")
        for setting in _CHECKED:
            want, have = getattr(asked, setting), getattr(table, setting)
            # FBGEMM keeps some of them in float32.
            if not (math.isclose(want, have, rel_tol=1e-6) if isinstance(want, float) else want == have):
                raise ValueError(f"table {table.name!r} asks for {setting} {want}, but {have} is in force")
    return found


def _asked(found: FusedTable, table: TableConfig) -> FusedTable:
    return FusedTable(
        name=found.name,
        optimizer=DENSE_ADAM if table.optimizer == "dense_adam" else _FUSED[table.optimizer][1].name,
        lr=table.lr,
        eps=0.0 if table.optimizer == "sgd" else table.eps,
        betas=table.betas if table.is_adam else (0.0, 0.0),
        weight_decay=table.weight_decay,
        weight_decay_mode=table.weight_decay_mode if table.weight_decay else "none",
        max_gradient=math.inf if table.max_gradient is None else table.max_gradient,
        data_type=table.data_type or found.data_type,
        memory=table.memory,
    )


def _table_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for module in model.modules():
        if isinstance(module, EmbeddingCollection):
            yield from ((name, table.weight) for name, table in module.embeddings.items())
        elif isinstance(module, EmbeddingBagCollection):
            yield from ((name, table.weight) for name, table in module.embedding_bags.items())


def table_optimizer(model: DistributedModelParallel) -> KeyedOptimizer:
    """What TorchRec has fused, our Adam beside it, and the step count of every Adam in its state."""
    parts: list[tuple[str, KeyedOptimizer]] = [("", model.fused_optimizer)]
    counting = []
    for path, kernel in _kernels(model.module):
        table_batch = kernel.emb_module
        if isinstance(table_batch, AdamTables):
            optimizer: KeyedOptimizer = TableAdam(kernel.config, table_batch, kernel._pg)
            parts.append((path, optimizer))
        elif isinstance(kernel, BatchedFusedEmbedding | BatchedFusedEmbeddingBag) and table_batch.optimizer in _ADAM:
            optimizer = kernel.fused_optimizer
            counting.append(table_batch)
        else:
            continue
        for key, weight in optimizer.params.items():
            # TorchRec leaves it out, and a resumed Adam would correct its moments as if they were new.
            optimizer.state[weight][f"{key.split('.')[-2]}.iter"] = table_batch.iter
    return _TableOptimizer(parts, counting)


class _TableOptimizer(CombinedOptimizer):
    """The optimizers of all tables; FBGEMM's Adam goes on from the step that is loaded.

    Args:
        parts: as of `CombinedOptimizer`.
        counting: FBGEMM's tables with a step count in the state, which it reads before the first step alone: from then
            on it goes by a copy on the host.
    """

    def __init__(self, parts: Sequence[tuple[str, KeyedOptimizer]], counting: Sequence[Any]) -> None:
        super().__init__(parts)
        self._counting = counting

    def post_load_state_dict(self) -> None:
        super().post_load_state_dict()
        for table_batch in self._counting:
            table_batch.iter_cpu.fill_(int(table_batch.iter))


def _kernels(model: nn.Module) -> Iterator[tuple[str, BaseBatchedEmbedding | BaseBatchedEmbeddingBag]]:
    for path, module in model.named_modules():
        # Managed collisions have their lookups in the collection below them.
        if isinstance(module, ShardedEmbeddingModule) and hasattr(module, "_lookups"):
            for lookup in module._lookups:  # data-parallel ones are wrapped by DDP
                yield from (
                    (path, part)
                    for part in lookup.modules()
                    if isinstance(part, BaseBatchedEmbedding | BaseBatchedEmbeddingBag)
                )
