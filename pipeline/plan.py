"""The plan of a run on machines that are not there: `python -m pipeline.train CONFIG --plan 16x8 --hbm 80`.

Prints where TorchRec's planner puts the tables, what every rank holds, sends and computes, what does not fit and the
smallest change that makes it fit. Needs neither the machines nor the data set.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence

import numpy as np

from muonrec.batch import CANDIDATES, HISTORY, TARGETS, USER
from muonrec.data.manifest import MANIFEST, read_manifest
from muonrec.data.semantic_ids import SemanticIds
from muonrec.embeddings.planning import (
    IN_PASSES,
    IN_STEP,
    MOST_RANKS,
    PERSISTENT,
    Change,
    Cluster,
    Plan,
    Workload,
    describe_job,
    find_changes,
    plan_job,
)
from muonrec.models import TigerConfig
from pipeline.building import build_model, semantic_ids_of
from pipeline.train_config import TrainConfig

_GIB = 2**30

# Rows of the memory table that are printed at most: ranks that hold the same share one.
_MOST_GROUPS = 6


def print_plan(
    config: TrainConfig,
    nodes: int,
    ranks_per_node: int,
    hbm_gib: float,
    *,
    host_gib: float | None = None,
    rows: Mapping[str, int] | None = None,
) -> Plan:
    """Print the plan of ``config`` on ``nodes`` of ``ranks_per_node`` ranks with ``hbm_gib`` of memory each.

    Args:
        config: of the train stage.
        nodes: machines.
        ranks_per_node: devices of a machine.
        hbm_gib: memory of a device, GiB.
        host_gib: memory of a machine, GiB, which its ranks share alike; None for TorchRec's guess, 128 a rank.
        rows: of the tables, by name; where a table is not named, the manifest of the data set counts.

    Raises:
        ValueError: nobody says how many rows a table has, or the settings have no plan on any machine.
    """
    started = time.monotonic()
    cluster = Cluster(nodes, ranks_per_node, int(hbm_gib * _GIB))
    if host_gib is not None:
        cluster = dataclasses.replace(cluster, host_bytes=int(host_gib * _GIB) // ranks_per_node)
    ids = semantic_ids_of(config)
    num_items = count_items(config, rows or {}) if ids is None else len(ids.codes)
    if ids is not None and rows:
        raise ValueError(
            f"--rows names tables {sorted(rows)}, but those of {config.model.name} follow from data.semantic_ids and "
            "num_user_tokens; leave it out"
        )
    model = build_model(config, num_items=num_items, ids=ids)
    muon = config.dense_optimizer if config.dense_optimizer.name == "muon" else None
    job = describe_job(
        model,
        config.tables,
        cluster,
        workload=estimate_workload(config, num_items) if ids is None else estimate_token_workload(config, ids),
        dense_sharding=config.dense_sharding,
        muon=muon is not None,
        ns_steps=muon.ns_steps if muon else 0,
        overrides=config.routing,
        comms=config.comms,
    )
    plan = plan_job(job)
    other_losses = []
    if config.loss.name == "full_softmax":
        sampled = config.model_copy(update={"loss": config.loss.model_copy(update={"name": "sampled_softmax"})})
        other_losses.append(estimate_workload(sampled, num_items))
    changes = find_changes(plan, workloads=other_losses)
    print(format_report(plan, changes))
    if config.accumulate_steps > 1:
        print(f"\na step is {config.accumulate_steps} of these (accumulate_steps); Muon's part comes once, at its end")
    print(f"\nplanned in {time.monotonic() - started:.1f} s")
    return plan


def parse_ranks(text: str) -> tuple[int, int]:
    """``16x8`` as (16, 8). Raises ValueError."""
    found = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text.strip())
    if found is None:
        raise ValueError(f"--plan {text!r} is not NODESxRANKS; write 16x8 for 16 nodes of 8 ranks")
    return int(found[1]), int(found[2])


def parse_rows(options: Sequence[str]) -> dict[str, int]:
    """``["item=200000000"]`` as a mapping. Raises ValueError."""
    rows = {}
    for option in options:
        found = re.fullmatch(r"(\w+)=([1-9]\d*(?:_\d+)*)", option.strip())
        if found is None:
            raise ValueError(f"--rows {option!r} is not TABLE=COUNT; write --rows item=200000000")
        rows[found[1]] = int(found[2])
    return rows


def count_items(config: TrainConfig, rows: Mapping[str, int]) -> int:
    """Rows of the item table: as asked, or as the data set counts them."""
    unknown = sorted(rows.keys() - {"item"})
    if unknown:
        raise ValueError(f"--rows names tables {unknown}, but {config.model.name} has the table 'item' alone")
    if "item" in rows:
        return rows["item"]
    folder = config.data.output
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"nobody says how many items there are: {folder} is no data set yet; pass --rows item=COUNT, "
            "or make it with python -m pipeline.data"
        )
    return read_manifest(folder).num_items


def estimate_workload(config: TrainConfig, num_items: int) -> Workload:
    """What a step of ``config`` looks up and keeps, every history at its full length: an upper bound."""
    model, loss = config.model, config.loss
    length = model.max_length
    element_bytes = 2 if config.precision == "bf16" else 4
    shared = {"all": num_items, "in_batch": 0, "per_target": 0}.get(loss.candidates, loss.num_negatives)
    scored = {"full_softmax": num_items, "in_batch_softmax": length, "bce": loss.num_negatives}.get(
        loss.name, loss.num_negatives
    )
    ids_per_user: dict[str, float] = {
        HISTORY: length,
        TARGETS: 0 if loss.name == "full_softmax" else length,
    }
    if loss.candidates == "per_target":
        ids_per_user[CANDIDATES] = length * loss.num_negatives
    # The loss keeps its logits, masked and exponentiated.
    tower, words = model.tower_activations()
    return Workload(
        batch_size=-(-config.batch_size // config.accumulate_steps),
        name=f"loss.name={loss.name}",
        ids_per_user=ids_per_user,
        ids_per_rank={} if loss.candidates == "per_target" else {CANDIDATES: shared},
        activation_bytes_per_user=float(element_bytes) * length * (tower + 3 * (1 + scored)),
        activation_formula=(
            f"{element_bytes} bytes x users x {length} events x ({words} + 3 (1 + K)); K {scored:,} scored per event"
        ),
    )


def estimate_token_workload(config: TrainConfig, ids: SemanticIds) -> Workload:
    """`estimate_workload` of a model that reads and writes codes: L of each event."""
    model = config.model
    assert isinstance(model, TigerConfig)
    num_levels, length, width = len(ids.codebook_sizes), model.max_length, model.embedding_dim
    targets = length if model.samples == "users" else 1
    element_bytes = 2 if config.precision == "bf16" else 4
    # As `SASRecConfig.tower_activations`, of each token that is read; a block of the decoder keeps a second attention,
    # 7 D and the users' keys and values. Of each token that is written, its logits three times.
    heads = model.num_heads * (model.head_dim or width // model.num_heads)
    block = 6 * width + 4 * heads + 3 * model.feedforward_dim
    read, written = 1 + length * num_levels, targets * num_levels
    logits = 3 * sum(ids.codebook_sizes) / num_levels
    of_read = read * (model.num_layers * (block + 2 * heads) + 4 * width)
    of_written = written * (model.num_layers * (block + 3 * width + 4 * heads) + 4 * width + logits)
    return Workload(
        batch_size=-(-config.batch_size // config.accumulate_steps),
        name="loss.name=token_softmax",
        ids_per_user={HISTORY: length * num_levels, TARGETS: written, USER: 1},
        ids_per_rank={},
        activation_bytes_per_user=float(element_bytes) * (of_read + of_written),
        activation_formula=(
            f"{element_bytes} bytes x users x ({read} tokens read x (layers x (6 D + 6 H + 3 F) + 4 D) + {written} "
            f"written x (layers x (9 D + 8 H + 3 F) + 4 D + {logits:.0f} logits)); "
            f"layers {model.num_layers}, D {width}, H {heads} in all heads, F {model.feedforward_dim}"
        ),
    )


# The report ----------------------------------------------------------------------------------------------------------


def format_report(plan: Plan, changes: Sequence[Change] = ()) -> str:
    """The plan as text for a terminal: verdict, tables, memory, traffic, Newton-Schulz, and what would make it fit."""
    sections = [_verdict(plan, changes), _tables(plan), _memory(plan), _traffic(plan), _newton_schulz(plan)]
    if changes:
        sections.append(_changes(plan, changes))
    sections.append(_notes(plan))
    return "\n\n".join(sections)


def _verdict(plan: Plan, changes: Sequence[Change]) -> str:
    job, worst = plan.job, int(plan.total.argmax())
    cluster, total = job.cluster, plan.total[worst]
    share = total / cluster.hbm_bytes
    batch_size, users = job.workload.batch_size, job.workload.users_per_rank(cluster.num_ranks)
    lines = [
        f"{cluster.nodes} x {cluster.ranks_per_node} = {cluster.num_ranks:,} ranks of {_size(cluster.hbm_bytes)}; "
        f"{batch_size:,} users a step, {users:,} a rank; dense side: {job.dense_sharding}"
    ]
    needs = f"the fullest rank, {worst}, needs {_size(total)}, {share:.0%} of its memory"
    if plan.host.any():
        most = plan.host.max()
        needs += f"; of its host's a rank needs {_size(most)}, {most / cluster.host_bytes:.0%} of its share"
    if plan.fits:
        lines.append(f"FITS: {needs}")
        return "\n".join(lines)
    lines.append(f"DOES NOT FIT: {needs}")
    for placement in plan.placements:
        table = placement.table
        weights, state = table.device_bytes(placement.rows, placement.columns)
        own = weights + state
        if own.max() > cluster.table_room:
            rank = int(placement.ranks[own.argmax()])
            lines.append(f"  table {table.name} alone puts {_size(own.max())} on rank {rank} ({placement.sharding})")
    if plan.refusal is not None:
        room = f"{_size(cluster.table_room)} of a rank"
        room += f" and {_size(cluster.host_bytes)} of its host" * bool(plan.host.any())
        lines.append(f"  TorchRec's planner, which may fill {room}, finds no room for the tables:")
        lines.append(f"    {_last_words(plan.refusal, on_host=bool(plan.host.any()))}")
    parts = sorted(((plan.memory[part][worst], part) for part in plan.memory), reverse=True)
    lines.append("  most of it: " + ", ".join(f"{part} {_size(size)}" for size, part in parts[:3] if size))
    answer = next((change for change in changes if change.plan.fits), None)
    if answer is not None:
        lines.append(f"SMALLEST CHANGE THAT FITS: {answer.what}")
    else:
        lines.append("NO CHANGE THAT WAS TRIED FITS")
    return "\n".join(lines)


def _tables(plan: Plan) -> str:
    titles = "table,rows,width,type,optimizer,memory,sharding,shards,largest shard,weights,state"
    rows, states = [tuple(titles.split(","))], 0.0
    for placement in plan.placements:
        table = placement.table
        largest = int((placement.rows * placement.columns).argmax())
        state = table.state_bytes(placement.rows, placement.columns).sum()
        states += state
        rows.append(
            (
                table.name,
                f"{table.num_embeddings:,}",
                str(table.embedding_dim),
                table.data_type.value.lower(),
                table.settings.optimizer,
                table.settings.memory,
                placement.sharding,
                f"{len(placement.ranks):,}",
                f"{placement.rows[largest]:,} x {placement.columns[largest]}",
                _size(table.weight_bytes),
                _size(state),
            )
        )
    if len(plan.placements) > 1:
        weights = sum(placement.table.weight_bytes for placement in plan.placements)
        rows.append(("all", *[""] * 8, _size(weights), _size(states)))
    return "Tables\n" + _align(rows, left={0, 3, 4, 5, 6})


def _memory(plan: Plan) -> str:
    parts = [part for part in (*PERSISTENT, *IN_PASSES, *IN_STEP) if plan.memory[part].any()]
    total = plan.total
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank in np.argsort(-total, kind="stable"):
        cells = tuple(_size(plan.memory[part][rank]) for part in parts)
        share = f"{total[rank] / plan.job.cluster.hbm_bytes:.1%}"
        groups.setdefault((*cells, _size(total[rank]), share), []).append(int(rank))
    estimated = {"lookups", "activations", "gathered", "Muon buffers"}
    rows = [("ranks", *(f"~{part}" if part in estimated else part for part in parts), "peak", "of HBM")]
    for cells, ranks in list(groups.items())[:_MOST_GROUPS]:
        rows.append((_ranks(sorted(ranks)), *cells))
    hidden = sum(len(ranks) for ranks in list(groups.values())[_MOST_GROUPS:])
    if hidden:
        rows.append((f"{hidden:,} more", *("" for _ in parts), "", ""))
    mean = tuple(_size(plan.memory[part].mean()) for part in parts)
    rows.append(("mean", *mean, _size(total.mean()), f"{total.mean() / plan.job.cluster.hbm_bytes:.1%}"))
    text = "Memory of a rank, the fullest first (~ estimated)\n" + _align(rows, left={0})
    if plan.host.any():
        most, room = plan.host.max(), plan.job.cluster.host_bytes
        text += f"\n  of the host's memory a rank takes at most {_size(most)}, {most / room:.1%} of its {_size(room)}"
    return text


def _traffic(plan: Plan) -> str:
    rows = [("collective", "a rank sends (mean)", "busiest rank", "all ranks")]
    for collective in plan.collectives:
        rows.append(
            (
                collective.name,
                _size(collective.sent.mean()),
                f"{_size(collective.busiest)}",
                _size(collective.sent.sum()),
            )
        )
    sent = np.sum([collective.sent for collective in plan.collectives], axis=0)
    received = np.sum([collective.received for collective in plan.collectives], axis=0)
    rows.append(("all", _size(sent.mean()), _size(np.maximum(sent, received).max()), _size(sent.sum())))
    return "Bytes between ranks in a step (busiest: the larger of sent and received)\n" + _align(rows, left={0})


def _newton_schulz(plan: Plan) -> str:
    work, owned = plan.newton_schulz, plan.owned
    worst = int(work.argmax())
    if not owned.sum():
        return "Newton-Schulz: none, AdamW updates the matrices"
    busy = int((owned > 0).sum())
    return (
        f"Newton-Schulz in a step: {owned.sum():,} matrices, {_count(work.sum())}FLOP, {plan.job.ns_steps} iterations\n"
        f"  of a rank: at most {_count(work.max())}FLOP (rank {worst}, which owns {owned[worst]}), "
        f"mean {_count(work.mean())}FLOP; {busy:,} of {len(work):,} ranks own any"
    )


def _changes(plan: Plan, changes: Sequence[Change]) -> str:
    rows = [("change", "ranks", "fullest rank", "of HBM", "of host", "planner", "")]
    answer = next((change for change in changes if change.plan.fits), None)
    for change in changes:
        after, cluster = change.plan, change.plan.job.cluster
        verdict = "fits, the smallest" if change is answer else "fits" if after.fits else "does not fit"
        rows.append(
            (
                change.what,
                f"{cluster.num_ranks:,}",
                _size(after.total.max()),
                f"{after.total.max() / cluster.hbm_bytes:.0%}",
                f"{after.host.max() / cluster.host_bytes:.0%}",
                "refuses" if after.refusal else "places",
                verdict,
            )
        )
    text = "What would make it fit, each planned again, smaller changes first\n" + _align(rows, left={0, 5, 6})
    if not any(change.plan.job.cluster != plan.job.cluster for change in changes):
        text += f"\n  more nodes alone: none of the numbers tried, up to {MOST_RANKS:,} ranks"
    return text


def _notes(plan: Plan) -> str:
    return "\n".join(
        [
            "How this was worked out",
            f"  activations  {plan.job.workload.activation_formula}",
            "  lookups      2 x (ids and rows it asks for + those it serves): two batches, rows and their gradients",
            "  peak         what stays + the larger of (lookups, activations, gathered) and Muon's buffers",
            "  traffic      ids (int64) hit all rows alike, full histories, rows and gradients as comms say, rings",
            "  left out     CUDA context, NCCL's buffers, fragmentation of the allocator",
        ]
    )


def _align(rows: Sequence[Sequence[str]], *, left: set[int]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  "
        + "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _ranks(ranks: Sequence[int]) -> str:
    """Rank numbers, ascending, as ranges: ``0-6, 8``; the first few of many."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs[:3])
    return text + (f", ... ({len(ranks):,})" if len(runs) > 3 else f" ({len(ranks):,})" if len(ranks) > 1 else "")


def _size(num_bytes: float) -> str:
    """Bytes in binary units, three digits."""
    return _scaled(float(num_bytes), 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _count(number: float) -> str:
    """A count with a decimal prefix, three digits."""
    return _scaled(float(number), 1000, ("", "k", "M", "G", "T", "P"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while number >= base * 0.9995 and power < len(units) - 1:
        number, power = number / base, power + 1
    digits = 0 if number >= 100 or number == int(number) else 1 if number >= 10 else 2
    return f"{number:.{digits}f} {units[power]}" if number else "-"


def _last_words(refusal: str, *, on_host: bool) -> str:
    """The last line of the planner's message that says something, its byte counts made readable."""

    def readable(found: re.Match[str]) -> str:
        hbm, host = (_size(int(count)) for count in found.groups())
        return f"{hbm} and {host} of the host" if on_host else hbm

    lines = [line.strip() for line in refusal.splitlines() if line.strip()]
    words = re.sub(r", perf: Perf\([^)]*\), rank: None", "", lines[-1] if lines else refusal)
    words = re.sub(r"sharding option group .*storage_sum=(Storage\([^)]*\)).*", r"tables of \1", words)
    return re.sub(r"Storage\(hbm=(\d+), ddr=(\d+)[^)]*\)(?: bytes)?", readable, words)
