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


def tried(runs: Iterable[RunResult], design: Design) -> list[Tried]:
    """The points that trials of one arm and budget are of, in the order of the search."""
    points: dict[tuple[tuple[str, float], ...], Tried] = {}
    for run in runs:
        assert run.trial is not None
        key = tuple(sorted(run.rates.items()))
        point = points.setdefault(key, Tried(run.trial, run.rates, {}, 0))
        value = value_of(run, design)
        if value is None:
            points[key] = dataclasses.replace(point, num_lost=point.num_lost + 1)
        else:
            point.values[run.seed] = value
    return sorted(points.values(), key=lambda point: point.trial)


def value_of(run: RunResult, design: Design) -> float | None:
    """The main metric of a trial on validation; None if it came to nothing."""
    value = run.valid.get(design.metric, math.nan)
    return value if run.status == "done" and math.isfinite(value) else None


def best(points: Sequence[Tried], design: Design) -> Tried | None:
    """The point with the best mean, of those with the most seeds and without a lost run if there are any such.

    A single seed flatters the best of many points; several tell which one is good. Of equals the earlier one; None if
    no point has a value.
    """
    able = [point for point in points if point.values and not point.num_lost]
    able = able or [point for point in points if point.values]
    most = max((len(point.values) for point in able), default=0)
    whole = [point for point in able if len(point.values) == most]
    return max(whole, key=lambda point: _sign(design) * point.mean, default=None)


def leading(points: Sequence[Tried], design: Design) -> list[Tried]:
    """The points without a lost run, from the best by the first tuning seed, which all are tried with, to the worst."""
    seed = design.tuning_seeds[0]
    able = [point for point in points if seed in point.values and not point.num_lost]
    return sorted(able, key=lambda point: -_sign(design) * point.values[seed])


def best_of(comparison: Comparison, arm: str, budget: float) -> Tried | None:
    """The point that the search of ``arm`` at ``budget`` ends with."""
    return best(tried(comparison.trials(arm, budget), comparison.design), comparison.design)


def grids_of(comparison: Comparison, arm: str, budget: float) -> dict[str, tuple[float, ...]]:
    """The grids of ``arm`` with the values that its trials at ``budget`` tried beyond their ends."""
    trials = comparison.trials(arm, budget)
    return {
        name: tuple(sorted({*values, *(run.rates[name] for run in trials if name in run.rates)}))
        for name, values in comparison.design.arm(arm).grids.items()
    }


def _sign(design: Design) -> float:
    return 1.0 if design.higher_is_better else -1.0
