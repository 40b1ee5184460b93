"""What every rank holds, sends and computes once the shards are placed; arithmetic on the shapes."""

# B = users of a rank, R = ranks, S = shards of a table

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from torchrec.distributed.embedding_types import ShardingType

from muonrec.embeddings.comms import WIRE_BYTES
from muonrec.embeddings.planning.job import Cluster, Job
from muonrec.embeddings.planning.placement import Placement, place
from muonrec.optim.exchange import ALIGNMENT_BYTES, even_share, should_deal_out
from muonrec.optim.ownership import assign_buckets, assign_owners, newton_schulz_cost, shard_range

_CUT_BY_ROWS = {ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value}
_WITHIN_NODES = {ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value}

_ID_BYTES = 8  # ids and lengths are int64, as `SequenceBatch` has them
_OUTPUT_BYTES = 4  # FBGEMM returns float32 rows of a float16 table too, unless output_dtype says otherwise
_MUON_WIRE_BYTES = 2  # bfloat16, the default ns_dtype of `DistributedMuon`


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
        host: bytes ``[R]`` of tables and their state in the host's memory.
        newton_schulz: floating-point operations ``[R]`` of a step.
        owned: matrices ``[R]`` that a rank orthogonalizes.
    """

    job: Job
    placements: list[Placement]
    refusal: str | None
    memory: dict[str, np.ndarray]
    host: np.ndarray
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
        cluster = self.job.cluster
        has_room = float(self.total.max()) <= cluster.hbm_bytes and float(self.host.max()) <= cluster.host_bytes
        return self.refusal is None and has_room


def plan_job(job: Job) -> Plan:
    """Place the tables by TorchRec's planner and work out the rest."""
    return account(job, *place(job))


def account(job: Job, placements: list[Placement], refusal: str | None) -> Plan:
    memory, host, collectives = _account_tables(job, placements)
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
        host=host,
        collectives=collectives + dense_collectives + muon_collectives,
        newton_schulz=newton_schulz,
        owned=owned,
    )


def _account_tables(
    job: Job, placements: Sequence[Placement]
) -> tuple[dict[str, np.ndarray], np.ndarray, list[Collective]]:
    """Memory of the tables on the device and on the host, and what their all-to-alls move.

    Ids are taken to hit all rows alike.
    """
    num_ranks, users = job.cluster.num_ranks, job.workload.users_per_rank(job.cluster.num_ranks)
    weights, state, host, lookups = (np.zeros(num_ranks) for _ in range(4))
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
        weights_here, state_here = table.device_bytes(placement.rows, placement.columns)
        np.add.at(weights, ranks, weights_here)
        np.add.at(state, ranks, state_here)
        np.add.at(host, ranks, table.host_bytes(placement.rows, placement.columns))

        # Every rank sends the ids of a shard's rows, and the lengths of all its users, to where the shard is.
        asked = (ids * share + lengths) * _ID_BYTES
        count("ids", *_to_shards(asked, ranks, num_ranks))
        # Every rank gets as many rows back; sums of rows where bags are pooled, before they are added up.
        rows_back = lengths * np.ones(len(ranks)) if table.is_pooled else ids * share
        answered = rows_back * placement.columns * _OUTPUT_BYTES
        if table.is_pooled and placement.sharding in _WITHIN_NODES:
            sent, received = _sum_within_nodes(answered, ranks, job.cluster)
        else:
            received, sent = _to_shards(answered, ranks, num_ranks)
        rows_wire, gradients_wire = (WIRE_BYTES[p] / _OUTPUT_BYTES for p in (job.comms.forward, job.comms.backward))
        count(f"embeddings forward, {placement.sharding}", rows_wire * sent, rows_wire * received)
        count(f"embeddings backward, {placement.sharding}", gradients_wire * received, gradients_wire * sent)

        # Two batches of ids are in flight (TrainPipelineSparseDist); rows and their gradients, here and at their owner.
        held = np.zeros(num_ranks)
        np.add.at(held, ranks, num_ranks * (asked + answered))
        lookups += 2 * (held + asked.sum() + answered.sum())
    return {"tables": weights, "table state": state, "lookups": lookups}, host, list(collectives.values())


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
    buckets = assign_buckets(costs, owners, dict.fromkeys(costs, job.dense_sharding == "ddp"), num_ranks)
    loads: dict[int, np.ndarray] = {}  # bytes by owner, of each bucket of replicated updates
    momentum, buffers, work = (np.zeros(num_ranks) for _ in range(3))
    to_owner, at_owner = np.zeros(num_ranks), np.zeros(num_ranks)
    owned = np.zeros(num_ranks, dtype=int)
    for p in matrices:
        owner = owners[p.name]
        work[owner] += costs[p.name]
        owned[owner] += 1
        wire = min(_MUON_WIRE_BYTES, p.element_bytes)
        if job.dense_sharding == "ddp":
            momentum[owner] += p.num_bytes
            load = loads.setdefault(buckets[p.name], np.zeros(num_ranks, dtype=np.int64))
            load[owner] += _aligned(math.prod(p.shape) * wire)
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
        sent, received, gathered, buffers = np.sum([_spread_updates(load) for load in loads.values()], axis=0)
        collectives = [Collective("Muon updates, all-to-all", sent, received)]
        if gathered.any():
            collectives.append(Collective("Muon updates, all-gather", gathered, gathered))
    elif matrices:
        collectives = [
            Collective("Muon momentum to its owner, all-to-all", to_owner, at_owner),
            Collective("Muon updates back, all-to-all", at_owner, to_owner),
        ]
    if matrices:
        agreed = np.full(num_ranks, 2 * (num_ranks - 1) / num_ranks * 4 * len(matrices))
        collectives.append(Collective("Muon: who has a gradient, all-reduce", agreed, agreed))
    return {"dense state": momentum, "Muon buffers": buffers}, collectives, work, owned


def _spread_updates(loads: np.ndarray) -> tuple[np.ndarray, ...]:
    """How `DistributedMuon` brings a bucket of updates from their owners to all ranks.

    Args:
        loads: int64 ``[R]``, bytes that each rank owns.

    Returns:
        Bytes ``[R]`` that an all-to-all sends and receives, that an all-gather moves, and of buffers.
    """
    num_ranks, total = len(loads), loads.sum()
    others = num_ranks - 1
    if not should_deal_out(loads.tolist()):
        sent, received = others * loads, total - loads
        return sent, received, np.zeros(num_ranks), sent + received
    # All bytes in a row, cut into even shares: a rank keeps what of its own lies in its share.
    share = even_share(loads.tolist())
    stops, cuts = loads.cumsum(), np.minimum(np.arange(num_ranks + 1) * share, total)
    kept = np.maximum(0, np.minimum(stops, cuts[1:]) - np.maximum(stops - loads, cuts[:-1]))
    gathered = np.full(num_ranks, others * share)
    return loads - kept, np.diff(cuts) - kept, gathered, loads + (num_ranks + 1) * share


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
