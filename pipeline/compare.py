"""The compare stage: arms under one protocol -> results.parquet, report.html; `python -m pipeline.compare CONFIG`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from filelock import FileLock, Timeout
from pydantic import BeforeValidator, Field, model_validator
from rich.console import Console
from rich.table import Table

from muonrec.comparison.aggregate import aggregated
from muonrec.comparison.aggregate_report import total_cells, write_aggregate_report
from muonrec.comparison.answer import answer
from muonrec.comparison.numbers import Answer, ArmAnswer
from muonrec.comparison.protocol import check_budgets, check_seeds
from muonrec.comparison.report import reached, write_comparison_report
from muonrec.comparison.results import Comparison, read_comparison
from muonrec.comparison.tuning import carry_out
from muonrec.comparison.verdict import shown, spread
from muonrec.config import Config, flat, load_config
from muonrec.metrics import groups_between
from muonrec.page import pretty
from muonrec.runlog import configure_logging, run_stage
from muonrec.settings_help import settings_help
from pipeline.compared_runs import Runs

logger = logging.getLogger(__name__)

_WIDE = 120  # columns of a terminal that has room for what an arm costs
# Rates of AdamW, and of Muon with match_rms_adamw, whose updates are of AdamW's size.
_DENSE = [3e-4, 1e-3, 3e-3, 1e-2]
_REST = [3e-4, 1e-3, 3e-3]
_TABLES = [0.05, 0.1, 0.2, 0.4, 0.8]  # row-wise Adagrad, which divides by a growing sum
_GRIDS = {"dense": _DENSE, "rest": _REST, "tables": _TABLES}
_ONE_RATE = [1e-4, 1.8e-4, 3e-4, 5.6e-4, 1e-3, 1.8e-3, 3e-3, 5.6e-3, 1e-2, 1.8e-2, 3e-2, 5.6e-2]

Rates = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]


class ArmConfig(Config):
    """One arm: overrides of the experiment, and which of its rates are tuned.

    Attributes:
        overrides: by path, such as ``{dense_optimizer: muon, dense_optimizer.ns_steps: 6}``; a ``*`` is any name.
        may_differ: settings, or sections of them, in which the arm may differ from the control beside the tuned rates.
            Any other difference stops the comparison. Also ``initial_state``, ``first_batches``, ``epoch_order``.
        rates: the settings that each tuned rate sets, by the name of the rate.
        grids: values tried of a rate, in place of those of the comparison.
    """

    overrides: dict[str, Any] = {}
    may_differ: list[str] = ["dense_optimizer"]
    rates: dict[str, list[str]] = {
        "dense": ["dense_optimizer.lr"],
        "rest": ["adamw.lr"],
        "tables": ["tables.*.lr"],
    }
    grids: dict[str, Rates] = {}


def _beside_defaults(grids: Any) -> Any:
    return {**_GRIDS, **grids} if isinstance(grids, dict) else grids


def _check_grids(where: str, grids: Iterable[str], rates: Iterable[str]) -> None:
    """Raises ValueError: a grid that nothing is tuned over, which may be another one mistyped."""
    if unknown := sorted({*grids} - {*rates}):
        raise ValueError(f"{where} has {', '.join(unknown)}, which no rate is called; the rates are {', '.join(rates)}")


def _default_arms() -> dict[str, ArmConfig]:
    return {
        # What recommender code does today, as near as what shards and fuses comes; it differs in the tables', too.
        "one-rate": ArmConfig(
            overrides={"dense_optimizer": "adamw", "tables.*.optimizer": "partial_rowwise_adam"},
            may_differ=["dense_optimizer", "tables.*.optimizer"],
            rates={"one": ["dense_optimizer.lr", "adamw.lr", "tables.*.lr"]},
            grids={"one": _ONE_RATE},
        ),
        "control": ArmConfig(overrides={"dense_optimizer": "adamw"}),
        "muon": ArmConfig(overrides={"dense_optimizer": "muon"}),
    }


class CompareConfig(Config):
    """What is compared, and how.

    Attributes:
        output: folder of the comparison: ``results.parquet``, to be kept, ``targets.parquet``, which follows from the
            data, ``report.html``, ``figures/`` and ``runs/``.
        train: the experiment: path of its YAML, or the settings themselves.
        overrides: of the experiment, for every arm; sections are merged, so that ``overrides.data.source.path=FILE``
            sets that alone.
        arms: in the order of tables and legends.
        control: the arm that the others are held against.
        grids: values tried of each tuned rate; those not given keep their default.
        trials: of each arm's search, on validation alone.
        tuning_seeds: of the trials. The first searches; then the mean over all decides between the leaders.
        leaders: best points of each arm by the first seed, which the other arms like it try, too.
        seeds: of the final runs; the tuning's, which the rates suit, are refused.
        budgets: fractions of the experiment's steps; each is tuned by itself, and its runs have full schedules of
            their own.
        evaluate_every: fraction of a final run's steps between two validations.
        evaluate_trials_every: the same of a trial, of which the best validation alone counts.
        validation_users: whom a run is validated on; null: everybody.
        max_extensions: how often a grid whose end is best is extended by a value, for every arm.
        popularity_bounds: tail, middle and head: training events of the held-out item.
        length_bounds: of the breakdown by events of the history.
        ranks: of each run.
        parallel_runs: at once; null: as many as devices, or else cores, allow.
        tries: of a run that fails; it goes on from its last checkpoint.
        keep_checkpoints: of runs that are done.
        accept_sources: hashes of earlier sources whose runs count as if made with these; facts of ``results.parquet``
            and the names of the folders below ``runs/`` have them.
    """

    output: Path
    train: Path | dict[str, Any]
    overrides: dict[str, Any] = {}
    arms: dict[str, ArmConfig] = Field(default_factory=_default_arms)
    control: str = "control"
    grids: Annotated[dict[str, Rates], BeforeValidator(_beside_defaults)] = _GRIDS
    trials: int = Field(default=12, ge=1)
    tuning_seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0, 101, 102]
    leaders: int = Field(default=3, ge=1)
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [1, 2, 3, 4, 5]
    budgets: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = [1.0]
    evaluate_every: float = Field(default=0.02, gt=0, le=0.02)
    evaluate_trials_every: float = Field(default=0.1, gt=0, le=0.5)
    validation_users: int | None = Field(default=5000, ge=1)
    max_extensions: int = Field(default=2, ge=0)
    popularity_bounds: list[int] = [5, 20]
    length_bounds: list[int] = [5, 10, 20]
    ranks: int = Field(default=1, ge=1)
    parallel_runs: int | None = Field(default=None, ge=1)
    tries: int = Field(default=2, ge=1)
    keep_checkpoints: bool = False
    accept_sources: list[str] = []

    @model_validator(mode="after")
    def _that_fits_together(self) -> CompareConfig:
        if self.control not in self.arms:
            replaced = f"; arms takes the place of {', '.join(_default_arms())}" * ("arms" in self.model_fields_set)
            raise ValueError(f"control {self.control!r} is none of the arms: {', '.join(self.arms)}{replaced}")
        for name, arm in self.arms.items():
            if missing := [rate for rate in arm.rates if rate not in {**self.grids, **arm.grids}]:
                raise ValueError(f"arms.{name} tunes {', '.join(missing)}, but there is no such grid; add it to grids")
            _check_grids(f"arms.{name}.grids", arm.grids, arm.rates)
            if of_data := [path for path in flat(arm.overrides) if path.partition(".")[0] == "data"]:
                raise ValueError(f"arms.{name} overrides {', '.join(of_data)}, but all arms have the same data")
        known = dict.fromkeys([*_GRIDS, *(rate for arm in self.arms.values() for rate in arm.rates)])
        _check_grids("grids", self.grids, known)
        check_seeds(self.seeds, self.tuning_seeds)
        check_budgets(self.budgets)
        for name in ("popularity_bounds", "length_bounds"):
            try:
                groups_between(np.zeros(0, dtype=np.int64), getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return self


_EPILOG = """\
protocol, at each budget by itself: every arm searches as many points of its grids by one seed (trials); arms that tune
the same settings over the same grids try each other's best (leaders), and the others as many more points; the leaders
of each arm are run with the other tuning_seeds, and their mean decides; where the best lies at the end of a grid, it is
extended for every arm. All on validation alone. Then the seeds run at the rates found, and are ranked on the test
items. Arms start from the same weights, see the same batches and differ in nothing that the config does not name.

Two arms at one budget take 40 to 60 runs by default; fewer trials, leaders, tuning_seeds and seeds cost less, and
show less. Intervals are of a paired bootstrap over users and of Student's t over seeds, their errors added in
squares; they are not corrected for the number of arms, budgets and metrics.

The runs are a queue on disk. The same command again goes on where it stopped, here or, with results.parquet, on
another machine; a finished run is not repeated unless its settings or the sources that training reads have changed, so
adding an arm, a seed or a budget runs just those.

examples:
  python -m pipeline.data configs/demo/sasrec.yaml && python -m pipeline.compare configs/compare/demo.yaml
  python -m pipeline.compare configs/compare/demo.yaml 'seeds=[1,2,3]' parallel_runs=2
  python -m pipeline.compare --report out/compare/demo   # of what is there so far
  python -m pipeline.compare --aggregate out/compare/demo out/compare/amazon-beauty-sasrec
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit status: 1 where runs have failed, 130 after Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.compare",
        description="Does a dense optimizer pay over another? Tune each arm alike, run the seeds, say how sure it is.",
        epilog=f"settings and their defaults:\n{_settings_help()}\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="YAML file of the comparison, such as configs/compare/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, see below")
    parser.add_argument("--aggregate", nargs="+", metavar="FOLDER", help="means over finished comparisons instead")
    parser.add_argument("--to", default="out/compare", metavar="FOLDER", help="where --aggregate writes its report")
    parser.add_argument("--report", metavar="FOLDER", help="only write the report of this comparison again")
    options = parser.parse_intermixed_args(arguments)
    configure_logging()
    if options.config is not None and (options.aggregate or options.report):
        parser.error(
            f"{options.config} is not for --aggregate and --report, which read the folders of comparisons alone"
        )
    if options.aggregate:
        return run_stage(lambda: aggregate(options.aggregate, to=options.to))
    if options.report:
        return run_stage(lambda: report(read_comparison(options.report), options.report))
    if options.config is None:
        parser.error(
            "give the YAML file of a comparison, such as configs/compare/demo.yaml, or --report or --aggregate"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_stage(lambda: compare(load_config(CompareConfig, options.config, options.overrides)))


def _settings_help() -> str:
    arms = {name: arm.model_dump(mode="json") for name, arm in _default_arms().items()}
    text = yaml.safe_dump(arms, sort_keys=False, default_flow_style=None, width=110)
    return (
        f"{settings_help(CompareConfig, leave_out=('arms',))}\n\n"
        f"arms, which a config replaces as a whole:\n{textwrap.indent(text, 4 * ' ')}\n"
        f"settings of an arm:\n{settings_help(ArmConfig, prefix='arms.NAME.')}\n"
    )


def compare(config: CompareConfig, python: Sequence[str] = (sys.executable, "-m")) -> Comparison:
    """Carry out the comparison, or what is left of it, and say what it shows.

    Args:
        config: of the comparison.
        python: starts a module of this repository; its name and arguments follow.

    Raises:
        ValueError: the config, or two arms differ in what they must not, or runs have failed, and the others are done;
            or another process is at work on the same comparison.
    """
    with _alone(config.output):
        runs = Runs(config, python)
        with runs.progress:
            carry_out(runs.design, runs.execute, max_extensions=config.max_extensions, check=runs.check)
        comparison = runs.finish()
        report(comparison, config.output)
    if failed := [run for run in comparison.current if run.status == "failed"]:
        faults = "\n".join(f"{runs.folder(run.run)}: {run.fault}" for run in failed[:3])
        raise ValueError(
            f"{len(failed)} of {len(comparison.current)} runs have failed; start the same command again to try them "
            f"again. The first of them:\n{faults}"
        )
    return comparison


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from writing the same results; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"another process is at work on the comparison in {folder}; let it end, or end it (it saves what runs), "
            "and start this command again; --report shows what is there so far"
        ) from None
    with lock:
        yield


def report(comparison: Comparison, folder: str | Path) -> None:
    """Print what a comparison shows, and write ``report.html`` and its figures into ``folder``."""
    found = answer(comparison)
    print_answer(comparison.design.name, found)
    logger.info("report: %s", write_comparison_report(comparison, found, folder))


def aggregate(folders: Sequence[str], *, to: str | Path) -> None:
    """Print the mean over several comparisons of what an arm gains over the control, and write it as a page."""
    comparisons = [(one, answer(one)) for one in map(read_comparison, folders)]
    found = aggregated(comparisons)
    if rows := total_cells(found):
        if Console().width < _WIDE:  # the report has the rest
            rows = [{key: row[key] for key in row if key != "runs" and not key.startswith("never")} for row in rows]
        title = f"means over {len(folders)} comparison{'s' * (len(folders) > 1)}, at the largest budget"
        table = Table(title=title, title_justify="left")
        for heading in rows[0]:
            table.add_column(heading, min_width=max(map(len, heading.split())))
        for cells in rows:
            table.add_row(*cells.values())
        Console().print(table)
    for flag in found.flags:
        logger.warning("%s", flag)
    logger.info("report: %s", write_aggregate_report(comparisons, found, to))


def print_answer(name: str, found: Answer) -> None:
    """Show the arms beside each other, what a reader must know, and the verdict."""
    for budget, arms in found.arms.items():
        is_narrow = Console().width < _WIDE
        rows = [_cells(arm, found.metric, with_costs=not is_narrow) for arm in arms.values()]
        table = Table(title=f"{name}, budget {budget:g}", title_justify="left")
        for heading in rows[0]:
            table.add_column(heading, no_wrap=heading != "to the control")
        for cells in rows:
            table.add_row(*cells.values(), style="bold" if cells["arm"] == found.control else None)
        Console().print(table)
        for arm in arms.values():
            Console().print(f"{arm.arm}: {', '.join(f'{rate} {value:g}' for rate, value in arm.rates.items())}")
    for flag in found.flags:
        logger.warning("%s", flag)
    Console().print(found.verdict)


def _cells(arm: ArmAnswer, metric: str, *, with_costs: bool) -> dict[str, str]:
    """What the table says of an arm, by heading; the report has the rest."""
    value = arm.test.get(metric)
    steps, _ = reached(next(iter(arm.targets), None), "steps")
    costs = {
        "events/s": f"{arm.events_per_s:,.0f}" if arm.events_per_s else "–",
        "optimizer": f"{arm.optimizer_share:.0%}" if arm.optimizer_share else "–",
        "memory": f"{arm.peak_memory_bytes / 2**20:,.0f} MiB" if arm.peak_memory_bytes else "–",
    }
    return {
        "arm": arm.arm,
        "seeds": str(len(arm.seeds)),
        f"test {pretty(metric)}": "–" if value is None else spread(value),
        "to the control": "" if value is None else shown(value.difference),
        "steps to 99 %": steps,
        **(costs if with_costs else {}),
    }


if __name__ == "__main__":
    sys.exit(main())
