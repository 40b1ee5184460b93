"""What would make a job fit that does not: changes, each planned again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from muonrec.embeddings.planning.accounts import Plan, account, plan_job
from muonrec.embeddings.planning.job import Job, Table, Workload
from muonrec.embeddings.planning.placement import decide_row_wise, is_row_wise, place_by_rows

_ROW_WISE_OPTIMIZER = {"adagrad": "rowwise_adagrad", "adam": "partial_rowwise_adam"}

# Larger clusters are not searched: TorchRec's planner takes the longer the more ranks there are.
MOST_RANKS = 4096


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a job, and the plan it leads to."""

    what: str
    plan: Plan


def find_changes(plan: Plan, *, workloads: Sequence[Workload] = ()) -> list[Change]:
    """What was tried to make a plan fit, the smallest changes first, each planned again; empty where it fits.

    First another workload, then what leaves the arithmetic alone (row-wise sharding, FSDP2, the device's memory where
    the host's is too small), then what does not (a row-wise optimizer, float16, for as few tables as suffice), then
    several at once, then tables in the host's memory, which are slow, and a smaller batch last. The first that fits is
    the smallest. The fewest nodes that would do, nothing else changed but row-wise sharding, are always worked out,
    since they are a matter of money; where no settings suffice, with the slimmest tables too.

    Args:
        plan: of the job as it is.
        workloads: others worth trying, such as that of another loss.
    """
    if plan.fits:
        return []
    # Cut by rows is the most even of what the planner may choose, and searched without asking it.
    job = decide_row_wise(plan.job)
    row_wise = decide_row_wise(job, whatever_is_asked=True)
    search = _Search(job)
    for workload in workloads:
        search.attempt(dataclasses.replace(job, workload=workload))
    search.attempt(row_wise)
    if _is_full_of_dense(plan):
        search.attempt(dataclasses.replace(job, dense_sharding="fsdp2"))
    if float(plan.host.max()) > job.cluster.host_bytes:
        search.fewest_tables(job, _device_memory)
    search.fewest_tables(job, _row_wise_optimizer)
    search.fewest_tables(job, _float16)
    settings_suffice = search.found
    if not settings_suffice:
        slim = _change_tables(row_wise, _row_wise_optimizer)
        for combined in (slim, _change_tables(row_wise, _float16), _change_tables(slim, _float16)):
            if search.attempt(combined):
                break
            if _is_full_of_dense(_plan(combined)):
                search.attempt(dataclasses.replace(combined, dense_sharding="fsdp2"))
        settings_suffice = search.found
        if not settings_suffice:
            search.fewest_tables(row_wise, _host_memory)
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
    room = plan.job.cluster.hbm_bytes
    return plan.refusal is None and float(rest.max()) <= room < float(plan.total.max())


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
        """The fewest nodes of the same kind on which ``job`` fits; None where no number up to ``most`` was found.

        Only of tables cut by rows: for others the planner would have to be asked about every number.
        """
        if not all(is_row_wise(table) for table in job.tables):
            return None

        def on(nodes: int) -> Job:
            return dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, nodes=nodes))

        # No layout beats tables dealt out evenly.
        room = job.cluster.hbm_bytes * job.cluster.ranks_per_node
        needed = sum(float(part[0]) for t in job.tables for part in t.device_bytes(*_whole(t)))
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
    return _plan(job).fits


def _plan(job: Job) -> Plan:
    """What `plan_job` would find, without the planner where every table is cut by rows."""
    if all(is_row_wise(table) for table in job.tables):
        return account(job, *place_by_rows(job))
    return plan_job(job)


def _change_tables(job: Job, change: Callable[[Table], Table], names: Iterable[str] | None = None) -> Job:
    chosen = {t.name for t in job.tables} if names is None else set(names)
    return dataclasses.replace(job, tables=tuple(change(t) if t.name in chosen else t for t in job.tables))


def _row_wise_optimizer(table: Table) -> Table:
    return table.change(optimizer=_ROW_WISE_OPTIMIZER.get(table.settings.optimizer, table.settings.optimizer))


def _float16(table: Table) -> Table:
    return table.change(data_type="fp16") if table.element_bytes > 2 else table


def _host_memory(table: Table) -> Table:
    return table.change(memory="uvm_caching") if table.settings.memory == "hbm" else table


def _device_memory(table: Table) -> Table:
    return table.change(memory="hbm")


def _describe_change(before: Job, after: Job) -> str:
    """What differs, in the words of a config."""
    settings: dict[str, list[str]] = {}
    for old, new in zip(before.tables, after.tables, strict=True):
        changed = [
            f"{setting}={value}"
            for setting in ("sharding", "optimizer", "data_type", "memory")
            if (value := getattr(new.settings, setting)) != getattr(old.settings, setting)
        ]
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


def _whole(table: Table) -> tuple[np.ndarray, np.ndarray]:
    return np.array([table.num_embeddings]), np.array([table.embedding_dim])
