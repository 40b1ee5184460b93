"""Sharding: TorchRec's planner under constraints, and the dense side under DDP or FSDP2."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.model_parallel import (
    DataParallelWrapper,
    DefaultDataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import EnumerableShardingSpec, ModuleSharder, ShardedModule, ShardingEnv, ShardingPlan

from muonrec.embeddings.fused import fuse_optimizers
from muonrec.embeddings.rowwise_adam import install_rowwise_adam
from muonrec.embeddings.tables import TableConfig
from muonrec.mesh import Ranks

logger = logging.getLogger(__name__)

DenseSharding = Literal["ddp", "fsdp2"]

# Share of a device's memory that the planner leaves to the tower, activations and batches; TorchRec's own margin.
_NOT_FOR_TABLES = 0.15

_SHARDED = [ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value, ShardingType.COLUMN_WISE.value]


def shard_model(
    model: nn.Module, tables: Mapping[str, TableConfig], *, dense: DenseSharding, ranks: Ranks, batch_size: int
) -> tuple[DistributedModelParallel, ShardingPlan]:
    """Shard the tables of ``model`` by plan, each with its fused optimizer, and the rest by DDP or FSDP2.

    Every rank must call it with the same model; dense parameters start as rank 0 has them.

    Args:
        model: tables on the meta device.
        tables: settings by table name; each table of the model has exactly one.
        dense: what the parameters outside of the tables go through.
        ranks: this rank among the others.
        batch_size: users of one rank, for the planner's estimates.

    Raises:
        ValueError: tables without settings, settings without a table, or no plan that satisfies them.
    """
    fuse_optimizers(model, tables)
    plan = make_plan(model, tables, ranks=ranks, batch_size=batch_size)
    wrapper = DefaultDataParallelWrapper() if dense == "ddp" else FSDP2Wrapper()
    sharded = DistributedModelParallel(
        model, device=ranks.device, plan=plan, sharders=_sharders(), data_parallel_wrapper=wrapper
    )
    install_rowwise_adam(sharded, _without_fbgemm(tables, ranks))
    return sharded, plan


def make_plan(
    model: nn.Module,
    tables: Mapping[str, TableConfig],
    *,
    ranks: Ranks,
    batch_size: int,
    hbm_bytes: int | None = None,
) -> ShardingPlan:
    """TorchRec's plan for ``model`` under one constraint per table; the same on every rank without talking.

    Raises:
        ValueError: the constraint cannot be met; says which table, and what works instead.
    """
    on_cpu = ranks.device.type == "cpu"
    constraints = {}
    for name, table in tables.items():
        if on_cpu and table.sharding == "data_parallel":
            raise ValueError(
                f"table {name!r} asks for data_parallel, whose CPU kernel gives wrong shapes for an "
                "EmbeddingCollection (FBGEMM 1.8); use row_wise, table_wise or column_wise"
            )
        if on_cpu and table.optimizer == "adam":
            raise ValueError(
                f"table {name!r} asks for adam, which FBGEMM has on CUDA only; use partial_rowwise_adam, which trains "
                "on a CPU too, or rowwise_adagrad"
            )
        # Without a kernel the planner may pick a dense one, and the fused optimizer would never run.
        kernel = EmbeddingComputeKernel.DENSE if table.sharding == "data_parallel" else EmbeddingComputeKernel.FUSED
        constraints[name] = ParameterConstraints(
            sharding_types=_SHARDED if table.sharding == "auto" else [table.sharding],
            compute_kernels=[kernel.value],
            pooling_factors=[1.0],
        )
    if hbm_bytes is None and ranks.device.type == "cuda":
        hbm_bytes = torch.cuda.get_device_properties(ranks.device).total_memory  # TorchRec would assume 32 GB
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.num_ranks))
    topology = TopologyFactory.create_topology(
        TrainerConfig(ranks.num_ranks, ranks_here, hbm_cap_bytes=hbm_bytes),
        kernel_config=KernelConfig(compute_device=ranks.device.type),
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        storage_reservation=FixedPercentageStorageReservation(_NOT_FOR_TABLES),
        constraints=constraints,
        debug=False,
    )
    try:
        # plan(), not collective_plan(): a failure of the latter raises on rank 0 and leaves the others waiting.
        plan = planner.plan(model, _sharders())
    except (PlannerError, RuntimeError) as error:
        asked = {name: table.sharding for name, table in tables.items()}
        raise ValueError(
            f"no sharding plan for {asked} on {ranks.num_ranks} ranks of {ranks.device.type}: {error}"
        ) from error
    for module_plan in plan.plan.values():
        for name in _without_fbgemm(tables, ranks) & module_plan.keys():  # type: ignore[attr-defined]
            # Only now: the planner takes a dense kernel to mean a replicated table.
            module_plan[name].compute_kernel = EmbeddingComputeKernel.DENSE.value  # type: ignore[index]
    return plan


def _without_fbgemm(tables: Mapping[str, TableConfig], ranks: Ranks) -> set[str]:
    """The tables that train by `muonrec.embeddings.rowwise_adam`."""
    return {name for name, table in tables.items() if ranks.device.type == "cpu" and table.is_adam}


def format_plan(plan: ShardingPlan) -> str:
    """The plan as an aligned text table: table, sharding, kernel, and the rows and columns of each rank."""
    rows = [("table", "sharding", "kernel", "rank", "rows", "columns")]
    for module_plan in plan.plan.values():
        for name, parameter in module_plan.items():  # type: ignore[attr-defined]
            spec = parameter.sharding_spec
            shards = spec.shards if isinstance(spec, EnumerableShardingSpec) else []
            for shard in shards:
                (row, column), (num_rows, num_columns) = shard.shard_offsets, shard.shard_sizes
                rank = str(shard.placement.rank()) if shard.placement else "?"
                rows.append(
                    (
                        name,
                        parameter.sharding_type,
                        parameter.compute_kernel,
                        rank,
                        f"{row}..{row + num_rows}",
                        f"{column}..{column + num_columns}",
                    )
                )
            if not shards:
                rows.append((name, parameter.sharding_type, parameter.compute_kernel, "all", "all", "all"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


class FSDP2Wrapper(DataParallelWrapper):
    """Shards everything outside of the tables by FSDP2 (`fully_shard`) where `DistributedModelParallel` would use DDP.

    As under DDP, all ranks start from the weights of the first, whatever their seeds.

    Args:
        mesh: 1-D device mesh, or 2-D for HSDP: replicated along its first dim, sharded along its second; None for one
            dim of all ranks.
        blocks: names of submodules that are gathered one at a time; None for the children of every `nn.ModuleList`.
    """

    def __init__(self, mesh: DeviceMesh | None = None, blocks: Sequence[str] | None = None) -> None:
        self._mesh = mesh
        self._blocks = blocks

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        root = dmp._dmp_wrapped_module
        # Not env.world_size, which counts the ranks that share tables: under 2D parallelism these are a part of all.
        num_ranks = dist.get_world_size(env.process_group)
        mesh = self._mesh or init_device_mesh(device.type, (num_ranks,), mesh_dim_names=("dp_shard",))
        sharded = [module for module in root.modules() if isinstance(module, ShardedModule)]
        # Ranks hold different tables: gathering these would hang.
        ignored = {value for module in sharded for value in (*module.parameters(), *module.buffers())}
        for value in (*root.parameters(), *root.buffers()):
            if value not in ignored:
                # Otherwise shards of different initialisations would be stitched together.
                _broadcast_over(mesh, value.detach())
        blocks = self._blocks if self._blocks is not None else _list_children(root)
        for name in sorted(blocks, key=lambda name: -name.count(".")):  # inner ones before those that hold them
            fully_shard(root.get_submodule(name), mesh=mesh)
        fully_shard(root, mesh=mesh, ignored_params=ignored & set(root.parameters()))


def _broadcast_over(mesh: DeviceMesh, value: torch.Tensor) -> None:
    """Give all ranks of a mesh what its first one holds: along one dim after the other."""
    for group in mesh.get_all_groups():
        if dist.get_world_size(group) > 1:
            dist.broadcast(value, src=dist.get_global_rank(group, 0), group=group)


def _list_children(root: nn.Module) -> list[str]:
    return [
        f"{name}.{child}".lstrip(".")
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList)
        for child, block in module.named_children()
        if not any(isinstance(part, ShardedModule) for part in block.modules())
        and not isinstance(block, nn.ModuleList | nn.ModuleDict)  # they are never called, so nothing would gather them
    ]


def _sharders() -> list[ModuleSharder[nn.Module]]:
    return [EmbeddingCollectionSharder()]  # type: ignore[list-item]
