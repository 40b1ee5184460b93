"""Which rates each arm tries: a seeded search over grids, the same number of trials for every arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Point = dict[str, float]
Grids = Mapping[str, Sequence[float]]
# An end of a rate's grid: its name, and -1 for the lowest value or +1 for the highest.
Edge = tuple[str, int]
END = {-1: "lower", 1: "upper"}

# Trials asked at once after the first half: fixed, so that the points do not depend on how many runs are parallel.
_ROUND = 3
_TRIES = 20


class Search:
    """The trials of one arm: Optuna's tree-structured Parzen estimator over the places of the grids (Bergstra 2011).

    The first half is drawn at random, with one seed the same places for every arm with grids of the same lengths; the
    others follow from the values told, a few at a time. No point is asked twice. Given seed and values the points are
    the same on every machine with this Optuna, however many runs go on at once.

    Args:
        grids: values of each rate, in increasing order.
        trials: how many points in all; fewer if the grids have no more.
        seed: of the search.

    Raises:
        ImportError: optuna is missing.
        ValueError: a grid is empty, not increasing or not positive.
    """

    def __init__(self, grids: Grids, *, trials: int, seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ImportError(f"{error.name} is not installed; pip install 'muonrec[compare]'") from error
        for name, values in grids.items():
            if not values or list(values) != sorted(set(values)) or values[0] <= 0:
                raise ValueError(f"grid {name} is {list(values)}; give positive rates in increasing order")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._first = math.ceil(trials / 2)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=self._first)
        self._study = optuna.create_study(sampler=sampler, direction="maximize")
        self._failed, self._worst = optuna.trial.TrialState.FAIL, optuna.trial.TrialState.PRUNED
        self._grids = {name: tuple(values) for name, values in grids.items()}
        self._left = min(trials, self.num_points)
        self._random = np.random.default_rng(seed)
        self._asked: set[tuple[int, ...]] = set()
        self._pending: list[int] = []

    @property
    def num_points(self) -> int:
        """How many points the grids have."""
        return math.prod(len(values) for values in self._grids.values())

    def ask(self) -> list[Point]:
        """The points of the next round; none once all trials were asked."""
        points = self.ask_further(min(self._left, _ROUND if self._asked else self._first))
        self._left -= len(points)
        return points

    def ask_further(self, count: int) -> list[Point]:
        """``count`` more points, beyond the trials if need be; fewer if the grids have no more."""
        return [self._ask_one() for _ in range(min(count, self.num_points - len(self._asked)))]

    def tell(self, values: Sequence[float | None]) -> None:
        """The values of the points asked last, in their order; None for one that came to nothing. Higher is better."""
        for number, value in zip(self._pending, values, strict=True):
            # A pruned trial without a value counts as worse than any with one.
            if value is None:
                self._study.tell(number, state=self._worst)
            else:
                self._study.tell(number, value)
        self._pending = []

    def _ask_one(self) -> Point:
        for _ in range(_TRIES):
            trial, places = self._suggest()
            if places not in self._asked:
                break
            self._study.tell(trial, state=self._failed)  # asked before: nothing new
        else:
            self._study.enqueue_trial(dict(zip(self._grids, self._unasked(), strict=True)))
            trial, places = self._suggest()
        self._asked.add(places)
        self._pending.append(trial.number)
        return {name: self._grids[name][place] for name, place in zip(self._grids, places, strict=True)}

    def _suggest(self) -> tuple[Any, tuple[int, ...]]:
        trial = self._study.ask()
        return trial, tuple(trial.suggest_int(name, 0, len(values) - 1) for name, values in self._grids.items())

    def _unasked(self) -> tuple[int, ...]:
        """A point that was not asked yet, drawn at random."""
        shape = [len(values) for values in self._grids.values()]
        asked = {int(np.ravel_multi_index(places, shape)) for places in self._asked}
        free = np.setdiff1d(np.arange(self.num_points), np.fromiter(asked, np.int64, len(asked)))
        return tuple(int(place) for place in np.unravel_index(self._random.choice(free), shape))


def edges(rates: Point, grids: Grids) -> list[Edge]:
    """The ends of grids at which ``rates`` lie; a grid of one value has none, since it was not searched."""
    found = []
    for name, value in rates.items():
        values = grids[name]
        if len(values) > 1 and value in (values[0], values[-1]):
            found.append((name, -1 if value == values[0] else 1))
    return found


def beyond(values: Sequence[float], side: int) -> float:
    """The next value of a grid at its lower (-1) or upper (+1) end, in geometric progression, to three digits."""
    last, before = (values[0], values[1]) if side < 0 else (values[-1], values[-2])
    return float(f"{last * last / before:.3g}")


def extended(grids: Grids, edge: Edge) -> dict[str, tuple[float, ...]]:
    """``grids`` with one more value at ``edge``."""
    name, side = edge
    more = beyond(grids[name], side)
    values = (more, *grids[name]) if side < 0 else (*grids[name], more)
    return {**{key: tuple(old) for key, old in grids.items()}, name: tuple(values)}
