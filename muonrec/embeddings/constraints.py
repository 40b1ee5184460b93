"""What TorchRec's planner may choose for each table, and what it is never asked, since no kernel could train it.

`make_plan` asks it about the machine there is, `muonrec.embeddings.planning` about one that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import CacheParams, ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection

from muonrec.embeddings.comms import CommsConfig, check_comms, codecs
from muonrec.embeddings.tables import TableConfig, table_configs

# Share of a device's memory that the planner leaves to the tower, activations and batches; TorchRec's own margin.
NOT_FOR_TABLES = 0.15

_SEQUENCES = [ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value, ShardingType.COLUMN_WISE.value]
_MANAGED = [ShardingType.ROW_WISE.value]
_BAGS = [
    *_SEQUENCES,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
]
KERNELS = {
    "hbm": EmbeddingComputeKernel.FUSED,
    "uvm": EmbeddingComputeKernel.FUSED_UVM,
    "uvm_caching": EmbeddingComputeKernel.FUSED_UVM_CACHING,
}


def make_topology(
    num_ranks: int,
    ranks_per_node: int,
    device_type: str,
    *,
    hbm_bytes: int | None = None,
    host_bytes: int | None = None,
) -> Topology:
    """The machines as TorchRec's planner sees them; bytes are of one rank, None for its own guess."""
    return TopologyFactory.create_topology(
        TrainerConfig(num_ranks, ranks_per_node, hbm_cap_bytes=hbm_bytes, ddr_cap_bytes=host_bytes),
        kernel_config=KernelConfig(compute_device=device_type),
    )


def ask_planner(
    model: nn.Module,
    tables: Mapping[str, TableConfig],
    topology: Topology,
    *,
    batch_size: int,
    comms: CommsConfig,
    stats: bool = True,
) -> ShardingPlan:
    """TorchRec's plan under one constraint per table; the same on every rank without talking.

    Args:
        model: unsharded, its tables already in the data types of ``tables``.
        tables: settings by table name.
        topology: of `make_topology`.
        batch_size: users of one rank, for the planner's estimates.
        comms: precision of what the ranks exchange.
        stats: whether the planner logs what it found.

    Raises:
        ValueError: a table or the comms ask for what no kernel can do; says which, and what works instead.
        PlannerError, RuntimeError: TorchRec's, where no plan satisfies the constraints.
    """
    configs = {config.name: config for _, config in table_configs(model)}
    managed = {
        config.name
        for module in model.modules()
        if isinstance(module, BaseManagedCollisionEmbeddingCollection)
        for _, config in table_configs(module)
    }
    if configs.keys() != tables.keys():
        raise ValueError(f"tables of the model: {sorted(configs)}; settings are for {sorted(tables)}; match them")
    constraints = {
        name: constrain(table, configs[name], topology.compute_device, is_managed=name in managed)
        for name, table in tables.items()
    }
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        storage_reservation=FixedPercentageStorageReservation(NOT_FOR_TABLES),
        constraints=constraints,
        debug=False,
        **({} if stats else {"stats": []}),
    )
    # plan(), not collective_plan(): a failure of the latter raises on rank 0 and leaves the others waiting.
    plan = planner.plan(model, make_sharders(comms, topology.compute_device))
    check_comms(comms, plan, {name for name, config in configs.items() if isinstance(config, EmbeddingBagConfig)})
    return plan


def constrain(
    table: TableConfig,
    config: EmbeddingConfig | EmbeddingBagConfig,
    device_type: str,
    *,
    is_managed: bool = False,
) -> ParameterConstraints:
    """What the planner may choose for the table ``config``.

    Args:
        table: settings.
        config: TorchRec's description of it, with the data type it has in the model.
        device_type: ``cuda`` or ``cpu``.
        is_managed: whether it is in a `ManagedCollisionEmbeddingCollection`, or one of bags: zero-collision hashing.

    Raises:
        ValueError: the settings ask for what FBGEMM or TorchRec cannot do on this device.
    """
    if fault := _fault(table, config, device_type, is_managed):
        raise ValueError(f"table {config.name!r} {fault}")
    undecided = _MANAGED if is_managed else _SEQUENCES
    cache = CacheParams(load_factor=table.cache_load_factor) if table.memory == "uvm_caching" else None
    return ParameterConstraints(
        sharding_types=undecided if table.sharding == "auto" else list(table.sharding_types),
        # Without a kernel the planner may pick a dense one, and the fused optimizer would never run.
        compute_kernels=[KERNELS[table.memory].value],
        min_partition=table.min_partition,
        pooling_factors=[table.pooling_factor],
        cache_params=cache,
        stochastic_rounding=table.stochastic_rounding if config.data_type is not DataType.FP32 else None,
    )


def _fault(
    table: TableConfig, config: EmbeddingConfig | EmbeddingBagConfig, device_type: str, is_managed: bool
) -> str | None:
    is_pooled, on_cpu = isinstance(config, EmbeddingBagConfig), device_type == "cpu"
    data_type = config.data_type.value.lower()
    if table.data_type not in (None, data_type):
        return f"asks for {table.data_type} rows, but is {data_type} in the model; call cast_tables before planning"
    if "data_parallel" in table.sharding_types:
        return (
            "asks for data_parallel, whose dense kernel the backward pass does not train, and Muon and AdamW are not "
            "for tables; use row_wise or table_wise"
        )
    if is_managed and not set(table.sharding_types) <= {"auto", *_MANAGED}:
        return (
            f"asks for {', '.join(table.sharding_types)}, but TorchRec shards managed collisions row_wise alone; use "
            "row_wise"
        )
    if is_managed and table.optimizer != "rowwise_adagrad":
        # reset_embedding_weight_momentum of split_table_batched_embeddings_ops_training.py does nothing for others.
        return (
            f"is behind managed collisions and asks for {table.optimizer}, whose state FBGEMM would leave to a row's "
            "next id; use rowwise_adagrad"
        )
    if is_managed and on_cpu:
        return (
            "is behind managed collisions, which do not train on a CPU: the operator that clears a row for its next "
            "id, fbgemm::reset_weight_momentum, is CUDA's alone; use CUDA, or ids without gaps and a plain collection"
        )
    possible = _BAGS if is_pooled else _SEQUENCES
    impossible = [sharding for sharding in table.sharding_types if sharding not in (*possible, "auto")]
    if impossible:
        return (
            f"asks for {', '.join(impossible)}, which TorchRec has for an EmbeddingBagCollection and not for an "
            f"EmbeddingCollection (EmbeddingCollectionSharder.sharding_types); use {', '.join(_SEQUENCES)}"
        )
    if not on_cpu:
        if table.optimizer == "dense_adam":
            return (
                "asks for dense_adam, which runs on a CPU alone; use adam, which updates none but the rows that a "
                "batch has touched"
            )
        return None
    if table.memory != "hbm":
        return (
            f"asks for memory {table.memory}, a cache of host memory on a GPU; on a CPU the rows are in host memory "
            "anyway: use memory hbm, the default"
        )
    if table.is_adam and is_pooled:
        return (
            f"asks for {table.optimizer}, which FBGEMM does not have on a CPU, where ours is for an "
            "EmbeddingCollection; use rowwise_adagrad, or adagrad"
        )
    if table.is_adam and data_type != "fp32":
        return f"asks for {table.optimizer} on {data_type} rows, which on a CPU are fp32; use rowwise_adagrad or fp32"
    if data_type == "bf16":
        return "asks for bf16 rows, for which FBGEMM 1.8 has no CPU kernel; use fp16 or fp32, or train on CUDA"
    if data_type == "fp16" and table.stochastic_rounding:
        return (
            "asks for fp16 rows, which FBGEMM rounds stochastically on CUDA and to the nearest on a CPU, where updates "
            "below half a step are lost; accept that by stochastic_rounding: false, or use fp32"
        )
    return None


def make_sharders(comms: CommsConfig, device_type: str) -> list[ModuleSharder[nn.Module]]:
    """Sharders of sequences and of bags, also behind managed collisions, with the codecs of ``comms``."""
    registry = codecs(comms, device_type)
    sequences, bags = EmbeddingCollectionSharder(qcomm_codecs_registry=registry), BagSharder(None, registry)
    return [
        sequences,  # type: ignore[list-item]
        bags,  # type: ignore[list-item]
        ManagedCollisionEmbeddingCollectionSharder(sequences, qcomm_codecs_registry=registry),  # type: ignore[list-item]
        ManagedCollisionEmbeddingBagCollectionSharder(bags, qcomm_codecs_registry=registry),  # type: ignore[list-item]
    ]


class BagSharder(EmbeddingBagCollectionSharder):
    """TorchRec's, which also cuts tables by rows on a CPU.

    Its own list leaves these types out on a CPU, from when gloo had no reduce-scatter (meta-pytorch/torchrec#1252);
    with torch 2.13 all of them train.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.DATA_PARALLEL.value, *_BAGS]
