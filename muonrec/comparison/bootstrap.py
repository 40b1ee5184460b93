"""Intervals of the difference between two arms: resampled over seeds and users, or by Student's t over seeds alone."""

# S = seeds that both arms have, N = test targets, R = bootstrap resamples

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from muonrec.comparison.results import RunResult
from muonrec.metrics import Interval, interval_of, resampled_means

# 97.5 % quantiles of Student's t by degrees of freedom, from 1; the last for all beyond, where it is a little too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def t_interval(values_S: Sequence[float]) -> Interval | None:
    """Mean and 95 % t interval of one number per seed; infinite for one seed, None without any."""
    if not values_S:
        return None
    mean = float(np.mean(values_S))
    if len(values_S) == 1:
        return Interval(mean, -math.inf, math.inf)
    reach = _T[min(len(values_S) - 1, len(_T)) - 1] * float(np.std(values_S, ddof=1)) / math.sqrt(len(values_S))
    return Interval(mean, mean - reach, mean + reach)


class Resampled:
    """Means over resampled users of every metric of every run, from one draw, so that all of them are paired.

    Args:
        runs: to be compared with each other, their values parallel to each other.
        metrics: wanted of each; one that a run has no values of by target counts with its mean alone.
        users_N: user of each target; None: each target is of a user of its own.
        parts: bool ``[N]`` by name: parts of the targets, of which the first of ``metrics`` is wanted, too.
        num_resamples, seed: of the bootstrap.
    """

    def __init__(
        self,
        runs: Sequence[RunResult],
        metrics: Sequence[str],
        users_N: np.ndarray | None,
        parts: Mapping[str, np.ndarray],
        *,
        num_resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        self._num_resamples, self._seed = num_resamples, seed
        columns: dict[tuple[str, str, str], np.ndarray] = {}
        for metric in metrics:
            values = {run.run: run.per_target(metric) for run in runs}
            if any(column is None for column in values.values()):
                continue
            for run, column in values.items():
                assert column is not None
                columns[run, metric, ""] = column
                for name, is_in_N in parts.items() if metric == metrics[0] else ():
                    if is_in_N.any():  # of the mean over all targets, so that ratios are those of the part
                        columns[run, metric, name] = column * is_in_N * (len(is_in_N) / is_in_N.sum())
        self._means = {key: float(column.mean()) for key, column in columns.items()}
        self._resampled = {}
        if columns:
            values_NC = np.stack(list(columns.values()), axis=1)
            means_RC = resampled_means(values_NC, users_N, num_resamples=num_resamples, seed=seed)
            self._resampled = dict(zip(columns, means_RC.T, strict=True))

    def mean(self, run: RunResult, metric: str, part: str = "") -> float:
        """The metric of a run, over a part of the targets or, with no name, all of them; NaN if it has none."""
        if (run.run, metric, part) in self._means:
            return self._means[run.run, metric, part]
        return math.nan if part else run.test.get(metric, math.nan)

    def differences(
        self, pairs: Sequence[tuple[RunResult, RunResult]], metric: str, part: str = ""
    ) -> np.ndarray | None:
        """float64 ``[R]``: ``arm / control - 1`` of the means over resampled users and seeds; None if none can be.

        Args:
            pairs: the arm's run and the control's of each seed.
            metric, part: as in `mean`.
        """
        keys = [[(run.run, metric, part) for run in pair] for pair in pairs]
        has_users = all(key in self._resampled for pair in keys for key in pair)
        if not pairs or (len(pairs) == 1 and not has_users):
            return None
        means_2RS = np.empty((2, self._num_resamples, len(pairs)))
        for place, pair in enumerate(pairs):
            for side, run in enumerate(pair):
                means_2RS[side, :, place] = (
                    self._resampled[keys[place][side]] if has_users else self.mean(run, metric, part)
                )
        # Another stream than the users': the two are resampled independently of each other. One seed less than there
        # are, or the variance of a few would come out too small by (S - 1) / S (Rao & Wu 1988).
        generator = np.random.default_rng([self._seed, 1])
        num_drawn = max(len(pairs) - 1, 1)
        seeds_RS = generator.multinomial(num_drawn, np.full(len(pairs), 1 / len(pairs)), size=self._num_resamples)
        arm_R, control_R = (means_2RS * seeds_RS).sum(axis=2)
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample in which the control has no hit at all
            return np.where(arm_R == control_R, 0.0, arm_R / control_R - 1.0)

    def difference(self, pairs: Sequence[tuple[RunResult, RunResult]], metric: str, part: str = "") -> Interval | None:
        """The relative difference of the means over the pairs, with the 95 % interval of `differences`.

        Without values by target it is the mean over seeds with its t interval: a bootstrap over a handful of seeds
        alone would be far too narrow. None without pairs, or where the control's mean is not positive.
        """
        arm, control = (sum(self.mean(pair[side], metric, part) for pair in pairs) for side in (0, 1))
        if not pairs or not control > 0 or math.isnan(arm):
            return None
        if not all((run.run, metric, part) in self._resampled for pair in pairs for run in pair):
            return t_interval([self.mean(arm, metric) / self.mean(control, metric) - 1.0 for arm, control in pairs])
        resampled_R = self.differences(pairs, metric, part)
        assert resampled_R is not None
        return interval_of(arm / control - 1.0, resampled_R)
