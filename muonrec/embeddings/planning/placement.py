"""Where the shards of the tables lie: TorchRec's planner on the meta device, or its sums where it need not be asked."""

# R = ranks, S = shards of a table

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec.distributed.embedding_types import ShardingType
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import EnumerableShardingSpec
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from muonrec.embeddings.comms import can_reduce
from muonrec.embeddings.constraints import KERNELS, ask_planner, make_topology
from muonrec.embeddings.planning.job import TABLE_STATE, Job, Table

_NO_LIMIT = 2**60  # bytes


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one table's shards lie: arrays ``[S]``, one entry per shard."""

    table: Table
    sharding: str
    kernel: str
    ranks: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


def place(job: Job) -> tuple[list[Placement], str | None]:
    """The planner's placements in the memory there is; where it refuses, those without a limit, and its words."""
    try:
        return _ask_planner(job, job.cluster.hbm_bytes, job.cluster.host_bytes), None
    except PlannerError as error:
        refusal = str(error)
    # For a table that is left to the planner: the layout that is most even.
    even = decide_row_wise(job)
    if all(is_row_wise(table) for table in even.tables):
        return place_by_rows(even)[0], refusal
    try:
        return _ask_planner(even, _NO_LIMIT, _NO_LIMIT), refusal
    except PlannerError as error:
        raise ValueError(
            f"no sharding plan for {_asked(job)} on {job.cluster.num_ranks} ranks, whatever their memory: {error}"
        ) from error


def is_row_wise(table: Table) -> bool:
    """Whether the planner has no choice but to cut the table by rows."""
    return table.settings.sharding_types == (ShardingType.ROW_WISE.value,)


def decide_row_wise(job: Job, *, whatever_is_asked: bool = False) -> Job:
    """Cut by rows, which is most even, each table that the planner may cut so, or each that can be."""
    by_rows = {"auto", ShardingType.ROW_WISE.value}

    def decide(table: Table) -> Table:
        may_be_cut = whatever_is_asked or by_rows & set(table.settings.sharding_types)
        if not may_be_cut or (table.is_pooled and not can_reduce(job.comms)):
            return table
        return table.change(sharding=ShardingType.ROW_WISE.value)

    return dataclasses.replace(job, tables=tuple(decide(table) for table in job.tables))


def _ask_planner(job: Job, hbm_bytes: int, host_bytes: int) -> list[Placement]:
    """TorchRec's plan, asked as `muonrec.embeddings.sharding.make_plan` asks on a GPU."""
    cluster = job.cluster
    topology = make_topology(
        cluster.num_ranks, cluster.ranks_per_node, "cuda", hbm_bytes=hbm_bytes, host_bytes=host_bytes
    )
    try:
        plan = ask_planner(
            _skeleton(job.tables),
            {table.name: table.settings for table in job.tables},
            topology,
            batch_size=job.workload.users_per_rank(cluster.num_ranks),
            comms=job.comms,
            stats=False,
        )
    except RuntimeError as error:
        raise ValueError(f"no sharding plan for {_asked(job)} on {cluster.num_ranks} ranks of cuda: {error}") from error
    placements = []
    tables = {(_key(table.module), table.name): table for table in job.tables}
    for path, module_plan in plan.plan.items():
        for name, parameter in module_plan.items():  # type: ignore[attr-defined]
            spec = parameter.sharding_spec
            assert isinstance(spec, EnumerableShardingSpec)
            placements.append(
                Placement(
                    table=tables[path, name],
                    sharding=parameter.sharding_type,
                    kernel=parameter.compute_kernel,
                    ranks=np.array(parameter.ranks),
                    rows=np.array([shard.shard_sizes[0] for shard in spec.shards]),
                    columns=np.array([shard.shard_sizes[1] for shard in spec.shards]),
                )
            )
    order = {table: i for i, table in enumerate(job.tables)}
    return sorted(placements, key=lambda placement: order[placement.table])


def place_by_rows(job: Job) -> tuple[list[Placement], str | None]:
    """What the planner makes of tables that are all to be cut by rows, and whether it refuses: its own sums."""
    num_ranks, users = job.cluster.num_ranks, job.workload.users_per_rank(job.cluster.num_ranks)
    placements, device, host = [], np.zeros(num_ranks), np.zeros(num_ranks)
    for table in job.tables:
        settings = table.settings
        ranges = np.minimum(np.arange(num_ranks + 1) * -(-table.num_embeddings // num_ranks), table.num_embeddings)
        rows, columns = np.diff(ranges), np.full(num_ranks, table.embedding_dim)
        kernel = KERNELS[settings.memory].value
        placements.append(Placement(table, ShardingType.ROW_WISE.value, kernel, np.arange(num_ranks), rows, columns))
        # As torchrec.distributed.planner.shard_estimators has them: state in the table's own type, that of cached rows
        # alone on the device, and as many ids per user as the settings say.
        optimizer = TABLE_STATE[settings.optimizer][2]
        multiples = {torch.optim.SGD: 0.0, RowWiseAdagrad: 1 / table.embedding_dim, torch.optim.Adam: 2.0}
        share = settings.cache_load_factor

        def stored(size: float, rows: np.ndarray = rows, table: Table = table, more: float = 0.0) -> np.ndarray:
            weights = np.ceil(size * rows / table.num_embeddings)
            return weights + np.ceil(weights * more)

        state = multiples.get(optimizer, 1.0)
        ids_and_rows = np.ceil(users * settings.pooling_factor * (8 + table.embedding_dim * table.element_bytes))
        device += np.where(rows > 0, ids_and_rows, 0)
        if settings.memory == "hbm":
            device += stored(table.weight_bytes, more=state)
            continue
        host += stored(table.weight_bytes, more=state)
        if settings.memory == "uvm_caching":
            device += stored(round(table.weight_bytes * share), more=state) + np.ceil(rows * (4 + share * 16))
    if device.max() > job.cluster.table_room:
        return placements, f"a rank would need {device.max():,.0f} bytes"
    if host.max() > job.cluster.host_bytes:
        return placements, f"a rank would need {host.max():,.0f} bytes of the host's memory"
    return placements, None


def _skeleton(tables: Sequence[Table]) -> nn.Module:
    """The collections alone, on the meta device, with what the planner reads off them."""
    model = nn.ModuleDict()
    for path in dict.fromkeys(table.module for table in tables):
        configs = [table for table in tables if table.module == path]
        pooled = configs[0].is_pooled
        config_class = EmbeddingBagConfig if pooled else EmbeddingConfig
        collection_class = EmbeddingBagCollection if pooled else EmbeddingCollection
        collection = collection_class(
            tables=[
                config_class(
                    name=table.name,
                    num_embeddings=table.num_embeddings,
                    embedding_dim=table.embedding_dim,
                    feature_names=list(table.feature_names),
                    data_type=table.data_type,
                )
                for table in configs
            ],
            device=torch.device("meta"),
        )
        parameters = dict(collection.named_parameters())
        for table in configs:
            holder = "embedding_bags" if pooled else "embeddings"
            # How the planner knows the size of the state.
            weight: Any = parameters[f"{holder}.{table.name}.weight"]
            weight._optimizer_classes = [TABLE_STATE[table.settings.optimizer][2]]
        model[_key(path)] = collection
    return model


def _asked(job: Job) -> dict[str, str]:
    return {table.name: ", ".join(table.settings.sharding_types) for table in job.tables}


def _key(path: str) -> str:
    return path.replace(".", "/") or "(root)"
