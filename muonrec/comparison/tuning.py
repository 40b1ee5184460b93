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

    A budget gets no final runs while a trial of it has failed, which might have chosen other rates.

    Args:
        design: what is compared.
        execute: carries out runs.
        max_extensions, check: as of `tune`.
    """
    for budget in design.budgets:
        tuning = tune(design, execute, budget=budget, max_extensions=max_extensions, check=check)
        if tuning.num_failed:
            logger.error("budget %g gets no final runs before its %d failed trials are done", budget, tuning.num_failed)
        else:
            execute(final_runs(design, budget, tuning.rates))


def tune(
    design: Design, execute: Execute, *, budget: float, max_extensions: int, check: Check = lambda asked: None
) -> Tuning:
    """Search every arm's rates with the same number of trials, on validation alone.

    First `Search` at one seed. Then, until nothing is left to ask:

    - what leads in an arm is tried by every arm that tunes the same settings over the same grids, so that none wins by
      having been asked the better question; the others get as many more points, drawn by their own search;
    - what leads in each arm is run with the other tuning seeds, and the mean decides, since the best of many points by
      one seed is good by luck; as many points of every arm;
    - where the best lies at the end of a grid, every arm that has this rate tries its own best with the next value
      beyond, every other arm one more point, ``max_extensions`` times.

    Args:
        design: what is compared, with the seeds of the tuning and how many points lead.
        execute: carries out trials.
        budget: of the trials.
        max_extensions: how often grids are extended.
        check: a grid ends before rates that it refuses.
    """
    tuning = Tuning(design, execute, budget)
    tuning.search()
    while True:
        if tuning.exchange() or tuning.repeat():
            continue
        if max_extensions and tuning.extend(check):
            max_extensions -= 1
            continue
        return tuning


def final_runs(design: Design, budget: float, rates: dict[str, Point]) -> list[Asked]:
    """The runs of every seed at ``budget``; those of one seed, which are paired, beside each other."""
    return [
        Asked(arm.name, "final", budget, seed, None, rates[arm.name])
        for seed in design.seeds
        for arm in design.arms
        if arm.name in rates
    ]


class Tuning:
    """The trials of all arms at one budget, numbered in the order of the search; each number is a point of its own."""

    def __init__(self, design: Design, execute: Execute, budget: float) -> None:
        self._design, self._execute, self._budget = design, execute, budget
        self._first, *self._others = design.tuning_seeds
        self._searches = {arm.name: Search(arm.grids, trials=design.trials, seed=self._first) for arm in design.arms}
        self._points: dict[str, list[Point]] = {arm.name: [] for arm in design.arms}
        self._runs: dict[str, list[RunResult]] = {arm.name: [] for arm in design.arms}
        self._refused: set[Edge] = set()

    @property
    def rates(self) -> dict[str, Point]:
        """The best rates of every arm that has a finished trial."""
        found = {name: best(self._tried(name), self._design) for name in self._points}
        return {name: point.rates for name, point in found.items() if point is not None}

    @property
    def num_failed(self) -> int:
        """Trials that failed for another reason than their rates."""
        return sum(run.status == "failed" for runs in self._runs.values() for run in runs)

    def search(self) -> None:
        """Run the trials of every arm's search."""
        sign = 1.0 if self._design.higher_is_better else -1.0
        while asked := {name: points for name, search in self._searches.items() if (points := search.ask())}:
            self._run(asked, [self._first])
            for name, points in asked.items():
                values = [value_of(run, self._design) for run in self._runs[name][-len(points) :]]
                self._searches[name].tell([value if value is None else sign * value for value in values])

    def exchange(self) -> bool:
        """Try what leads in an arm in the others like it; whether there was anything left to try."""
        asked = {
            arm.name: _without(
                [
                    point.rates
                    for other in self._design.arms
                    if _are_alike(arm, other)
                    for point in self._leading(other.name)[: self._design.leaders]
                ],
                self._points[arm.name],
            )
            for arm in self._design.arms
        }
        most = max(len(self._points[name]) + len(points) for name, points in asked.items())
        for name, points in asked.items():
            points += self._further(name, most - len(self._points[name]) - len(points), taken=points)
        return self._run(asked, [self._first])

    def repeat(self) -> bool:
        """Run what leads in each arm with the other seeds, as many points of each; whether any were left to run."""
        leaders = {}
        for name in self._points:
            points = self._leading(name)
            kept = [point for point in points if len(point.values) > 1]
            leaders[name] = kept + [point for point in points[: self._design.leaders] if point not in kept]
        most = max(map(len, leaders.values()))
        asked = {
            name: [*own, *(point for point in self._leading(name) if point not in own)][:most]
            for name, own in leaders.items()
        }
        return self._run({name: [point.rates for point in own] for name, own in asked.items()}, self._others)

    def extend(self, check: Check) -> bool:
        """Try what lies beyond the ends of grids at which a best lies; whether there was any such."""
        own = self.rates
        at = {edge for arm in self._design.arms if arm.name in own for edge in edges(own[arm.name], arm.grids)}
        asked: dict[str, list[Point]] = {name: [] for name in self._points}
        for edge in sorted(at - self._refused):
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
                self._refused.add(edge)
                continue
            logger.info("a best %s lies at the %s end of its grid; every arm tries one more", edge[0], END[edge[1]])
            self._design = dataclasses.replace(self._design, arms=arms)
            for name, points in asked.items():
                points += [ends[name]] if name in ends else self._further(name, 1, taken=points)
        return self._run(asked, [self._first])

    def _tried(self, name: str) -> list[Tried]:
        return tried(self._runs[name], self._design)

    def _leading(self, name: str) -> list[Tried]:
        return leading(self._tried(name), self._design)

    def _further(self, name: str, count: int, *, taken: list[Point]) -> list[Point]:
        """``count`` more points that an arm's search draws, none tried or ``taken``; fewer if it has no more."""
        found: list[Point] = []
        while len(found) < count and (points := self._searches[name].ask_further(1)):
            found += _without(points, [*self._points[name], *taken, *found])
        return found

    def _run(self, points: dict[str, list[Point]], seeds: Sequence[int]) -> bool:
        """Run a trial at each point with each seed, but for those that were run; whether there were any others."""
        for name, own in points.items():
            self._points[name] += _without(own, self._points[name])
        asked = [
            Asked(name, "tune", self._budget, seed, self._points[name].index(point), point)
            for name, own in points.items()
            for point in own
            for seed in seeds
        ]
        asked = [ask for ask in asked if not self._is_done(ask)]
        for ask, result in zip(asked, self._execute(asked) if asked else (), strict=True):
            self._runs[ask.arm].append(result)
        return bool(asked)

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
