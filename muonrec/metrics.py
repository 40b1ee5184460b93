"""Ranking metrics from counts: how many items score above the held-out one, and how many score the same.

A model that gives many items the same score is neither rewarded nor punished for the order in which a sort happens to
leave them: every metric is its expectation over random orders of the tied (McSherry & Najork 2008), in closed form.
"""

# N = held-out items, U = their users, K = places of a list, V = distinct values of a metric, S = bootstrap resamples

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

# Bytes of bootstrap weights held at once; the number of resamples drawn together follows from it.
_BOOTSTRAP_BYTES = 64 * 2**20


class Interval(NamedTuple):
    """A mean and the ends of its bootstrap interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    @property
    def contains_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


def recall_at(k: int, num_greater_N: np.ndarray, num_equal_N: np.ndarray) -> np.ndarray:
    """Chance that the held-out item is among the first ``k``, the tied in random order.

    With one held-out item per user this is also called hit rate.

    Args:
        k: length of the list, at least 1.
        num_greater_N: int ``[N]``, items that score strictly higher than the held-out one.
        num_equal_N: int ``[N]``, *other* items with exactly its score.

    Returns:
        float64 ``[N]`` in [0, 1].
    """
    greater_N, places_N = _checked(k, num_greater_N, num_equal_N)
    return np.clip(k - greater_N, 0, places_N) / places_N


def ndcg_at(k: int, num_greater_N: np.ndarray, num_equal_N: np.ndarray) -> np.ndarray:
    """Expected ``1 / log2(1 + place)`` of the held-out item if it is among the first ``k``, else 0 (Järvelin 2002).

    Arguments and result as in `recall_at`; the ideal gain of one held-out item is 1.
    """
    return _expected_gain(1.0 / np.log2(np.arange(2, k + 2)), num_greater_N, num_equal_N)


def mrr_at(k: int, num_greater_N: np.ndarray, num_equal_N: np.ndarray) -> np.ndarray:
    """Expected ``1 / place`` of the held-out item if it is among the first ``k``, else 0; as in `recall_at`."""
    return _expected_gain(1.0 / np.arange(1, k + 1), num_greater_N, num_equal_N)


def mrr(num_greater_N: np.ndarray, num_equal_N: np.ndarray) -> np.ndarray:
    """Expected ``1 / place`` of the held-out item over the whole catalogue; arguments as in `recall_at`."""
    greater_N, places_N = _checked(1, num_greater_N, num_equal_N)
    tied_N = (_harmonic(greater_N + places_N) - _harmonic(greater_N)) / places_N
    # The difference of two harmonic numbers loses digits where there is nothing to average.
    return np.where(places_N == 1, 1.0 / (greater_N + 1), tied_N)


class Counts(Protocol):
    """What every ranking metric is made of; `muonrec.retrieval.RankedTargets` is one."""

    @property
    def num_greater(self) -> np.ndarray:
        """Int ``[N]``, items that score strictly higher than the held-out one."""
        ...

    @property
    def num_equal(self) -> np.ndarray:
        """Int ``[N]``, other items with exactly its score."""
        ...

    @property
    def list_length(self) -> int | None:
        """Places of the lists in which held-out items were looked for; None: the whole catalogue was ranked."""
        ...


def metrics_per_user(ranked: Counts, *, k: Sequence[int]) -> dict[str, np.ndarray]:
    """Every metric as float64 ``[N]``, keyed ``recall@10``, ``ndcg@10``, ``mrr@10`` for each of ``k``, and ``mrr``.

    Where the held-out items were looked for in lists alone, there is no ``mrr``: it depends on every place.

    Raises:
        ValueError: one of ``k`` is longer than those lists.
    """
    if ranked.list_length is not None and max(k, default=0) > ranked.list_length:
        raise ValueError(
            f"metrics of the first {max(k)} places were asked, but the lists have {ranked.list_length}; "
            "ask for a shorter list, or generate longer ones by num_beams"
        )
    per_user = {}
    for length in k:
        per_user[f"recall@{length}"] = recall_at(length, ranked.num_greater, ranked.num_equal)
        per_user[f"ndcg@{length}"] = ndcg_at(length, ranked.num_greater, ranked.num_equal)
        per_user[f"mrr@{length}"] = mrr_at(length, ranked.num_greater, ranked.num_equal)
    if ranked.list_length is None:
        per_user["mrr"] = mrr(ranked.num_greater, ranked.num_equal)
    return per_user


def ranking_metrics(ranked: Counts, *, k: Sequence[int]) -> dict[str, float]:
    """The mean over users of each metric of `metrics_per_user`. Raises ValueError if there are no users."""
    if len(ranked.num_greater) == 0:
        raise ValueError("the metrics of 0 users were asked; rank at least one held-out item")
    return {name: float(values_N.mean()) for name, values_N in metrics_per_user(ranked, k=k).items()}


def coverage(topk_NK: np.ndarray, num_items: int) -> float:
    """Share of the catalogue that appears in the list of at least one user; -1 (no item) is not counted."""
    if num_items < 1:
        raise ValueError(f"coverage of {num_items} items was asked; pass the number of items of the catalogue")
    shown = np.zeros(num_items, dtype=bool)
    shown[topk_NK[topk_NK >= 0]] = True
    return float(shown.mean())


def bootstrap_interval(
    values_N: np.ndarray,
    users_N: np.ndarray | None = None,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean (Efron 1979), users resampled with all their values.

    The values of one user are alike: as independent draws they would make the interval too narrow.

    Users with the same values are interchangeable, so the resampled *counts* of the distinct ones are drawn from one
    multinomial: the same distribution as drawing users one by one, at the cost of V instead of U per resample.

    Args:
        values_N: ``[N]``, finite. Their order does not matter.
        users_N: int ``[N]``, the user of each value; None: each is of a user of its own.
        num_resamples: bootstrap resamples.
        confidence: of the interval, in (0, 1).
        seed: of the numpy Generator.

    Raises:
        ValueError: there are no values, one is not finite, their users differ in number, or a setting is out of range.
    """
    sums_UC = _sums_of_users(np.asarray(values_N, dtype=np.float64)[:, None], users_N)
    means_S = _resampled_means(sums_UC, num_resamples, seed)[:, 0]
    low, high = _percentiles(means_S, confidence)
    return Interval(float(np.mean(values_N)), low, high)


def paired_bootstrap_difference(
    control_N: np.ndarray,
    arm_N: np.ndarray,
    users_N: np.ndarray | None = None,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of ``mean(arm) / mean(control) - 1`` when the same resampled users count for both.

    Args:
        control_N: ``[N]``, finite.
        arm_N: ``[N]``, of the same held-out items in the same order.
        users_N, num_resamples, confidence, seed: as in `bootstrap_interval`.

    Returns:
        The relative difference (0.05 is 5 % more than the control) and its interval.

    Raises:
        ValueError: as in `bootstrap_interval`; or the values differ in number; or the control's mean is not positive.
    """
    control_N, arm_N = np.asarray(control_N, dtype=np.float64), np.asarray(arm_N, dtype=np.float64)
    if control_N.shape != arm_N.shape:
        raise ValueError(
            f"a paired difference of {control_N.size} and {arm_N.size} values was asked; "
            "evaluate both on the same users"
        )
    sums_UC = _sums_of_users(np.stack([control_N, arm_N], axis=1), users_N)
    if control_N.mean() <= 0.0:
        raise ValueError(
            f"the control's mean is {control_N.mean()}, so no difference can be relative to it; compare a longer list"
        )
    control_S, arm_S = _resampled_means(sums_UC, num_resamples, seed).T
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample in which the control has no hit at all
        relative_S = np.where(arm_S == control_S, 0.0, arm_S / control_S - 1.0)
    low, high = _percentiles(relative_S, confidence)
    return Interval(float(arm_N.mean() / control_N.mean() - 1.0), low, high)


def resampled_means(
    values_NC: np.ndarray, users_N: np.ndarray | None = None, *, num_resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """The mean of each column over each resample of the users: one draw for all columns, so that they are paired.

    Args:
        values_NC: ``[N, C]``, finite: a column for each run, metric or group.
        users_N, num_resamples, seed: as in `bootstrap_interval`.

    Returns:
        float64 ``[S, C]``.
    """
    return _resampled_means(_sums_of_users(np.asarray(values_NC, dtype=np.float64), users_N), num_resamples, seed)


def interval_of(mean: float, resampled_S: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """The percentile interval of what was resampled, around what was not."""
    return Interval(mean, *_percentiles(resampled_S, confidence))


def groups_between(values_N: np.ndarray, bounds: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """Number each value by the range it falls in: ``bounds=(5, 20)`` makes ``<=5``, ``6-20`` and ``>20``.

    Returns:
        int ``[N]`` in ``[0, len(bounds)]``, and the label of each number.
    """
    bounds = list(bounds)
    if not bounds or any(right <= left for left, right in itertools.pairwise(bounds)):
        raise ValueError(f"bounds {bounds} were given; pass at least one, in increasing order, such as (5, 20)")
    inner = [f"{left + 1}-{right}" for left, right in itertools.pairwise(bounds)]
    return np.searchsorted(bounds, values_N, side="left"), [f"<={bounds[0]}", *inner, f">{bounds[-1]}"]


def breakdown(
    per_user: Mapping[str, np.ndarray],
    group_N: np.ndarray,
    labels: Sequence[str],
    users_N: np.ndarray | None = None,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Each metric's mean and interval within each group of held-out items; an empty group has no metrics.

    Args:
        per_user: metric name -> ``[N]``.
        group_N: int ``[N]``, index into ``labels``, as from `groups_between`.
        users_N: as in `bootstrap_interval`; a user may be in several groups.

    Returns:
        One mapping per label: ``group``, ``num_users``, ``num_targets`` and, per metric, ``{"mean", "low", "high"}``.
    """
    users_N = np.arange(len(group_N)) if users_N is None else users_N
    rows: list[dict[str, Any]] = []
    for index, label in enumerate(labels):
        members_N = group_N == index
        num_users = len(np.unique(users_N[members_N]))
        row: dict[str, Any] = {"group": label, "num_users": num_users, "num_targets": int(members_N.sum())}
        if members_N.any():
            for name, values_N in per_user.items():
                interval = bootstrap_interval(
                    values_N[members_N],
                    users_N[members_N],
                    num_resamples=num_resamples,
                    confidence=confidence,
                    seed=seed,
                )
                row[name] = interval._asdict()
        rows.append(row)
    return rows


def _expected_gain(gain_K: np.ndarray, num_greater_N: np.ndarray, num_equal_N: np.ndarray) -> np.ndarray:
    """Mean of ``gain_K`` (0 beyond K) over the places the held-out item may take."""
    k = len(gain_K)
    greater_N, places_N = _checked(k, num_greater_N, num_equal_N)
    summed = np.concatenate([[0.0], np.cumsum(gain_K)])
    first_N, last_N = np.minimum(greater_N, k), np.minimum(greater_N + places_N, k)
    tied_N = (summed[last_N] - summed[first_N]) / places_N
    alone_N = np.append(gain_K, 0.0)[first_N]  # exact where nothing is tied: a difference of sums has lost digits
    return np.where(places_N == 1, alone_N, tied_N)


def _checked(k: int, num_greater_N: np.ndarray, num_equal_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The counts as int64, and the number of places the held-out item may take: the tied and itself."""
    greater_N, equal_N = np.asarray(num_greater_N, dtype=np.int64), np.asarray(num_equal_N, dtype=np.int64)
    if k < 1:
        raise ValueError(f"a list of {k} places was asked; k is at least 1")
    if greater_N.shape != equal_N.shape:
        raise ValueError(f"num_greater counts {greater_N.size} users and num_equal {equal_N.size}; pass the same users")
    if greater_N.size and min(greater_N.min(), equal_N.min()) < 0:
        raise ValueError("a count of items is negative; pass the counts of muonrec.retrieval.rank_targets")
    return greater_N, equal_N + 1


# Below this the harmonic numbers are summed; above it Euler's expansion is exact to float64.
_HARMONIC_TABLE = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, 256))])


def _harmonic(n_N: np.ndarray) -> np.ndarray:
    """``1 + 1/2 + ... + 1/n``, without a table as long as the catalogue."""
    large_N = np.maximum(n_N, 256).astype(np.float64)
    expansion_N = np.log(large_N) + np.euler_gamma + 1 / (2 * large_N) - 1 / (12 * large_N**2) + 1 / (120 * large_N**4)
    return np.where(n_N < 256, _HARMONIC_TABLE[np.minimum(n_N, 255)], expansion_N)


def _sums_of_users(values_NC: np.ndarray, users_N: np.ndarray | None) -> np.ndarray:
    """float64 ``[U, C + 1]``: the sum of each column over the rows of each user, and how many rows those are."""
    if len(values_NC) == 0:
        raise ValueError("a bootstrap over 0 users was asked; pass at least one user's value")
    if not np.isfinite(values_NC).all():
        raise ValueError("a user's value is not finite; look for NaN in the scores of the model")
    if users_N is not None and len(users_N) != len(values_NC):
        raise ValueError(f"{len(values_NC)} values of {len(users_N)} users were given; pass the user of each value")
    ones_N1 = np.ones((len(values_NC), 1))
    if users_N is None:
        return np.concatenate([values_NC, ones_N1], axis=1)
    distinct_U, places_N = np.unique(users_N, return_inverse=True)
    columns = np.concatenate([values_NC, ones_N1], axis=1).T
    return np.stack([np.bincount(places_N, column, minlength=len(distinct_U)) for column in columns], axis=1)


def _resampled_means(sums_UC: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """float64 ``[S, C]``: the mean of each column over each resample of the users, the last column being their rows."""
    if num_resamples < 1:
        raise ValueError(f"{num_resamples} bootstrap resamples were asked; ask for at least 1, 1000 is usual")
    distinct_VC, counts_V = np.unique(sums_UC, axis=0, return_counts=True)
    num_users = len(sums_UC)
    generator = np.random.default_rng(seed)
    at_once = max(1, _BOOTSTRAP_BYTES // (8 * len(counts_V)))
    means = []
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)
        drawn_SC = generator.multinomial(num_users, counts_V / num_users, size=size) @ distinct_VC
        means.append(drawn_SC[:, :-1] / drawn_SC[:, -1:])
    return np.concatenate(means)


def _percentiles(values_S: np.ndarray, confidence: float) -> tuple[float, float]:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence {confidence} was asked; it lies between 0 and 1, 0.95 is usual")
    tail = (1.0 - confidence) / 2.0
    # Observed values, never an interpolation between them: one of them may be infinite.
    low, high = np.quantile(values_S, [tail, 1.0 - tail], method="inverted_cdf")
    return float(low), float(high)
