"""Sharding: TorchRec's planner under constraints, and the dense side under DDP or FSDP2."""

from __future__ import annotations

import logging
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
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import EnumerableShardingSpec, ModuleSharder, ShardedModule, ShardingEnv, ShardingPlan

from muonrec.embeddings.fused import fuse_optimizers
from muonrec.embeddings.tables import Sharding, TableConfig
from muonrec.mesh import Ranks

logger = logging.getLogger(__name__)

DenseSharding = Literal["ddp", "fsdp2"]

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
    plan = make_plan(
        model, {name: table.sharding for name, table in tables.items()}, ranks=ranks, batch_size=batch_size
    )
    for parameter in model.parameters():
        if not parameter.is_meta and ranks.num_ranks > 1:
            # DDP would broadcast these by itself; FSDP2 would stitch shards of different initialisations together.
            dist.broadcast(parameter.data, src=0)
    wrapper = DefaultDataParallelWrapper() if dense == "ddp" else FSDP2Wrapper()
    sharded = DistributedModelParallel(
        model, device=ranks.device, plan=plan, sharders=_sharders(), data_parallel_wrapper=wrapper
    )
    return sharded, plan


def make_plan(
    model: nn.Module, sharding: Mapping[str, Sharding], *, ranks: Ranks, batch_size: int, hbm_bytes: int | None = None
) -> ShardingPlan:
    """TorchRec's plan for ``model`` under one constraint per table; the same on every rank without talking.

    Raises:
        ValueError: the constraint cannot be met; says which table, and what works instead.
    """
    for name, choice in sharding.items():
        if choice == "data_parallel" and ranks.device.type == "cpu":
            raise ValueError(
                f"table {name!r} asks for data_parallel, whose CPU kernel gives wrong shapes for an "
                "EmbeddingCollection (FBGEMM 1.8); use row_wise, table_wise or column_wise"
            )
    constraints = {
        name: ParameterConstraints(
            sharding_types=_SHARDED if choice == "auto" else [choice],
            # Without this the planner may pick a dense kernel, and the fused optimizer would never run.
            compute_kernels=[
                EmbeddingComputeKernel.DENSE.value if choice == "data_parallel" else EmbeddingComputeKernel.FUSED.value
            ],
            pooling_factors=[1.0],
        )
        for name, choice in sharding.items()
    }
    topology = Topology(world_size=ranks.num_ranks, compute_device=ranks.device.type, hbm_cap=hbm_bytes)
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=batch_size, constraints=constraints, debug=False)
    try:
        # plan(), not collective_plan(): a failure of the latter raises on rank 0 and leaves the others waiting.
        return planner.plan(model, _sharders())
    except (PlannerError, RuntimeError) as error:
        raise ValueError(
            f"no sharding plan for {dict(sharding)} on {ranks.num_ranks} ranks of {ranks.device.type}: {error}"
        ) from error


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

    Args:
        mesh: 1-D device mesh; None for all ranks.
        blocks: names of submodules that are gathered one at a time; None for the children of every `nn.ModuleList`.
    """

    def __init__(self, mesh: DeviceMesh | None = None, blocks: Sequence[str] | None = None) -> None:
        self._mesh = mesh
        self._blocks = blocks

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        root = dmp._dmp_wrapped_module
        mesh = self._mesh or init_device_mesh(device.type, (env.world_size,), mesh_dim_names=("dp_shard",))
        sharded = [module for module in root.modules() if isinstance(module, ShardedModule)]
        # Ranks hold different tables: gathering these would hang.
        ignored = {parameter for module in sharded for parameter in module.parameters()}
        blocks = self._blocks if self._blocks is not None else _list_children(root)
        for name in blocks:
            fully_shard(root.get_submodule(name), mesh=mesh)
        fully_shard(root, mesh=mesh, ignored_params=ignored)


def _list_children(root: nn.Module) -> list[str]:
    return [
        f"{name}.{child}".lstrip(".")
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList)
        for child, block in module.named_children()
        if not any(isinstance(part, ShardedModule) for part in block.modules())
    ]


def _sharders() -> list[ModuleSharder[nn.Module]]:
    return [EmbeddingCollectionSharder()]  # type: ignore[list-item]
