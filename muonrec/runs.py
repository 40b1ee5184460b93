"""Runs, read back from what the stages leave in their folders."""

# N = users

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from muonrec.config import flat
from muonrec.metrics import Interval, metrics_per_user, paired_bootstrap_difference
from muonrec.runlog import read_metrics

METRICS, RANKS, FINGERPRINTS, SPECTRA = "metrics.json", "ranks.parquet", "fingerprints.json", "spectra.jsonl"


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Where each user's held-out item stood, as ``ranks.parquet`` keeps it: what pairs one run with another.

    Args:
        columns: ``user_id``, ``target``, ``num_greater``, ``num_equal``, ``history_length``, ``target_train_count``;
            int64 ``[N]`` each, in order of the users.
        protocol: what was ranked: part, mask_seen, num_items, fingerprint of the data set. Only equal ones compare.
        list_length: as in `muonrec.retrieval.RankedTargets`.
    """

    columns: dict[str, np.ndarray]
    protocol: dict[str, Any]
    list_length: int | None = None

    @property
    def num_greater(self) -> np.ndarray:
        return self.columns["num_greater"]

    @property
    def num_equal(self) -> np.ndarray:
        return self.columns["num_equal"]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What one run left in its folder; parts that are not there yet are empty.

    Args:
        name: shown in tables and legends.
        config: resolved config, flattened to ``section.key``.
        training: lines of metrics.jsonl with a loss, by step.
        validation: lines with ``valid_`` metrics, by step.
        metrics: metrics.json of the evaluation; empty before it.
        ranked: ranks.parquet of the evaluation; None before it.
        routing: which parameter went to which optimizer, as printed.
        plan: how the tables are sharded, as printed.
    """

    name: str
    config: dict[str, Any]
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    metrics: dict[str, Any]
    ranked: Ranked | None
    routing: str = ""
    plan: str = ""


def read_run(folder: str | Path, *, name: str | None = None) -> RunRecord:
    """Read what train and eval left in ``folder``; ``name`` is the folder's unless given.

    Raises:
        ValueError: it is not the folder of a run, or a file in it is damaged.
    """
    folder = Path(folder)
    if not (folder / "resolved.yaml").is_file():
        raise ValueError(
            f"{folder} has no resolved.yaml, so it is not the folder of a run; pass a train stage's output"
        )
    log = folder / "metrics.jsonl"
    lines = read_metrics(log) if log.is_file() else []
    return RunRecord(
        name=name or folder.resolve().name,
        config=flat(yaml.safe_load((folder / "resolved.yaml").read_text()) or {}),
        training=_by_step(line for line in lines if "loss_nats" in line),
        validation=_by_step(line for line in lines if any(key.startswith("valid_") for key in line)),
        metrics=_read_json(folder / METRICS),
        ranked=read_ranks(folder / RANKS) if (folder / RANKS).is_file() else None,
        routing=_read_text(folder / "routing.txt"),
        plan=_read_text(folder / "plan.txt"),
    )


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """Read several runs, named by the shortest end of the path that tells them apart."""
    paths = [Path(folder).resolve() for folder in folders]
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return [read_run(path, name=name) for path, name in zip(paths, names, strict=True)]
    raise ValueError(f"a run is given twice among {', '.join(map(str, folders))}; name each once")


def write_ranks(path: Path, ranked: Ranked) -> None:
    """Write ``ranks.parquet``; the protocol travels in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {"protocol": json.dumps(ranked.protocol, sort_keys=True), "list_length": json.dumps(ranked.list_length)}
    table = pa.table(ranked.columns).replace_schema_metadata(metadata)
    pq.write_table(table, path, compression="zstd")


def read_ranks(path: Path) -> Ranked:
    """Read what `write_ranks` wrote. Raises ValueError if it is something else."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    if b"protocol" not in (table.schema.metadata or {}):
        raise ValueError(f"{path} does not say what was ranked; run python -m pipeline.eval on its folder again")
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    notes = table.schema.metadata
    return Ranked(columns, json.loads(notes[b"protocol"]), json.loads(notes.get(b"list_length", b"null")))


def paired_differences(
    control: RunRecord, arm: RunRecord, metric_names: Sequence[str], *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Relative difference of each metric of ``arm`` to ``control`` over the same users, with its 95 % interval.

    Raises:
        ValueError: a run was not evaluated, or the two were not evaluated alike; the message says what differs; or a
            metric is of more places than one of them has.
    """
    for run in (control, arm):
        if run.ranked is None:
            raise ValueError(f"{run.name} was not evaluated; run python -m pipeline.eval on its folder")
    ours, theirs = control.ranked, arm.ranked
    assert ours is not None and theirs is not None
    unlike = [
        f"{key} is {ours.protocol.get(key)!r} and {theirs.protocol.get(key)!r}"
        for key in sorted(ours.protocol | theirs.protocol)
        if ours.protocol.get(key) != theirs.protocol.get(key)
    ]
    if unlike:
        raise ValueError(f"{control.name} and {arm.name} were not evaluated alike: {'; '.join(unlike)}")
    if not all(np.array_equal(ours.columns[key], theirs.columns[key]) for key in ("user_id", "target")):
        raise ValueError(f"{control.name} and {arm.name} were not evaluated on the same users and targets")

    ks = sorted({int(name.partition("@")[2]) for name in metric_names if "@" in name})
    of_control, of_arm = metrics_per_user(ours, k=ks), metrics_per_user(theirs, k=ks)
    if missing := set(metric_names) - (of_control.keys() & of_arm.keys()):
        raise ValueError(
            f"{', '.join(sorted(missing))} of {control.name} and {arm.name} was asked, but one of them ranked lists "
            "alone, not the whole catalogue; compare metrics of a length, such as mrr@10"
        )
    return {
        name: paired_bootstrap_difference(
            of_control[name], of_arm[name], ours.columns["user_id"], num_resamples=num_resamples, seed=seed
        )
        for name in metric_names
    }


def first_reaching(validation: Sequence[Mapping[str, Any]], key: str, target: float) -> Mapping[str, Any] | None:
    """The first evaluation at which the median of three successive values of ``key`` is at least ``target``.

    The median is of an evaluation and the two before it, so that one lucky evaluation does not count; the first two
    evaluations have no such median and never count.
    """
    points = [point for point in validation if key in point]
    for three in zip(points, points[1:], points[2:], strict=False):
        if float(np.median([point[key] for point in three])) >= target:
            return three[-1]
    return None


def _read_text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON: {error}; run python -m pipeline.eval on its folder again"
        ) from error


def _by_step(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per step, the last written, in order of the steps."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        by_step[line["step"]] = by_step.get(line["step"], {}) | line
    return [by_step[step] for step in sorted(by_step)]
