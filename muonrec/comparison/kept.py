"""The runs that a comparison knows, earlier ones among them, and which of them count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator

from muonrec.comparison.results import Design, RunResult


class Kept:
    """Every run that is known. One that is asked for takes the place of an earlier one, which stays, superseded.

    Until then an earlier run that still stands counts, so that a comparison which goes on shows what it had shown.

    Args:
        runs: earlier ones.
        design: an earlier run that it has no place for is superseded.
        key: what tells runs apart.
        stands: whether an earlier run would come out the same today.
    """

    def __init__(
        self,
        runs: Iterable[RunResult],
        design: Design,
        key: Callable[[RunResult], Hashable],
        stands: Callable[[RunResult], bool],
    ) -> None:
        self._key = key
        self._runs = {
            key(run): run if run.superseded or (_has_place(design, run) and stands(run)) else _superseded(run)
            for run in runs
        }
        self._asked: set[Hashable] = set()

    def __iter__(self) -> Iterator[RunResult]:
        return iter(self._runs.values())

    def like(self, run: RunResult) -> RunResult | None:
        """The known run with the key of ``run``."""
        return self._runs.get(self._key(run))

    def add(self, run: RunResult) -> None:
        """Know ``run``, which is asked for, and count it alone for what it is."""
        for key, other in self._runs.items():
            if _place(other) == _place(run):
                self._runs[key] = _superseded(other)
        self._runs[self._key(run)] = dataclasses.replace(run, superseded=False)
        self._asked.add(self._key(run))

    def let_go(self) -> None:
        """Count nothing but what has been asked for: nothing else will be."""
        for key, run in self._runs.items():
            if key not in self._asked:
                self._runs[key] = _superseded(run)


def _has_place(design: Design, run: RunResult) -> bool:
    arms = {arm.name: arm for arm in design.arms}
    seeds = design.seeds if run.stage == "final" else design.tuning_seeds
    fits = run.arm in arms and set(run.rates) == set(arms[run.arm].grids)
    return fits and run.seed in seeds and run.budget in design.budgets


def _place(run: RunResult) -> tuple[Hashable, ...]:
    return (run.arm, run.stage, run.budget, run.seed, run.trial)


def _superseded(run: RunResult) -> RunResult:
    return dataclasses.replace(run, superseded=True)
