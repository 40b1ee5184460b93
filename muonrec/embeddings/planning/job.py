"""A job as a plan sees it: the cluster, the tables, the dense parameters and what a step looks up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS, DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.optim.optimizers import PartialRowWiseAdam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from muonrec.embeddings.comms import CommsConfig
from muonrec.embeddings.constraints import NOT_FOR_TABLES
from muonrec.embeddings.roles import role_rules
from muonrec.embeddings.sharding import DenseSharding, list_children
from muonrec.embeddings.tables import TableConfig, table_configs
from muonrec.optim import param_groups
from muonrec.optim.update import matrix_shape

# Float32 numbers of state per row and per element (FBGEMM 1.8, split_table_batched_embeddings_ops_training.py: both
# momenta are float32 whatever the table is), and the class by which TorchRec's planner knows the optimizer.
TABLE_STATE: dict[str, tuple[int, int, type[torch.optim.Optimizer]]] = {
    "sgd": (0, 0, torch.optim.SGD),
    "rowwise_adagrad": (1, 0, RowWiseAdagrad),
    "adagrad": (0, 1, torch.optim.Adagrad),
    "adam": (0, 2, torch.optim.Adam),
    "dense_adam": (0, 2, torch.optim.Adam),  # of CPU tables alone, as the plan will say
    "partial_rowwise_adam": (1, 1, PartialRowWiseAdam),
}

# TorchRec's own guess of the host memory that a rank may fill (torchrec.distributed.planner.constants.DDR_CAP).
_HOST_BYTES = 128 * 2**30


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Machines: ``nodes`` of ``ranks_per_node`` devices, each with ``hbm_bytes`` and ``host_bytes`` of its host's."""

    nodes: int
    ranks_per_node: int
    hbm_bytes: int
    host_bytes: int = _HOST_BYTES

    def __post_init__(self) -> None:
        if min(self.nodes, self.ranks_per_node, self.hbm_bytes, self.host_bytes) < 1:
            raise ValueError(
                f"a cluster of {self.nodes} x {self.ranks_per_node} ranks with {self.hbm_bytes} bytes and "
                f"{self.host_bytes} of the host's each cannot be planned; give 1 or more of each"
            )

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def table_room(self) -> int:
        """Bytes of a rank that TorchRec's planner is allowed to fill, see `muonrec.embeddings.constraints`."""
        return int((1 - NOT_FOR_TABLES) * self.hbm_bytes)


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of a model: where it is, how large, and how it is to be trained and sharded.

    Attributes:
        settings: with the data type of its rows, whoever chose it.
    """

    name: str
    module: str
    num_embeddings: int
    embedding_dim: int
    feature_names: tuple[str, ...]
    is_pooled: bool
    settings: TableConfig

    def change(self, **settings: object) -> Table:
        """The same table under other settings."""
        return dataclasses.replace(self, settings=self.settings.model_copy(update=settings))

    @property
    def data_type(self) -> DataType:
        assert self.settings.data_type is not None
        return DataType(self.settings.data_type.upper())

    @property
    def element_bytes(self) -> int:
        return DATA_TYPE_NUM_BITS[self.data_type] // 8

    @property
    def weight_bytes(self) -> int:
        return self.num_embeddings * self.embedding_dim * self.element_bytes

    def state_bytes(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Bytes of optimizer state of shards; row-wise state exists once for every block of columns."""
        return self._row_state(rows) + self._element_state(rows, columns)

    def device_bytes(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of shards on the device: of the weights, or of their cache, and of the optimizer state."""
        weights, share = rows * columns * float(self.element_bytes), self.settings.cache_load_factor
        if self.settings.memory == "hbm":
            return weights, self.state_bytes(rows, columns)
        # Beside the cached rows, for every row its table, and for every cached one which it is and when it was used
        # (torchrec.distributed.planner.shard_estimators).
        cache = share * weights + rows * (4 + 16 * share)
        return cache if self.settings.memory == "uvm_caching" else 0 * weights, self._row_state(rows)

    def host_bytes(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Bytes of shards in the host's memory: FBGEMM keeps row-wise state on the device all the same."""
        if self.settings.memory == "hbm":
            return 0.0 * rows
        return rows * columns * float(self.element_bytes) + self._element_state(rows, columns)

    def _row_state(self, rows: np.ndarray) -> np.ndarray:
        return 4 * rows * TABLE_STATE[self.settings.optimizer][0]

    def _element_state(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return 4 * rows * columns * TABLE_STATE[self.settings.optimizer][1]


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
    comms: CommsConfig = dataclasses.field(default_factory=CommsConfig)


def describe_job(
    model: nn.Module,
    tables: Mapping[str, TableConfig],
    cluster: Cluster,
    *,
    workload: Workload,
    dense_sharding: DenseSharding = "ddp",
    muon: bool = True,
    ns_steps: int = 5,
    overrides: Sequence[tuple[str, str]] = (),
    comms: CommsConfig | None = None,
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
        comms: precision of the rows and gradients that the ranks exchange; float32 by default.

    Raises:
        ValueError: tables without settings, settings without a table, or settings that cannot be planned.
    """
    found = [_describe_table(path, config, tables) for path, config in table_configs(model)]
    unknown = sorted(tables.keys() - {table.name for table in found})
    if unknown or not found:
        raise ValueError(f"tables of the model: {[table.name for table in found]}; settings for no table: {unknown}")

    assignments = param_groups(model, rules=role_rules(model), overrides=overrides)
    parameters = dict(model.named_parameters())
    units = sorted(list_children(model), key=len, reverse=True)
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
    return Job(cluster, tuple(found), tuple(dense), workload, dense_sharding, ns_steps, comms or CommsConfig())


def _describe_table(
    path: str, config: EmbeddingConfig | EmbeddingBagConfig, tables: Mapping[str, TableConfig]
) -> Table:
    if config.name not in tables:
        raise ValueError(f"table {config.name!r} has no settings; give it an entry under 'tables', with its optimizer")
    settings = tables[config.name]
    if settings.optimizer not in TABLE_STATE:
        raise ValueError(
            f"table {config.name!r} asks for optimizer {settings.optimizer!r}, whose state cannot be planned; "
            f"known are {', '.join(TABLE_STATE)}"
        )
    data_type = settings.data_type or config.data_type.value.lower()
    return Table(
        name=config.name,
        module=path,
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        feature_names=tuple(config.feature_names),
        is_pooled=isinstance(config, EmbeddingBagConfig),
        settings=settings.model_copy(update={"data_type": data_type}),
    )
