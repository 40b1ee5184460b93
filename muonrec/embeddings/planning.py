"""Planning: what each rank of a cluster that is not there would hold, send and compute.

TorchRec's planner places the tables, on the meta device; the rest is arithmetic on the shapes. `describe_job` reads a
model, `plan_job` plans it, `find_changes` says what makes a plan fit that does not.
"""

# B = users of a rank, R = ranks, S = shards of a table

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import EnumerableShardingSpec, ModuleSharder
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS, DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.optimizers import PartialRowWiseAdam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from muonrec.embeddings.roles import role_rules
from muonrec.embeddings.sharding import _NOT_FOR_TABLES, _SHARDED, DenseSharding, _list_children
from muonrec.optim import param_groups
from muonrec.optim.exchange import ALIGNMENT_BYTES
from muonrec.optim.ownership import assign_owners, newton_schulz_cost, shard_range
from muonrec.optim.update import matrix_shape

logger = logging.getLogger(__name__)

# Float32 numbers of state per row and per element (FBGEMM 1.8, split_table_batched_embeddings_ops_training.py: both
# momenta are float32 whatever the table is), and the class by which TorchRec's planner knows the optimizer.
_TABLE_STATE: dict[str, tuple[int, int, type[torch.optim.Optimizer]]] = {
    "sgd": (0, 0, torch.optim.SGD),
    "rowwise_adagrad": (1, 0, RowWiseAdagrad),
    "adagrad": (0, 1, torch.optim.Adagrad),
    "adam": (0, 2, torch.optim.Adam),
    "partial_rowwise_adam": (1, 1, PartialRowWiseAdam),
}
_ROW_WISE_OPTIMIZER = {"adagrad": "rowwise_adagrad", "adam": "partial_rowwise_adam"}

_CUT_BY_ROWS = {ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value}
_WITHIN_NODES = {ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value}

_ID_BYTES = 8  # ids and lengths are int64, as `SequenceBatch` has them
_OUTPUT_BYTES = 4  # FBGEMM returns float32 rows of a float16 table too, unless output_dtype says otherwise
_MUON_WIRE_BYTES = 2  # bfloat16, the default ns_dtype of `DistributedMuon`

_NO_LIMIT = 2**60  # bytes

# Larger clusters are not searched: TorchRec's planner takes the longer the more ranks there are.
MOST_RANKS = 4096


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Machines: ``nodes`` of ``ranks_per_node`` devices with ``hbm_bytes`` each."""

    nodes: int
    ranks_per_node: int
    hbm_bytes: int

    def __post_init__(self) -> None:
        if min(self.nodes, self.ranks_per_node, self.hbm_bytes) < 1:
            raise ValueError(
                f"a cluster of {self.nodes} x {self.ranks_per_node} ranks with {self.hbm_bytes} bytes each cannot be "
                "planned; give 1 or more of each"
            )

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def table_room(self) -> int:
        """Bytes of a rank that TorchRec's planner is allowed to fill, see `muonrec.embeddings.sharding`."""
        return int((1 - _NOT_FOR_TABLES) * self.hbm_bytes)


class TableSettings(Protocol):
    """What a plan needs to know of a table's settings; `TableConfig` has it."""

    @property
    def optimizer(self) -> str: ...

    @property
    def sharding(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of a model: where it is, how large, and how it is to be trained and sharded."""

    name: str
    module: str
    num_embeddings: int
    embedding_dim: int
    feature_names: tuple[str, ...]
    data_type: DataType
    is_pooled: bool
    optimizer: str
    sharding: str

    @property
    def element_bytes(self) -> int:
        return DATA_TYPE_NUM_BITS[self.data_type] // 8

    @property
    def weight_bytes(self) -> int:
        return self.num_embeddings * self.embedding_dim * self.element_bytes

    def state_bytes(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Bytes of optimizer state of shards; row-wise state exists once for every block of columns."""
        per_row, per_element, _ = _TABLE_STATE[self.optimizer]
        return 4 * rows * (per_row + per_element * columns)


@dataclasses.dataclass(frozen=True)
class DenseParameter:
    """One parameter outside of the tables.

    Attributes:
        optimizer: ``muon`` or ``adamw``.
        blocks: ``(R, C)`` of the matrices Muon orthogonalizes for it; empty for AdamW.
        unit: the submodule that FSDP2 gathers it with; empty for the root.
    """

    name: str
    shape: tuple[int, ...]
    element_bytes: int
    optimizer: str
    blocks: tuple[tuple[int, int], ...]
    unit: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.element_bytes

    def shard_bytes(self, num_ranks: int) -> int:
        """Bytes of FSDP2's shard, which is padded to the same size on every rank."""
        rows, *rest = self.shape or (1,)
        return -(-rows // num_ranks) * math.prod(rest) * self.element_bytes


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step looks up and keeps for its backward pass.

    Args:
        batch_size: users of the global batch.
        name: what the config calls it, such as ``loss.name=sampled_softmax``.
        ids_per_user: ids by feature; a feature that stands in neither mapping has one per user.
        ids_per_rank: ids by feature that every rank looks up whatever its users, such as shared negatives.
        activation_bytes_per_user: what the tower and the loss keep, an estimate.
        activation_formula: how that was estimated, for people.
    """

    batch_size: int
    name: str = ""
    ids_per_user: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ids_per_rank: Mapping[str, float] = dataclasses.field(default_factory=dict)
    activation_bytes_per_user: float = 0.0
    activation_formula: str = "not estimated"

    def users_per_rank(self, num_ranks: int) -> int:
        """Users of the rank that has most."""
        return max(-(-self.batch_size // num_ranks), 1)

    def ids(self, feature: str, num_ranks: int) -> float:
        """Ids of one feature that a rank looks up in a step."""
        if feature in self.ids_per_rank:
            return self.ids_per_rank[feature]
        return self.ids_per_user.get(feature, 1.0) * self.users_per_rank(num_ranks)


@dataclasses.dataclass(frozen=True)
class Job:
    """A model as a plan sees it, and the cluster it is to run on."""

    cluster: Cluster
    tables: tuple[Table, ...]
    dense: tuple[DenseParameter, ...]
    workload: Workload
    dense_sharding: DenseSharding = "ddp"
    ns_steps: int = 5


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one table's shards lie: arrays ``[S]``, one entry per shard."""

    table: Table
    sharding: str
    kernel: str
    ranks: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


@dataclasses.dataclass(frozen=True)
class Collective:
    """Bytes of one collective in one step: float64 ``[R]``, what each rank sends to the others and receives."""

    name: str
    sent: np.ndarray
    received: np.ndarray

    @property
    def busiest(self) -> float:
        """Bytes through the busiest rank's link, the larger direction."""
        return float(np.maximum(self.sent, self.received).max())


# What stays all the time, then what lives during the forward and backward pass, then during Muon's step.
PERSISTENT = ("tables", "table state", "dense", "gradients", "dense state")
IN_PASSES = ("lookups", "activations", "gathered")
IN_STEP = ("Muon buffers",)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each rank holds, sends and computes.

    Attributes:
        refusal: why TorchRec's planner does not place the tables in the memory there is; None where it does.
        memory: bytes ``[R]`` by part, see `PERSISTENT`, `IN_PASSES` and `IN_STEP`.
        newton_schulz: floating-point operations ``[R]`` of a step.
        owned: matrices ``[R]`` that a rank orthogonalizes.
    """

    job: Job
    placements: list[Placement]
    refusal: str | None
    memory: dict[str, np.ndarray]
    collectives: list[Collective]
    newton_schulz: np.ndarray
    owned: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Bytes ``[R]`` at the highest point of a step: activations are gone when Muon's buffers come."""
        passes, step = (sum(self.memory[part] for part in parts) for parts in (IN_PASSES, IN_STEP))
        return sum(self.memory[part] for part in PERSISTENT) + np.maximum(passes, step)

    @property
    def table_bytes(self) -> np.ndarray:
        """Bytes ``[R]`` of tables with their state."""
        return self.memory["tables"] + self.memory["table state"]

    @property
    def fits(self) -> bool:
        """Whether TorchRec's planner places the tables as it would at the start, and everything has room together."""
        return self.refusal is None and float(self.total.max()) <= self.job.cluster.hbm_bytes


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a job, and the plan it leads to."""

    what: str
    plan: Plan


def describe_job(
    model: nn.Module,
    tables: Mapping[str, TableSettings],
    cluster: Cluster,
    *,
    workload: Workload,
    dense_sharding: DenseSharding = "ddp",
    muon: bool = True,
    ns_steps: int = 5,
    overrides: Sequence[tuple[str, str]] = (),
) -> Job:
    """Read tables and dense parameters off any model with `EmbeddingCollection`s or `EmbeddingBagCollection`s.

    Args:
        model: unsharded; its tables on the meta device where they are large.
        tables: settings by table name; each table of the model has exactly one.
        cluster: where it is to run.
        workload: of a step.
        dense_sharding: what the parameters outside of the tables go through.
        muon: whether Muon updates the matrices; AdamW otherwise.
        ns_steps: Newton-Schulz iterations.
        overrides: as in `build_optimizer`.

    Raises:
        ValueError: tables without settings, settings without a table, or settings that cannot be planned.
    """
    found = [_describe_table(path, config, tables) for path, config in _table_configs(model)]
    unknown = sorted(tables.keys() - {table.name for table in found})
    if unknown or not found:
        raise ValueError(f"tables of the model: {[table.name for table in found]}; settings for no table: {unknown}")

    assignments = param_groups(model, rules=role_rules(model), overrides=overrides)
    parameters = dict(model.named_parameters())
    units = sorted(_list_children(model), key=len, reverse=True)
    dense = []
    for assignment in assignments:
        if assignment.optimizer == "sparse":
            continue
        blocks: tuple[tuple[int, int], ...] = ()
        if muon and assignment.optimizer == "muon":
            shape = matrix_shape(assignment.name, assignment.shape)
            blocks = tuple(assignment.split.shapes(shape)) if assignment.split else (shape,)
        unit = next((unit for unit in units if assignment.name.startswith(unit + ".")), "")
        element_bytes = parameters[assignment.name].element_size()
        optimizer = "muon" if blocks else "adamw"
        dense.append(DenseParameter(assignment.name, assignment.shape, element_bytes, optimizer, blocks, unit))
    return Job(cluster, tuple(found), tuple(dense), workload, dense_sharding, ns_steps)


def plan_job(job: Job) -> Plan:
    """Place the tables by TorchRec's planner and work out the rest."""
    return _account(job, *_place(job))


def _account(job: Job, placements: list[Placement], refusal: str | None) -> Plan:
    memory, collectives = _account_tables(job, placements)
    dense_memory, dense_collectives = _account_dense(job)
    muon_memory, muon_collectives, newton_schulz, owned = _account_muon(job)
    users = job.workload.users_per_rank(job.cluster.num_ranks)
    return Plan(
        job=job,
        placements=placements,
        refusal=refusal,
        memory={
            **memory,
            **dense_memory,
            **muon_memory,
            "dense state": dense_memory["dense state"] + muon_memory["dense state"],
            "activations": np.full(job.cluster.num_ranks, users * job.workload.activation_bytes_per_user),
        },
        collectives=collectives + dense_collectives + muon_collectives,
        newton_schulz=newton_schulz,
        owned=owned,
    )


def find_changes(plan: Plan, *, workloads: Sequence[Workload] = ()) -> list[Change]:
    """What was tried to make a plan fit, the smallest changes first, each planned again; empty where it fits.

    First another workload, then what leaves the arithmetic alone (row-wise sharding, FSDP2), then what does not (a
    row-wise optimizer, float16, for as few tables as suffice), then several at once, and a smaller batch last. The
    first that fits is the smallest. The fewest nodes that would do, nothing else changed but row-wise sharding, are
    always worked out, since they are a matter of money; where no settings suffice, with the slimmest tables too.

    Args:
        plan: of the job as it is.
        workloads: others worth trying, such as that of another loss.
    """
    if plan.fits:
        return []
    # Cut by rows is the most even of what the planner may choose, and searched without asking it.
    job = _change_tables(plan.job, _row_wise, [t.name for t in plan.job.tables if t.sharding == "auto"])
    row_wise = _change_tables(job, _row_wise)
    search = _Search(job)
    for workload in workloads:
        search.attempt(dataclasses.replace(job, workload=workload))
    search.attempt(row_wise)
    if _is_full_of_dense(plan):
        search.attempt(dataclasses.replace(job, dense_sharding="fsdp2"))
    search.fewest_tables(job, _row_wise_optimizer)
    search.fewest_tables(job, _float16)
    settings_suffice = search.found
    if not settings_suffice:
        slim = _change_tables(row_wise, _row_wise_optimizer)
        for combined in (slim, _change_tables(row_wise, _float16), _change_tables(slim, _float16)):
            if search.attempt(combined):
                break
            if _is_full_of_dense(_account(combined, *_place_by_rows(combined))):
                search.attempt(dataclasses.replace(combined, dense_sharding="fsdp2"))
        settings_suffice = search.found
    most = MOST_RANKS // job.cluster.ranks_per_node
    nodes = search.fewest_nodes(row_wise, most=most)
    if not settings_suffice:
        slimmest = _change_tables(_change_tables(row_wise, _row_wise_optimizer), _float16)
        search.fewest_nodes(slimmest, most=most if nodes is None else nodes - 1)
    if not search.found:
        search.largest_batch(job)
    return search.tried


def _is_full_of_dense(plan: Plan) -> bool:
    """Whether a plan that does not fit would, were it not for the tower's parameters and what belongs to them."""
    rest = plan.table_bytes + plan.memory["lookups"] + plan.memory["activations"]
    return plan.refusal is None and not plan.fits and float(rest.max()) <= plan.job.cluster.hbm_bytes


class _Search:
    """Plans changes of a job, each once, and keeps what came of it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.tried: list[Change] = []

    @property
    def found(self) -> bool:
        return any(change.plan.fits for change in self.tried)

    def attempt(self, changed: Job) -> bool:
        """Whether ``changed`` fits; remembered, unless it is the job itself or was planned before."""
        if changed == self._job:
            return False
        for change in self.tried:
            if change.plan.job == changed:
                return change.plan.fits
        self.tried.append(Change(_describe_change(self._job, changed), plan_job(changed)))
        return self.tried[-1].plan.fits

    def fewest_tables(self, job: Job, change: Callable[[Table], Table]) -> None:
        """The fewest tables, the largest first, whose change makes the job fit; all of them where none do."""
        names = [t.name for t in sorted(job.tables, key=lambda t: -t.weight_bytes) if change(t) != t]
        first = _first(len(names), lambda count: _would_fit(_change_tables(job, change, names[:count])))
        self.attempt(_change_tables(job, change, names[:first]))

    def fewest_nodes(self, job: Job, *, most: int) -> int | None:
        """The fewest nodes of the same kind on which ``job`` fits; None where no number up to ``most`` was found."""

        def on(nodes: int) -> Job:
            return dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, nodes=nodes))

        # No layout beats tables dealt out evenly.
        room = job.cluster.hbm_bytes * job.cluster.ranks_per_node
        needed = sum(t.weight_bytes + int(t.state_bytes(*_whole(t))[0]) for t in job.tables)
        least = max(job.cluster.nodes + 1, math.ceil(needed / room))
        nodes, below = least, least - 1
        while nodes <= most and not _would_fit(on(nodes)):
            # In small strides: Muon's buffers under DDP grow with the ranks, so what fits may be a stretch between.
            below, nodes = nodes, min(nodes + 1 + nodes // 4, most) if nodes < most else most + 1
        if nodes > most:
            return None
        found = below + _first(nodes - below, lambda more: _would_fit(on(below + more)))
        self.attempt(on(found))
        return found

    def largest_batch(self, job: Job) -> None:
        """The largest batch, of as many users a rank, with which ``job`` fits; one user a rank where none does."""
        ranks = job.cluster.num_ranks
        users = job.workload.users_per_rank(ranks)

        def with_fewer(fewer: int) -> Job:
            batch_size = (users - fewer) * ranks
            return dataclasses.replace(job, workload=dataclasses.replace(job.workload, batch_size=batch_size))

        if users > 1:
            self.attempt(with_fewer(_first(users - 1, lambda fewer: _would_fit(with_fewer(fewer)))))


def _first(most: int, holds: Callable[[int], bool]) -> int:
    """The first of ``1 .. most`` for which a condition that stays true once it is true holds; ``most`` otherwise."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def _would_fit(job: Job) -> bool:
    """What `plan_job` would find, without the planner where every table is cut by rows."""
    if any(table.sharding != ShardingType.ROW_WISE.value for table in job.tables):
        return plan_job(job).fits
    return _account(job, *_place_by_rows(job)).fits


def _change_tables(job: Job, change: Callable[[Table], Table], names: Iterable[str] | None = None) -> Job:
    chosen = {t.name for t in job.tables} if names is None else set(names)
    return dataclasses.replace(job, tables=tuple(change(t) if t.name in chosen else t for t in job.tables))


def _row_wise(table: Table) -> Table:
    return dataclasses.replace(table, sharding=ShardingType.ROW_WISE.value)


def _row_wise_optimizer(table: Table) -> Table:
    return dataclasses.replace(table, optimizer=_ROW_WISE_OPTIMIZER.get(table.optimizer, table.optimizer))


def _float16(table: Table) -> Table:
    return dataclasses.replace(table, data_type=DataType.FP16) if table.element_bytes > 2 else table


def _describe_change(before: Job, after: Job) -> str:
    """What differs, in the words of a config."""
    settings: dict[str, list[str]] = {}
    for old, new in zip(before.tables, after.tables, strict=True):
        changed = []
        if old.sharding != new.sharding:
            changed.append(f"sharding={new.sharding}")
        if old.optimizer != new.optimizer:
            changed.append(f"optimizer={new.optimizer}")
        if old.data_type != new.data_type:
            changed.append(f"{new.data_type.value.lower()} rows")
        if changed:
            settings.setdefault(", ".join(changed), []).append(new.name)
    parts = [
        f"{what} for {'every table' if len(names) == len(before.tables) > 1 else ', '.join(names)}"
        for what, names in settings.items()
    ]
    if before.dense_sharding != after.dense_sharding:
        parts.append(f"dense_sharding={after.dense_sharding}")
    if before.workload.name != after.workload.name:
        parts.append(after.workload.name)
    elif before.workload.batch_size != after.workload.batch_size:
        parts.append(f"batch_size={after.workload.batch_size}")
    if before.cluster.nodes != after.cluster.nodes:
        parts.append(f"{after.cluster.nodes} nodes ({after.cluster.num_ranks} ranks)")
    return "; ".join(parts)


# The tables ----------------------------------------------------------------------------------------------------------


def _table_configs(model: nn.Module) -> Iterable[tuple[str, EmbeddingConfig | EmbeddingBagConfig]]:
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingCollection):
            yield from ((path, config) for config in module.embedding_configs())
        elif isinstance(module, EmbeddingBagCollection):
            yield from ((path, config) for config in module.embedding_bag_configs())


def _describe_table(
    path: str, config: EmbeddingConfig | EmbeddingBagConfig, tables: Mapping[str, TableSettings]
) -> Table:
    if config.name not in tables:
        raise ValueError(f"table {config.name!r} has no settings; give it an entry under 'tables', with its optimizer")
    settings = tables[config.name]
    if settings.optimizer not in _TABLE_STATE:
        raise ValueError(
            f"table {config.name!r} asks for optimizer {settings.optimizer!r}, whose state cannot be planned; "
            f"known are {', '.join(_TABLE_STATE)}"
        )
    if settings.sharding == ShardingType.DATA_PARALLEL.value:
        raise ValueError(
            f"table {config.name!r} asks for data_parallel, whose dense kernel the backward pass does not train; "
            "use row_wise, table_wise or column_wise"
        )
    return Table(
        name=config.name,
        module=path,
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        feature_names=tuple(config.feature_names),
        data_type=config.data_type,
        is_pooled=isinstance(config, EmbeddingBagConfig),
        optimizer=settings.optimizer,
        sharding=settings.sharding,
    )


def _place(job: Job) -> tuple[list[Placement], str | None]:
    """The planner's placements in the memory there is; where it refuses, those without a limit, and its words."""
    try:
        return _ask_planner(job, job.cluster.hbm_bytes), None
    except PlannerError as error:
        refusal = str(error)
    # For a table that is left to the planner: the layout that is most even.
    even = _change_tables(job, _row_wise, [t.name for t in job.tables if t.sharding == "auto"])
    if all(table.sharding == ShardingType.ROW_WISE.value for table in even.tables):
        return _place_by_rows(even)[0], refusal
    try:
        return _ask_planner(even, _NO_LIMIT), refusal
    except PlannerError as error:
        raise ValueError(
            f"no sharding plan for {_asked(job)} on {job.cluster.num_ranks} ranks, whatever their memory: {error}"
        ) from error


def _ask_planner(job: Job, hbm_bytes: int) -> list[Placement]:
    """TorchRec's plan, asked as `muonrec.embeddings.sharding.make_plan` asks on a GPU."""
    cluster = job.cluster
    topology = TopologyFactory.create_topology(
        TrainerConfig(
            cluster.num_ranks,
            cluster.ranks_per_node,
            hbm_cap_bytes=hbm_bytes,
        ),
        kernel_config=KernelConfig(compute_device="cuda"),
    )
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=_SHARDED if table.sharding == "auto" else [table.sharding],
            compute_kernels=[EmbeddingComputeKernel.FUSED.value],
            pooling_factors=[1.0],
        )
        for table in job.tables
    }
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=job.workload.users_per_rank(cluster.num_ranks),
        storage_reservation=FixedPercentageStorageReservation(_NOT_FOR_TABLES),
        stats=[],
        constraints=constraints,
        debug=False,
    )
    sharders: list[ModuleSharder[Any]] = [EmbeddingCollectionSharder(), EmbeddingBagCollectionSharder()]
    try:
        plan = planner.plan(_skeleton(job.tables), sharders)
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


def _place_by_rows(job: Job) -> tuple[list[Placement], str | None]:
    """What the planner makes of tables that are all to be cut by rows, and whether it refuses: its own sums."""
    num_ranks, users = job.cluster.num_ranks, job.workload.users_per_rank(job.cluster.num_ranks)
    placements, storage = [], np.zeros(num_ranks)
    for table in job.tables:
        ranges = np.minimum(np.arange(num_ranks + 1) * -(-table.num_embeddings // num_ranks), table.num_embeddings)
        rows, columns = np.diff(ranges), np.full(num_ranks, table.embedding_dim)
        kernel = EmbeddingComputeKernel.FUSED.value
        placements.append(Placement(table, ShardingType.ROW_WISE.value, kernel, np.arange(num_ranks), rows, columns))
        # As torchrec.distributed.planner.shard_estimators has them: state in the table's own type, one id per user.
        optimizer = _TABLE_STATE[table.optimizer][2]
        weights = rows * columns * table.element_bytes
        multiples = {torch.optim.SGD: 0.0, RowWiseAdagrad: 1 / table.embedding_dim, torch.optim.Adam: 2.0}
        state = np.ceil(weights * multiples.get(optimizer, 1.0))
        ids_and_rows = users * (8 + table.embedding_dim * table.element_bytes)
        storage += weights + state + np.where(rows > 0, ids_and_rows, 0)
    if storage.max() > job.cluster.table_room:
        return placements, f"a rank would need {storage.max():,.0f} bytes"
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
            weight._optimizer_classes = [_TABLE_STATE[table.optimizer][2]]
        model[_key(path)] = collection
    return model


def _asked(job: Job) -> dict[str, str]:
    return {table.name: table.sharding for table in job.tables}


def _key(path: str) -> str:
    return path.replace(".", "/") or "(root)"


def _whole(table: Table) -> tuple[np.ndarray, np.ndarray]:
    return np.array([table.num_embeddings]), np.array([table.embedding_dim])


def _account_tables(job: Job, placements: Sequence[Placement]) -> tuple[dict[str, np.ndarray], list[Collective]]:
    """Memory of the tables, and what their all-to-alls move; ids are taken to hit all rows alike."""
    num_ranks, users = job.cluster.num_ranks, job.workload.users_per_rank(job.cluster.num_ranks)
    weights, state, lookups = (np.zeros(num_ranks) for _ in range(3))
    collectives: dict[str, Collective] = {}

    def count(name: str, sent: np.ndarray, received: np.ndarray) -> None:
        before = collectives.get(name)
        if before is not None:
            sent, received = sent + before.sent, received + before.received
        collectives[name] = Collective(name, sent, received)

    for placement in placements:
        table, ranks = placement.table, placement.ranks
        ids = sum(job.workload.ids(feature, num_ranks) for feature in table.feature_names)
        lengths = users * len(table.feature_names)
        share = placement.rows / table.num_embeddings if placement.sharding in _CUT_BY_ROWS else np.ones(len(ranks))
        np.add.at(weights, ranks, placement.rows * placement.columns * float(table.element_bytes))
        np.add.at(state, ranks, table.state_bytes(placement.rows, placement.columns).astype(float))

        # Every rank sends the ids of a shard's rows, and the lengths of all its users, to where the shard is.
        asked = (ids * share + lengths) * _ID_BYTES
        count("ids", *_to_shards(asked, ranks, num_ranks))
        # Every rank gets as many rows back; sums of rows where bags are pooled, before they are added up.
        rows_back = lengths * np.ones(len(ranks)) if table.is_pooled else ids * share
        answered = rows_back * placement.columns * _OUTPUT_BYTES
        if table.is_pooled and placement.sharding in _WITHIN_NODES:
            forward = _sum_within_nodes(answered, ranks, job.cluster)
        else:
            forward = _to_shards(answered, ranks, num_ranks)[::-1]
        count(f"embeddings forward, {placement.sharding}", *forward)
        count(f"embeddings backward, {placement.sharding}", *forward[::-1])

        # Two batches of ids are in flight (TrainPipelineSparseDist); rows and their gradients, here and at their owner.
        held = np.zeros(num_ranks)
        np.add.at(held, ranks, num_ranks * (asked + answered))
        lookups += 2 * (held + asked.sum() + answered.sum())
    return {"tables": weights, "table state": state, "lookups": lookups}, list(collectives.values())


def _to_shards(parcels: np.ndarray, ranks: np.ndarray, num_ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Sent and received ``[R]`` where every rank sends parcel s to the rank of shard s, and keeps those of its own."""
    own = np.zeros(num_ranks)
    np.add.at(own, ranks, parcels)
    return parcels.sum() - own, (num_ranks - 1) * own


def _sum_within_nodes(parcels: np.ndarray, ranks: np.ndarray, cluster: Cluster) -> tuple[np.ndarray, np.ndarray]:
    """Sent and received ``[R]`` where sums are reduced and scattered within the node, then sent to other nodes."""
    num_ranks, here = cluster.num_ranks, cluster.ranks_per_node
    own = np.zeros(num_ranks)
    np.add.at(own, ranks, parcels)
    within = (here - 1) / here * num_ranks * own
    # After that each rank holds the sums for one rank of every node, that of its own place in the node.
    across = own.reshape(cluster.nodes, here)
    return within + (cluster.nodes - 1) * own, within + (across.sum(0) - across).reshape(-1)


# The tower -----------------------------------------------------------------------------------------------------------


def _account_dense(job: Job) -> tuple[dict[str, np.ndarray], list[Collective]]:
    """Dense parameters, gradients and AdamW's state, and how DDP or FSDP2 move them."""
    num_ranks = job.cluster.num_ranks
    whole = sum(p.num_bytes for p in job.dense)
    ring = (num_ranks - 1) / num_ranks
    if job.dense_sharding == "ddp":
        held = whole
        adamw = sum(2 * p.num_bytes for p in job.dense if p.optimizer == "adamw")
        gathered = 0
        moved = {"dense gradients, all-reduce (DDP)": 2 * ring * whole}
    else:
        held = sum(p.shard_bytes(num_ranks) for p in job.dense)
        adamw = sum(2 * p.shard_bytes(num_ranks) for p in job.dense if p.optimizer == "adamw")
        units: dict[str, int] = {}
        for p in job.dense:
            units[p.unit] = units.get(p.unit, 0) + p.shard_bytes(num_ranks) * num_ranks
        root, blocks = units.pop("", 0), sorted(units.values(), reverse=True)
        # The root stays gathered from its forward to its backward pass; of the blocks one is used, the next is on its
        # way, and the gradient of one is being scattered.
        gathered = root + sum(blocks[:2]) + max([root, *blocks[:1]])
        moved = {
            "dense weights, all-gather (FSDP2)": ring * (root + 2 * sum(blocks)),
            "dense gradients, reduce-scatter (FSDP2)": ring * (root + sum(blocks)),
        }
    everywhere = np.ones(num_ranks)
    memory = {
        "dense": held * everywhere,
        "gradients": held * everywhere,
        "dense state": adamw * everywhere,
        "gathered": gathered * everywhere,
    }
    return memory, [Collective(name, size * everywhere, size * everywhere) for name, size in moved.items()]


def _account_muon(job: Job) -> tuple[dict[str, np.ndarray], list[Collective], np.ndarray, np.ndarray]:
    """Momentum, buffers, exchange and work of `DistributedMuon`, whose owners are assigned as it does."""
    num_ranks = job.cluster.num_ranks
    matrices = [p for p in job.dense if p.optimizer == "muon"]
    costs = {p.name: sum(newton_schulz_cost(block, job.ns_steps) for block in p.blocks) for p in matrices}
    owners = assign_owners(costs, num_ranks)
    momentum, buffers, sent, received, work = (np.zeros(num_ranks) for _ in range(5))
    to_owner, at_owner = np.zeros(num_ranks), np.zeros(num_ranks)
    owned = np.zeros(num_ranks, dtype=int)
    for p in matrices:
        owner = owners[p.name]
        work[owner] += costs[p.name]
        owned[owner] += 1
        wire = min(_MUON_WIRE_BYTES, p.element_bytes)
        if job.dense_sharding == "ddp":
            # The owner packs one copy for every rank, itself too.
            parcel = _aligned(math.prod(p.shape) * wire)
            momentum[owner] += p.num_bytes
            sent[owner] += (num_ranks - 1) * parcel
            received += parcel
            received[owner] -= parcel
            buffers += parcel
            buffers[owner] += num_ranks * parcel
            continue
        rest = math.prod(p.shape[1:])
        ranges = [shard_range(p.shape[0], num_ranks, rank) for rank in range(num_ranks)]
        shards = np.array([_aligned((stop - start) * rest * wire) for start, stop in ranges], dtype=float)
        momentum += p.shard_bytes(num_ranks)
        to_owner += shards
        to_owner[owner] -= shards[owner]
        at_owner[owner] += shards.sum() - shards[owner]
        buffers += 2 * shards
        buffers[owner] += 2 * shards.sum()
    collectives = []
    if matrices and job.dense_sharding == "ddp":
        collectives = [Collective("Muon updates, all-to-all", sent, received)]
    elif matrices:
        collectives = [
            Collective("Muon momentum to its owner, all-to-all", to_owner, at_owner),
            Collective("Muon updates back, all-to-all", at_owner, to_owner),
        ]
    if matrices:
        agreed = np.full(num_ranks, 2 * (num_ranks - 1) / num_ranks * 4 * len(matrices))
        collectives.append(Collective("Muon: who has a gradient, all-reduce", agreed, agreed))
    return {"dense state": momentum, "Muon buffers": buffers}, collectives, work, owned


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
