"""What the search of an arm has found: its points, each with what the runs of one or several seeds gave."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from muonrec.comparison.results import Comparison, Design, RunResult
from muonrec.comparison.search import Point


@dataclasses.dataclass(frozen=True)
class Tried:
    """A point of an arm's search at one budget.

    Args:
        trial: its number, from 0, in the order of the search.
        rates: value of each tuned rate.
        values: the main metric on validation, by tuning seed, of the runs that came to something.
        num_lost: runs that did not.
    """

    trial: int
    rates: Point
    values: dict[int, float]
    num_lost: int

    @property
    def mean(self) -> float:
        """Over the seeds; NaN without any."""
        return sum(self.values.values()) / len(self.values) if self.values else math.nan


def tried(runs: Iterable[RunResult], metric: str) -> list[Tried]:
    """The points that trials of one arm and budget are of, in the order of the search."""
    points: dict[int, Tried] = {}
    for run in runs:
        assert run.trial is not None
        point = points.setdefault(run.trial, Tried(run.trial, run.rates, {}, 0))
        value = run.valid.get(metric, math.nan)
        if run.status == "done" and math.isfinite(value):
            point.values[run.seed] = value
        else:
            points[run.trial] = dataclasses.replace(point, num_lost=point.num_lost + 1)
    return [points[trial] for trial in sorted(points)]


def best(points: Sequence[Tried], *, higher_is_better: bool = True) -> Tried | None:
    """The point with the best mean, of those with the most seeds; the earlier of equals; None if none has any.

    A single seed flatters the best of many points; several tell which one is good.
    """
    most = max((len(point.values) for point in points), default=0)
    able = [point for point in points if point.values and len(point.values) == most]
    return max(able, key=lambda point: point.mean if higher_is_better else -point.mean, default=None)


def leading(points: Sequence[Tried], count: int, *, seed: int, higher_is_better: bool = True) -> list[Tried]:
    """The ``count`` best points by ``seed`` alone, which every point has been tried with."""
    able = [point for point in points if seed in point.values]
    sign = 1.0 if higher_is_better else -1.0
    return sorted(able, key=lambda point: -sign * point.values[seed])[:count]


def best_of(comparison: Comparison, arm: str, budget: float) -> Tried | None:
    """The point that the final runs of ``arm`` at ``budget`` are made at."""
    design = comparison.design
    points = tried(comparison.trials(arm, budget), design.metric)
    return best(points, higher_is_better=design.higher_is_better)


def grids_of(comparison: Comparison, arm: str, budget: float) -> dict[str, tuple[float, ...]]:
    """The grids of ``arm`` with the values that its trials at ``budget`` tried beyond their ends."""
    trials = comparison.trials(arm, budget)
    return {
        name: tuple(sorted({*values, *(run.rates[name] for run in trials if name in run.rates)}))
        for name, values in comparison.design.arm(arm).grids.items()
    }


def value_of(run: RunResult, design: Design) -> float | None:
    """The main metric of a trial on validation, higher is better; None for one that came to nothing."""
    value = run.valid.get(design.metric, math.nan)
    if run.status != "done" or not math.isfinite(value):
        return None
    return value if design.higher_is_better else -value
