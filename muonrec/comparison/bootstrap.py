"""Intervals of the relative difference between two arms: over users by the bootstrap, over seeds by Student's t."""

# S = seeds that both arms have, N = test targets, U = users, C = columns that are resampled together

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from muonrec.comparison.results import RunResult
from muonrec.metrics import Interval, interval_of, resampled_means

# 97.5 % quantiles of Student's t by degrees of freedom, from 1; the last for all beyond, where it is a little too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

Pairs = Sequence[tuple[RunResult, RunResult]]


def t_interval(values_S: Sequence[float]) -> Interval | None:
    """Mean and 95 % t interval of one number per seed; infinite for one seed, None without any."""
    if not len(values_S):
        return None
    mean = float(np.mean(values_S))
    if len(values_S) == 1:
        return Interval(mean, -math.inf, math.inf)
    reach = _T[min(len(values_S) - 1, len(_T)) - 1] * float(np.std(values_S, ddof=1)) / math.sqrt(len(values_S))
    return Interval(mean, mean - reach, mean + reach)


def relative_t_interval(arm_S: Sequence[float], control_S: Sequence[float]) -> Interval | None:
    """``mean(arm) / mean(control) - 1`` and its 95 % t interval over the seeds; None where the control's is no divisor.

    What each seed adds to the ratio of the means (Cochran 1977, section 6.3) takes the place of a ratio for each seed,
    so that the control may be 0 in one of them.
    """
    if not len(control_S) or not np.mean(control_S) > 0 or math.isnan(np.mean(arm_S)):
        return None
    ratio = np.mean(arm_S) / np.mean(control_S)
    found = t_interval(ratio - 1.0 + (np.asarray(arm_S) - ratio * np.asarray(control_S)) / np.mean(control_S))
    return found and _possible(found, arm_S)


def _possible(difference: Interval, arm_S: Sequence[float]) -> Interval:
    """Not below -100 %, where the metric is never negative; no interval stays none."""
    if min(arm_S) < 0 or math.isinf(difference.low):
        return difference
    return Interval(difference.mean, max(difference.low, -1.0), difference.high)


def combined(mean: float, parts: Sequence[tuple[float, Interval]]) -> Interval:
    """The interval around ``mean``, whose errors are the sum of weighted independent ones.

    Their reaches add in squares, below and above apart (Zou & Donner 2008, "MOVER"). Of t intervals that is never too
    narrow (Banerjee 1960), as a quantile at Satterthwaite's degrees of freedom is for a handful of seeds.

    Args:
        mean: of the sum.
        parts: weight and interval of each; of the interval only its reach to both sides counts.
    """
    below = math.hypot(*(weight * (part.mean - part.low) for weight, part in parts if weight))
    above = math.hypot(*(weight * (part.high - part.mean) for weight, part in parts if weight))
    return Interval(mean, mean - below, mean + above)


def mean_of(run: RunResult, metric: str, is_in_N: np.ndarray | None = None) -> float:
    """A test metric of a run, over a part of the targets or all of them; NaN if it has none."""
    values_N = run.per_target(metric)
    if values_N is None:
        return math.nan if is_in_N is not None else run.test.get(metric, math.nan)
    return float(np.mean(values_N if is_in_N is None else values_N[is_in_N])) if len(values_N) else math.nan


class Paired:
    """An arm's runs beside the control's of the same seeds: by how much their metrics differ, and how surely.

    A difference is uncertain in two ways, each of which has an interval of its own. Over users: the percentile
    bootstrap (Efron 1979) of the ratio of the means over all seeds, the same users for both arms. Over seeds: Student's
    t, from the spread of the seeds. What users and seeds do together shows in both, so that the first gives up its
    share, as in the variance of data that are clustered twice (Cameron, Gelbach & Miller 2011), before the two are
    `combined`. The result is never narrower than the users alone make it. With one seed it is that of the users alone,
    and says nothing of another seed.

    Args:
        pairs: the arm's run and the control's of each seed.
        metrics: wanted of each. Where a run has no values of one by target, its interval is that over seeds alone.
        users_N: user of each target; None: each target is of a user of its own.
        parts: bool ``[N]`` by name: parts of the targets, of which the first of ``metrics`` is wanted, too.
        num_resamples, seed: of the bootstrap.
    """

    def __init__(
        self,
        pairs: Pairs,
        metrics: Sequence[str],
        users_N: np.ndarray | None,
        parts: Mapping[str, np.ndarray],
        *,
        num_resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        self._pairs, self._parts = pairs, parts
        places_N = None if users_N is None else np.unique(users_N, return_inverse=True)[1]
        ratios: dict[tuple[str, str], _Ratio] = {}
        for metric in metrics if pairs else ():
            values = [values_N for pair in pairs for run in pair if (values_N := run.per_target(metric)) is not None]
            if len(values) < 2 * len(pairs):
                continue
            values_2SN = np.stack([np.stack(values[0::2]), np.stack(values[1::2])])
            for part, is_in_N in {"": None, **(parts if metric == metrics[0] else {})}.items():
                held_2SN = values_2SN if is_in_N is None else values_2SN * is_in_N
                if (ratio := _ratio(held_2SN, places_N)) is not None:
                    ratios[metric, part] = ratio
        self._over_users: dict[tuple[str, str], tuple[float, Interval]] = {}
        if ratios:
            sums_UC = np.concatenate([ratio.sums_2U for ratio in ratios.values()]).T
            means_CR = resampled_means(sums_UC, None, num_resamples=num_resamples, seed=seed).T
            for place, (key, ratio) in enumerate(ratios.items()):
                arm_R, control_R = means_CR[2 * place : 2 * place + 2]
                with np.errstate(divide="ignore", invalid="ignore"):  # a resample in which the control has no hit
                    difference_R = np.where(arm_R == control_R, 0.0, arm_R / control_R - 1.0)
                self._over_users[key] = ratio.share_of_users, interval_of(ratio.difference, difference_R)

    def difference(self, metric: str, part: str = "") -> Interval | None:
        """The relative difference of the means over the seeds, with its 95 % interval.

        None without pairs, or where the control's mean is not positive. Infinite for one seed without values by target.

        Args:
            metric: one of those asked for.
            part: of the targets; all of them with no name.
        """
        is_in_N = self._parts[part] if part else None
        arm_S, control_S = ([mean_of(pair[side], metric, is_in_N) for pair in self._pairs] for side in (0, 1))
        over_seeds = relative_t_interval(arm_S, control_S)
        if over_seeds is None or (metric, part) not in self._over_users:
            return over_seeds
        share, over_users = self._over_users[metric, part]
        if len(self._pairs) == 1:
            return over_users
        both = combined(over_users.mean, [(share, over_users), (1.0, over_seeds)])
        return _possible(Interval(both.mean, min(over_users.low, both.low), max(over_users.high, both.high)), arm_S)


@dataclasses.dataclass(frozen=True)
class _Ratio:
    """The ratio of the means of two arms, and what its bootstrap over users needs.

    Args:
        difference: ``mean(arm) / mean(control) - 1``.
        sums_2U: of the arm's and the control's values of each user, over targets and seeds.
        share_of_users: of the standard deviation of the ratio over users: what is the same in every seed.
    """

    difference: float
    sums_2U: np.ndarray
    share_of_users: float


def _ratio(values_2SN: np.ndarray, places_N: np.ndarray | None) -> _Ratio | None:
    """From values and the place of each one's user among the users; None where the control has no mean above 0."""
    if places_N is None:
        values_2SU = values_2SN
    else:
        values_2SU = np.stack([[np.bincount(places_N, row_N) for row_N in rows_SN] for rows_SN in values_2SN])
    sums_2U = values_2SU.sum(axis=1)
    arm, control = map(float, sums_2U.sum(axis=1))
    if not control > 0:
        return None
    num_seeds = values_2SU.shape[1]
    if num_seeds == 1:
        return _Ratio(arm / control - 1.0, sums_2U, 1.0)
    # What each user adds to the ratio in each seed; the mean over seeds, and what differs between them.
    added_SU = values_2SU[0] - arm / control * values_2SU[1]
    mean_U = added_SU.mean(axis=0)
    apart_SU = added_SU - mean_U
    apart_SU -= apart_SU.mean(axis=1, keepdims=True)
    variance = np.square(mean_U).sum()
    together = np.square(apart_SU).sum() / (num_seeds - 1) / num_seeds
    return _Ratio(arm / control - 1.0, sums_2U, math.sqrt(max(0.0, 1.0 - together / variance)) if variance else 0.0)
