"""The order of a comparison: at every budget tune each arm alike, then run the seeds at the tuned rates."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

from muonrec.comparison.points import Tried, best, leading, tried, value_of
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
Execute = Callable[[Sequence[Asked]], Sequence[RunResult]]
# Raises ValueError for rates that cannot be run, such as a momentum above 1.
Check = Callable[[Asked], object]


def carry_out(design: Design, execute: Execute, *, max_extensions: int, check: Check = lambda asked: None) -> None:
    """Tune and run the seeds, one budget after the other, the largest first; nothing of one depends on another.

    Args:
        design: what is compared.
        execute: carries out runs.
        max_extensions, check: as of `tune`.
    """
    for budget in design.budgets:
        rates = tune(design, execute, budget=budget, max_extensions=max_extensions, check=check)
        execute(final_runs(design, budget, rates))


def tune(
    design: Design,
    execute: Execute,
    *,
    budget: float = 1.0,
    max_extensions: int,
    check: Check = lambda asked: None,
) -> dict[str, Point]:
    """Search every arm's rates with the same number of trials, on validation alone.

    First `Search` at one seed. Then what leads in an arm is tried by every arm that tunes the same settings over the
    same grids, so that none wins by having been asked the better question; the others get as many more points of their
    own search. Then what leads in each arm is run with the other tuning seeds, and their mean decides, since the best
    of many points by one seed is good by luck. Where it lies at the end of a grid, every arm that has this rate tries
    its own best with the next value beyond, every other arm one more point of its search, and leaders are run again.

    Args:
        design: what is compared, with the seeds of the tuning and how many lead.
        execute: carries out trials.
        budget: of the trials.
        max_extensions: how often a grid is extended at its ends.
        check: a grid ends before rates that it refuses.

    Returns:
        The best rates of every arm that has a finished trial.
    """
    tuning = _Tuning(design, execute, budget)
    tuning.search()
    tuning.run_leaders()
    for _ in range(max_extensions):
        if not tuning.extend(check):
            break
        tuning.run_leaders()
    return {name: point.rates for name, point in tuning.best().items()}


def final_runs(design: Design, budget: float, rates: dict[str, Point]) -> list[Asked]:
    """The runs of every seed at ``budget``; those of one seed, which are paired, beside each other."""
    return [
        Asked(arm.name, "final", budget, seed, None, rates[arm.name])
        for seed in design.seeds
        for arm in design.arms
        if arm.name in rates
    ]


class _Tuning:
    """The trials of all arms so far, numbered in the order of the search; each number is a point of its own."""

    def __init__(self, design: Design, execute: Execute, budget: float) -> None:
        self._design, self._execute, self._budget = design, execute, budget
        self._first, *self._others = design.tuning_seeds
        self._searches = {arm.name: Search(arm.grids, trials=design.trials, seed=self._first) for arm in design.arms}
        self._points: dict[str, list[Point]] = {arm.name: [] for arm in design.arms}
        self._runs: dict[str, list[RunResult]] = {arm.name: [] for arm in design.arms}

    def search(self) -> None:
        """Run the trials of every arm's search."""
        while asked := {name: points for name, search in self._searches.items() if (points := search.ask())}:
            values = self._run(asked, [self._first])
            for name in asked:
                self._searches[name].tell(values[name])

    def run_leaders(self) -> None:
        """Try what leads in an arm in the others like it, and run what leads then with the other seeds."""
        leaders = {name: [point.rates for point in self._leading(name)] for name in self._points}
        asked = {
            arm.name: _without(
                [point for other in self._design.arms if _are_alike(arm, other) for point in leaders[other.name]],
                self._points[arm.name],
            )
            for arm in self._design.arms
        }
        most = max(len(self._points[name]) + len(points) for name, points in asked.items())
        for name, points in asked.items():
            points += self._further(name, most - len(self._points[name]) - len(points), taken=points)
        self._run(asked, [self._first])
        if self._others:
            self._run({name: [p.rates for p in self._leading(name)] for name in self._points}, self._others)

    def extend(self, check: Check) -> bool:
        """Try what lies beyond the ends of grids at which a best lies; whether there was any such."""
        own = {name: point.rates for name, point in self.best().items()}
        at = {edge for arm in self._design.arms if arm.name in own for edge in edges(own[arm.name], arm.grids)}
        asked: dict[str, list[Point]] = {name: [] for name in self._points}
        for edge in sorted(at):
            arms = tuple(_extended(arm, edge) for arm in self._design.arms)
            ends = {
                arm.name: {**own[arm.name], edge[0]: arm.grids[edge[0]][0 if edge[1] < 0 else -1]}
                for arm in arms
                if arm.name in own and len(arm.grids.get(edge[0], ())) > 1
            }
            try:
                for name, point in ends.items():
                    check(Asked(name, "tune", self._budget, self._first, None, point))
            except ValueError as error:
                logger.warning("a best %s lies at the %s end of its grid, and beyond: %s", edge[0], END[edge[1]], error)
                continue
            logger.info("a best %s lies at the %s end of its grid; every arm tries one more", edge[0], END[edge[1]])
            self._design = dataclasses.replace(self._design, arms=arms)
            for name, points in asked.items():
                points += [ends[name]] if name in ends else self._further(name, 1, taken=points)
        self._run(asked, [self._first])
        return any(asked.values())

    def best(self) -> dict[str, Tried]:
        """The best point of every arm that has one."""
        found = {name: best(self._tried(name), higher_is_better=self._design.higher_is_better) for name in self._points}
        return {name: point for name, point in found.items() if point is not None}

    def _tried(self, name: str) -> list[Tried]:
        return tried(self._runs[name], self._design.metric)

    def _leading(self, name: str) -> list[Tried]:
        design = self._design
        points = self._tried(name)
        return leading(points, design.leaders, seed=self._first, higher_is_better=design.higher_is_better)

    def _further(self, name: str, count: int, *, taken: list[Point]) -> list[Point]:
        """``count`` more points of an arm's search, none tried or ``taken``; fewer if the grids have no more."""
        found: list[Point] = []
        while len(found) < count and (points := self._searches[name].ask_further(1)):
            found += _without(points, [*self._points[name], *taken, *found])
        return found

    def _run(self, points: dict[str, list[Point]], seeds: Sequence[int]) -> dict[str, list[float | None]]:
        """Run a trial at each point with each seed; the values by arm, in the order of the points, then seeds."""
        for name, own in points.items():
            self._points[name] += _without(own, self._points[name])
        asked = [
            Asked(name, "tune", self._budget, seed, self._points[name].index(point), point)
            for name, own in points.items()
            for point in own
            for seed in seeds
        ]
        asked = [ask for ask in asked if not self._is_done(ask)]
        values: dict[str, list[float | None]] = {name: [] for name in points}
        for ask, result in zip(asked, self._execute(asked) if asked else (), strict=True):
            self._runs[ask.arm].append(result)
            values[ask.arm].append(value_of(result, self._design))
        return values

    def _is_done(self, ask: Asked) -> bool:
        return any((run.trial, run.seed) == (ask.trial, ask.seed) for run in self._runs[ask.arm])


def _without(points: Sequence[Point], known: Sequence[Point]) -> list[Point]:
    """``points`` but for those that are ``known``, each once."""
    found: list[Point] = []
    for point in points:
        if point not in known and point not in found:
            found.append(point)
    return found


def _are_alike(arm: Arm, other: Arm) -> bool:
    """Whether a point of one is a point of the other, and means the same settings."""
    return (arm.grids, arm.rate_settings) == (other.grids, other.rate_settings)


def _extended(arm: Arm, edge: Edge) -> Arm:
    if edge[0] not in arm.grids or len(arm.grids[edge[0]]) < 2:
        return arm
    return dataclasses.replace(arm, grids=extended(arm.grids, edge))
