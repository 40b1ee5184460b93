"""The order of a comparison: tune every arm alike, then run the seeds at the tuned rates."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence

from muonrec.comparison.results import Arm, Design, RunResult, Stage
from muonrec.comparison.search import END, Edge, Point, Search, edges, extended

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A run that a comparison asks for; the fields are those of `RunResult`."""

    arm: str
    stage: Stage
    budget: float
    seed: int
    trial: int | None
    rates: Point


# Carries out runs, however many at once; their results in the order in which they were asked for.
Execute = Callable[[Design, Sequence[Asked]], Sequence[RunResult]]


def tune(
    design: Design,
    execute: Execute,
    *,
    seed: int,
    max_extensions: int,
    check: Callable[[Asked], object] = lambda asked: None,
) -> tuple[Design, dict[str, Point]]:
    """Search every arm's rates with the same number of trials, on validation alone.

    Where the best of an arm lies at the end of a grid, every arm that has this rate tries its own best point with the
    next value beyond, and every other arm tries one more point of its search.

    Args:
        design: what is compared.
        execute: carries out trials at the full budget.
        seed: of the search and of the runs.
        max_extensions: rounds of such trials.
        check: raises ValueError for rates that cannot be run, such as a momentum above 1; a grid ends before these.

    Returns:
        The design with the extended grids, and the best rates of every arm that has a finished trial.
    """
    searches = {arm.name: Search(arm.grids, trials=design.trials, seed=seed) for arm in design.arms}
    tried = _Tried(design, execute, seed)
    while rounds := {name: points for name, search in searches.items() if (points := search.ask())}:
        values = tried.run(design, rounds)
        for name in rounds:
            searches[name].tell(values[name])

    for _ in range(max_extensions):
        best = tried.best()
        at = {edge for arm in design.arms if arm.name in best for edge in edges(best[arm.name], arm.grids)}
        if not at:
            break
        asked: dict[str, list[Point]] = {}
        for edge in sorted(at):
            arms = tuple(_extended(arm, edge) for arm in design.arms)
            ends = {
                arm.name: {**best[arm.name], edge[0]: arm.grids[edge[0]][0 if edge[1] < 0 else -1]}
                for arm in arms
                if arm.name in best and len(arm.grids.get(edge[0], ())) > 1
            }
            try:
                for name, point in ends.items():
                    check(Asked(name, "tune", 1.0, seed, None, point))
            except ValueError as error:
                logger.warning("a best %s lies at the %s end of its grid, and beyond: %s", edge[0], END[edge[1]], error)
                continue
            logger.info("a best %s lies at the %s end of its grid; every arm tries one more", edge[0], END[edge[1]])
            design = dataclasses.replace(design, arms=arms)
            for arm in arms:
                more = [ends[arm.name]] if arm.name in ends else searches[arm.name].ask_further(1)
                asked.setdefault(arm.name, []).extend(more)
        tried.run(design, asked)
    return design, tried.best()


def final_runs(design: Design, rates: dict[str, Point]) -> list[Asked]:
    """The runs of every budget and seed; those of one seed, which are paired, beside each other."""
    return [
        Asked(arm.name, "final", budget, seed, None, rates[arm.name])
        for budget in design.budgets
        for seed in design.seeds
        for arm in design.arms
        if arm.name in rates
    ]


class _Tried:
    """The trials of all arms so far, numbered in the order of the search."""

    def __init__(self, design: Design, execute: Execute, seed: int) -> None:
        self._execute, self._seed = execute, seed
        self._metric, self._sign = design.metric, 1.0 if design.higher_is_better else -1.0
        self._values: dict[str, list[tuple[Point, float | None]]] = {arm.name: [] for arm in design.arms}

    def run(self, design: Design, points: dict[str, list[Point]]) -> dict[str, list[float | None]]:
        """Run a trial at each point; the values by arm, higher is better, None for what came to nothing."""
        asked = [
            Asked(name, "tune", 1.0, self._seed, len(self._values[name]) + number, point)
            for name, own in points.items()
            for number, point in enumerate(own)
        ]
        values: dict[str, list[float | None]] = {name: [] for name in points}
        for ask, result in zip(asked, self._execute(design, asked), strict=True):
            found = self._sign * result.valid.get(self._metric, math.nan)
            value = found if result.status == "done" and math.isfinite(found) else None
            values[ask.arm].append(value)
            self._values[ask.arm].append((ask.rates, value))
        return values

    def best(self) -> dict[str, Point]:
        """The best point of every arm that has one; the earlier of equals."""
        done = {name: [(v, p) for p, v in tried if v is not None] for name, tried in self._values.items()}
        return {name: max(own, key=lambda pair: pair[0])[1] for name, own in done.items() if own}


def _extended(arm: Arm, edge: Edge) -> Arm:
    if edge[0] not in arm.grids or len(arm.grids[edge[0]]) < 2:
        return arm
    return dataclasses.replace(arm, grids=extended(arm.grids, edge))
