"""What a comparison is made of, and ``results.parquet``, which keeps every run of it."""

# N = held-out targets

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from muonrec.metrics import metrics_per_user
from muonrec.runs import Ranked

if TYPE_CHECKING:
    import pyarrow as pa

    from muonrec.comparison.numbers import Answer

RESULTS, TARGETS = "results.parquet", "targets.parquet"

Stage = Literal["tune", "final"]
Status = Literal["done", "diverged", "failed"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of a comparison.

    Args:
        name: shown in tables and legends.
        overrides: settings that make the arm, by path, as `key=value` would give them; without the tuned rates.
        may_differ: paths of settings in which the arm may differ from the control.
        also_differs: settings in which it does, beside the dense optimizer and the tuned rates; the report names them.
        grids: values to try of each tuned rate, in increasing order, by the rate's name (``dense``, ``rest``,
            ``tables``); the search may go beyond their ends.
        rate_settings: which settings each tuned rate sets, by the rate's name.
    """

    name: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    may_differ: tuple[str, ...] = ()
    also_differs: tuple[str, ...] = ()
    grids: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    rate_settings: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Design:
    """What was compared, and how; travels in the metadata of ``results.parquet``.

    Args:
        name: of the comparison, such as ``amazon-beauty-sasrec``.
        arms: in the order of tables and legends.
        control: the arm that the others are held against.
        metric: the main one, which also decides the tuning, such as ``ndcg@10``.
        higher_is_better: of ``metric``.
        trials: of each arm's search, at each budget.
        tuning_seeds: of the trials; the first searches.
        leaders: points of each arm that run with the other tuning seeds, too.
        seeds: of the final runs.
        budgets: of the final runs, as fractions of the full number of steps, in falling order; each is a run with a
            full schedule of its own.
        popularity_bounds: training events of a target: ``(5, 20)`` makes tail <= 5, middle 6-20 and head > 20.
        length_bounds: events of a history, likewise.
        facts: whatever else a reader may want to know, such as the resolved config of the comparison.
    """

    name: str
    arms: tuple[Arm, ...]
    control: str
    metric: str = "ndcg@10"
    higher_is_better: bool = True
    trials: int = 0
    tuning_seeds: tuple[int, ...] = (0,)
    leaders: int = 1
    seeds: tuple[int, ...] = ()
    budgets: tuple[float, ...] = (1.0,)
    popularity_bounds: tuple[int, ...] = (5, 20)
    length_bounds: tuple[int, ...] = (5, 10, 20)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def arm(self, name: str) -> Arm:
        """The arm of that name. Raises ValueError."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"there is no arm {name!r}; the arms are {', '.join(arm.name for arm in self.arms)}")

    def to_json(self) -> str:
        """As text; `from_json` is its inverse."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Design:
        """What `to_json` wrote."""
        tree = json.loads(text)
        for arm in tree["arms"]:
            for key in ("may_differ", "also_differs"):
                arm[key] = tuple(arm[key])
            for key in ("grids", "rate_settings"):
                arm[key] = {name: tuple(values) for name, values in arm[key].items()}
        for key in ("tuning_seeds", "seeds", "budgets", "popularity_bounds", "length_bounds"):
            if key in tree:  # earlier files have no tuning_seeds
                tree[key] = tuple(tree[key])
        return cls(**{**tree, "arms": tuple(Arm(**arm) for arm in tree["arms"])})


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Singular values of one matrix of the tower, or of what one step added to it.

    Args:
        step: steps done.
        name: of the parameter; the blocks of a fused one are numbered, ``...qkv.weight[0]``.
        what: ``weight``, or ``update``: the difference that one step made, the rate and the decay in it.
        stable_rank: ``(Frobenius norm / largest singular value)^2``, between 1 and the number of singular values.
        singular_values: in falling order.
    """

    step: int
    name: str
    what: Literal["weight", "update"]
    stable_rank: float
    singular_values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One run: a row of ``results.parquet``. What a run that did not end well lacks is empty or None.

    Args:
        run: hash of the resolved config and of the sources that training reads: the run's folder below ``runs/``.
        arm: name of the arm.
        stage: ``tune``: a trial, judged on validation alone; ``final``: at the tuned rates, evaluated on test.
        budget: fraction of the full number of steps.
        seed: of initial weights, order of the data, candidates and dropout.
        trial: number of its point, from 0, in the order of the search; None for a final run.
        rates: value of each tuned rate, by its name.
        config_hash, sources_hash: what ``run`` is made of.
        status: ``done``; ``diverged``: the loss left the finite numbers; ``failed``: ``fault`` says why.
        fault: end of what the run said.
        valid: validation metrics at ``best_step``, by name (``ndcg@10``), over the validation users.
        test: test metrics of the checkpoint of ``best_step``, over all test targets; empty for a trial.
        curve_step, curve_seconds, curve_value: every validation: steps done, seconds of training until then, and the
            main metric.
        num_steps: of the run's budget.
        best_step: of the best validation.
        seconds: of training, without validation, checkpoints and start.
        wall_s: of all processes of the run, with everything.
        events_per_s: training targets a second, over the whole run.
        optimizer_share: of the training seconds, spent in the step of the dense optimizers.
        peak_memory_bytes: of the first rank: allocated on the device with CUDA, else resident.
        device: what it ran on.
        machine: what its seconds depend on beside that, for people; runs are compared in seconds where it is the same.
        fingerprints: hashes that must be equal between arms for one seed and budget: ``initial_state``,
            ``first_batches``, ``epoch_order``.
        num_greater, num_equal: int32 ``[N]``, how many items score above the target of each row of ``targets.parquet``
            and how many others the same; None for a trial.
        per_unit: values by metric, float64 ``[N]`` each, of runs that are not rankings: what the bootstrap resamples.
        spectra: of the tower's matrices, where the run recorded any.
        superseded: of an earlier design or of earlier sources: kept, and no part of the answer.
    """

    run: str
    arm: str
    stage: Stage
    budget: float
    seed: int
    trial: int | None
    rates: dict[str, float]
    config_hash: str = ""
    sources_hash: str = ""
    status: Status = "done"
    fault: str = ""
    valid: dict[str, float] = dataclasses.field(default_factory=dict)
    test: dict[str, float] = dataclasses.field(default_factory=dict)
    curve_step: tuple[int, ...] = ()
    curve_seconds: tuple[float, ...] = ()
    curve_value: tuple[float, ...] = ()
    num_steps: int = 0
    best_step: int = 0
    seconds: float = 0.0
    wall_s: float = 0.0
    events_per_s: float = 0.0
    optimizer_share: float = 0.0
    peak_memory_bytes: int = 0
    device: str = ""
    machine: str = ""
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    num_greater: np.ndarray | None = None
    num_equal: np.ndarray | None = None
    per_unit: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    spectra: tuple[Spectrum, ...] = ()
    superseded: bool = False

    def per_target(self, metric: str) -> np.ndarray | None:
        """float64 ``[N]``: ``metric`` of every test target, in the order of ``targets.parquet``; None if unknown."""
        if metric in self.per_unit:
            return self.per_unit[metric]
        if self.num_greater is None or self.num_equal is None:
            return None
        k = [int(metric.partition("@")[2])] if "@" in metric else []
        counts = Ranked({"num_greater": self.num_greater, "num_equal": self.num_equal}, {})
        return metrics_per_user(counts, k=k)[metric]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison, finished or under way: what every table, figure and sentence is made from.

    Args:
        design: what was compared.
        runs: in the order in which they ended.
        targets: int64 ``[N]`` each: ``user_id``, ``target``, ``history_length``, ``target_train_count`` of the test
            targets, as the eval stage's ``ranks.parquet`` has them; None before the first final run.
    """

    design: Design
    runs: tuple[RunResult, ...]
    targets: dict[str, np.ndarray] | None = None

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in order."""
        return tuple(arm.name for arm in self.design.arms)

    @property
    def current(self) -> list[RunResult]:
        """The runs that the design asks for, whatever their status."""
        return [run for run in self.runs if not run.superseded]

    def trials(self, arm: str, budget: float) -> list[RunResult]:
        """The trials of ``arm`` at ``budget`` in the order of the search, whatever their status."""
        trials = [run for run in self.current if (run.arm, run.stage, run.budget) == (arm, "tune", budget)]
        return sorted(trials, key=lambda run: run.trial if run.trial is not None else -1)

    def finals(self, arm: str, budget: float = 1.0) -> list[RunResult]:
        """The final runs of ``arm`` at ``budget`` that are done, by seed."""
        runs = [
            run
            for run in self.current
            if (run.arm, run.stage, run.budget, run.status) == (arm, "final", budget, "done")
        ]
        return sorted(runs, key=lambda run: run.seed)

    def answer(self) -> Answer:
        """What the runs show; see `muonrec.comparison.answer.answer`."""
        from muonrec.comparison.answer import answer

        return answer(self)


def write_results(folder: str | Path, design: Design, runs: Iterable[RunResult]) -> Path:
    """Write ``results.parquet`` into ``folder``; it appears whole or not at all."""
    import pyarrow as pa

    rows = [{**vars(run), **_listed(run)} for run in runs]
    schema = _schema()
    # By column, since pyarrow takes arrays of numbers whole there.
    table = pa.table([pa.array([row[field.name] for row in rows], field.type) for field in schema], schema=schema)
    return _written(table.replace_schema_metadata({"comparison": design.to_json()}), Path(folder) / RESULTS)


def write_targets(folder: str | Path, targets: Mapping[str, np.ndarray]) -> Path:
    """Write ``targets.parquet`` into ``folder``; it appears whole or not at all."""
    import pyarrow as pa

    return _written(pa.table(dict(targets)), Path(folder) / TARGETS)


def read_comparison(folder: str | Path) -> Comparison:
    """Read what `write_results` and `write_targets` wrote into ``folder``.

    Raises:
        ValueError: there is no ``results.parquet``, or it is of something else or damaged.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise ValueError(f"{folder} has no {RESULTS}; pass the output of python -m pipeline.compare")
    table = _read_table(path, otherwise="restore it, or delete it and start anew")
    if b"comparison" not in (table.schema.metadata or {}):
        raise ValueError(f"{path} does not say what was compared; run python -m pipeline.compare again")
    targets_path = Path(folder) / TARGETS
    targets = None
    if targets_path.is_file():
        columns = _read_table(targets_path, otherwise="delete it: the comparison's own command writes it again")
        targets = {name: columns.column(name).to_numpy() for name in columns.column_names}
    # Arrays of numbers whole, the rest as Python's own.
    whole = {name: [_array(value) for value in table.column(name)] for name in ("num_greater", "num_equal")}
    rows = table.drop_columns(list(whole)).to_pylist(maps_as_pydicts="strict")
    runs = tuple(_run_of({**row, **{name: values[i] for name, values in whole.items()}}) for i, row in enumerate(rows))
    return Comparison(Design.from_json(table.schema.metadata[b"comparison"].decode()), runs, targets)


def _schema() -> pa.Schema:
    import pyarrow as pa

    numbers = pa.map_(pa.string(), pa.float64())
    spectrum = pa.struct(
        {
            "step": pa.int64(),
            "name": pa.string(),
            "what": pa.string(),
            "stable_rank": pa.float64(),
            "singular_values": pa.list_(pa.float32()),
        }
    )
    return pa.schema(
        {
            "run": pa.string(),
            "arm": pa.string(),
            "stage": pa.string(),
            "budget": pa.float64(),
            "seed": pa.int64(),
            "trial": pa.int64(),
            "rates": numbers,
            "config_hash": pa.string(),
            "sources_hash": pa.string(),
            "status": pa.string(),
            "fault": pa.string(),
            "valid": numbers,
            "test": numbers,
            "curve_step": pa.list_(pa.int64()),
            "curve_seconds": pa.list_(pa.float64()),
            "curve_value": pa.list_(pa.float64()),
            "num_steps": pa.int64(),
            "best_step": pa.int64(),
            "seconds": pa.float64(),
            "wall_s": pa.float64(),
            "events_per_s": pa.float64(),
            "optimizer_share": pa.float64(),
            "peak_memory_bytes": pa.int64(),
            "device": pa.string(),
            "machine": pa.string(),
            "fingerprints": pa.map_(pa.string(), pa.string()),
            "num_greater": pa.list_(pa.int32()),
            "num_equal": pa.list_(pa.int32()),
            "per_unit": pa.map_(pa.string(), pa.list_(pa.float64())),
            "spectra": pa.list_(spectrum),
            "superseded": pa.bool_(),
        }
    )


def _listed(run: RunResult) -> dict[str, Any]:
    """What pyarrow does not take as it is."""
    return {
        "rates": list(run.rates.items()),
        "valid": list(run.valid.items()),
        "test": list(run.test.items()),
        "fingerprints": list(run.fingerprints.items()),
        "per_unit": list(run.per_unit.items()),
        "spectra": [dataclasses.asdict(spectrum) for spectrum in run.spectra],
    }


def _array(value: pa.ListScalar) -> np.ndarray | None:
    return value.values.to_numpy() if value.is_valid else None


def _run_of(row: Mapping[str, Any]) -> RunResult:
    return RunResult(
        **{
            **row,
            **{key: tuple(row[key]) for key in ("curve_step", "curve_seconds", "curve_value")},
            "per_unit": {name: np.asarray(values, dtype=np.float64) for name, values in row["per_unit"].items()},
            "spectra": tuple(Spectrum(**{**s, "singular_values": tuple(s["singular_values"])}) for s in row["spectra"]),
        }
    )


def _read_table(path: Path, *, otherwise: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); {otherwise}") from None


def _written(table: pa.Table, path: Path) -> Path:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
