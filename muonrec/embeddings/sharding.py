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
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import (
    DataParallelWrapper,
    DefaultDataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import EnumerableShardingSpec, ShardedModule, ShardingEnv, ShardingPlan

from muonrec.embeddings.comms import CommsConfig
from muonrec.embeddings.constraints import ask_planner, make_sharders, make_topology
from muonrec.embeddings.cpu_adam import install_adam
from muonrec.embeddings.fused import fuse_optimizers
from muonrec.embeddings.tables import TableConfig, cast_tables
from muonrec.mesh import Ranks

logger = logging.getLogger(__name__)

DenseSharding = Literal["ddp", "fsdp2"]


def shard_model(
    model: nn.Module,
    tables: Mapping[str, TableConfig],
    *,
    dense: DenseSharding,
    ranks: Ranks,
    batch_size: int,
    comms: CommsConfig | None = None,
) -> tuple[DistributedModelParallel, ShardingPlan]:
    """Shard the tables of ``model`` by plan, each with its fused optimizer, and the rest by DDP or FSDP2.

    Every rank must call it with the same model; dense parameters start as rank 0 has them.

    Args:
        model: with `EmbeddingCollection`s or `EmbeddingBagCollection`s, their tables on the meta device.
        tables: settings by table name; each table of the model has exactly one.
        dense: what the parameters outside of the tables go through.
        ranks: this rank among the others.
        batch_size: users of one rank, for the planner's estimates.
        comms: precision of the rows and gradients that the ranks exchange; float32 by default.

    Raises:
        ValueError: tables without settings, settings without a table, or no plan that satisfies them.
    """
    fuse_optimizers(model, tables)
    cast_tables(model, tables)
    plan = make_plan(model, tables, ranks=ranks, batch_size=batch_size, comms=comms)
    # Otherwise DDP arranges its buckets anew after the first step of every start, so that a resumed run adds up the
    # gradients of three and more ranks in another order; nor could `AccumulatedStep` leave a reduction out.
    ddp = DefaultDataParallelWrapper(static_graph=False, find_unused_parameters=True)
    wrapper = ddp if dense == "ddp" else FSDP2Wrapper()
    sharders = make_sharders(comms or CommsConfig(), ranks.device.type)
    sharded = DistributedModelParallel(
        model, device=ranks.device, plan=plan, sharders=sharders, data_parallel_wrapper=wrapper
    )
    install_adam(sharded, _without_fbgemm(tables, ranks))
    return sharded, plan


def make_plan(
    model: nn.Module,
    tables: Mapping[str, TableConfig],
    *,
    ranks: Ranks,
    batch_size: int,
    comms: CommsConfig | None = None,
    hbm_bytes: int | None = None,
) -> ShardingPlan:
    """TorchRec's plan for ``model`` under one constraint per table; the same on every rank.

    On CUDA a collective, where ``hbm_bytes`` is not given: all ranks plan for the smallest memory that one of them has.

    Raises:
        ValueError: a constraint cannot be met; says which table, and what works instead.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.num_ranks))
    host_bytes = None
    if ranks.device.type == "cuda":
        # TorchRec would assume 32 GB, and 128 GB of the host's for each rank.
        host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_here
        if hbm_bytes is None:
            hbm_bytes = torch.cuda.get_device_properties(ranks.device).total_memory
            if ranks.num_ranks > 1:  # nodes of one kind differ by some MB, and plans must not
                smallest = torch.tensor([hbm_bytes, host_bytes], device=ranks.device)
                dist.all_reduce(smallest, dist.ReduceOp.MIN)
                hbm_bytes, host_bytes = smallest.tolist()
    topology = make_topology(ranks.num_ranks, ranks_here, ranks.device.type, hbm_bytes=hbm_bytes, host_bytes=host_bytes)
    try:
        plan = ask_planner(model, tables, topology, batch_size=batch_size, comms=comms or CommsConfig())
    except (PlannerError, RuntimeError) as error:
        asked = {name: ", ".join(table.sharding_types) for name, table in tables.items()}
        raise ValueError(
            f"no sharding plan for {asked} on {ranks.num_ranks} ranks of {ranks.device.type}: {error}"
        ) from error
    _check_single_rows(plan, tables)
    for module_plan in plan.plan.values():
        for name in _without_fbgemm(tables, ranks) & module_plan.keys():  # type: ignore[attr-defined]
            # Only now: the planner takes a dense kernel to mean a replicated table.
            module_plan[name].compute_kernel = EmbeddingComputeKernel.DENSE.value  # type: ignore[index]
    return plan


def _check_single_rows(plan: ShardingPlan, tables: Mapping[str, TableConfig]) -> None:
    for module_plan in plan.plan.values():
        for name, parameter in module_plan.items():  # type: ignore[attr-defined]
            spec = parameter.sharding_spec
            sizes = [shard.shard_sizes[0] for shard in spec.shards] if isinstance(spec, EnumerableShardingSpec) else []
            if 1 in sizes and tables[name].optimizer == "partial_rowwise_adam":
                # EmbeddingFusedOptimizer takes a second moment of one number for a count of the whole table.
                raise ValueError(
                    f"table {name!r} asks for partial_rowwise_adam, and {parameter.sharding_type} gives the ranks "
                    f"{', '.join(map(str, sizes))} rows: where it is one, TorchRec cannot save the second moment; use "
                    "adam or rowwise_adagrad, or a sharding that leaves no rank a single row"
                )


def _without_fbgemm(tables: Mapping[str, TableConfig], ranks: Ranks) -> set[str]:
    """The tables that train by `muonrec.embeddings.cpu_adam`."""
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
                value.data = value.data.to(device)  # a group of NCCL alone carries nothing else
                # Otherwise shards of different initialisations would be stitched together.
                _broadcast_over(mesh, value.detach())
        blocks = self._blocks if self._blocks is not None else list_children(root)
        for name in sorted(blocks, key=lambda name: -name.count(".")):  # inner ones before those that hold them
            fully_shard(root.get_submodule(name), mesh=mesh)
        fully_shard(root, mesh=mesh, ignored_params=ignored & set(root.parameters()))


def _broadcast_over(mesh: DeviceMesh, value: torch.Tensor) -> None:
    """Give all ranks of a mesh what its first one holds: along one dim after the other."""
    for group in mesh.get_all_groups():
        if dist.get_world_size(group) > 1:
            dist.broadcast(value, src=dist.get_global_rank(group, 0), group=group)


def list_children(root: nn.Module) -> list[str]:
    return [
        f"{name}.{child}".lstrip(".")
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList)
        for child, block in module.named_children()
        if not any(isinstance(part, ShardedModule) for part in block.modules())
        and not isinstance(block, nn.ModuleList | nn.ModuleDict)  # they are never called, so nothing would gather them
    ]
