"""Means over several comparisons, as papers report them: how much better, and in how many fewer steps."""

# R = bootstrap resamples

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from muonrec.comparison.answer import LEVELS, pairs_of, resample, steps_to
from muonrec.comparison.results import Comparison
from muonrec.metrics import Interval, interval_of


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """One arm over several comparisons at the full budget, each of them with the same weight.

    Args:
        arm: its name.
        num_comparisons: that have finished runs of the arm and of their control.
        num_pairs: runs of the arm with a control of the same seed, in all.
        metric: mean relative difference of the main test metric.
        steps_saved: mean of ``1 - arm / control`` of the steps to each of `LEVELS`, as in `Target`.
        num_censored: runs that never reach each of `LEVELS`, counted with their last evaluation.
    """

    arm: str
    num_comparisons: int
    num_pairs: int
    metric: Interval | None
    steps_saved: tuple[Interval | None, ...]
    num_censored: tuple[int, ...]


def aggregated(comparisons: Sequence[Comparison], *, num_resamples: int = 1000, seed: int = 0) -> list[Aggregate]:
    """Every arm that is not the control, over the comparisons that have it.

    The 95 % intervals resample seeds, and users for the metric, within each comparison, and not the comparisons: they
    say how sure the mean over these is, and nothing of other data.
    """
    arms = dict.fromkeys(name for one in comparisons for name in one.arms if name != one.design.control)
    return [found for name in arms if (found := _aggregate(name, comparisons, num_resamples, seed)) is not None]


def _aggregate(arm: str, comparisons: Sequence[Comparison], num_resamples: int, seed: int) -> Aggregate | None:
    metrics: list[tuple[float, np.ndarray]] = []
    steps: list[list[tuple[float, np.ndarray]]] = [[] for _ in LEVELS]
    num_censored, num_pairs, num_comparisons = [0] * len(LEVELS), 0, 0
    for place, one in enumerate(comparisons):
        budget = max(one.design.budgets)
        pairs = pairs_of(one, arm, budget) if arm in one.arms else []
        if not pairs:
            continue
        num_comparisons += 1
        num_pairs += len(pairs)
        resampled = resample(one, budget, num_resamples=num_resamples, seed=seed + place)
        difference = resampled.difference(pairs, one.design.metric)
        draws_R = resampled.differences(pairs, one.design.metric)
        if difference is not None and draws_R is not None:
            metrics.append((difference.mean, draws_R))
        generator = np.random.default_rng([seed, place])
        for index, level in enumerate(LEVELS):
            both = steps_to(one.design, pairs, level)
            if both:
                num_censored[index] += sum(own.is_censored for own, _ in both)
                saved = np.array([1.0 - own.steps / control.steps for own, control in both])
                # One seed less than there are, as `Resampled.differences` has it.
                draws = generator.integers(len(saved), size=(num_resamples, max(len(saved) - 1, 1)))
                steps[index].append((float(saved.mean()), saved[draws].mean(axis=1)))
    if not num_comparisons:
        return None
    return Aggregate(
        arm, num_comparisons, num_pairs, _mean(metrics), tuple(_mean(own) for own in steps), tuple(num_censored)
    )


def _mean(found: Sequence[tuple[float, np.ndarray]]) -> Interval | None:
    if not found:
        return None
    means, draws = zip(*found, strict=True)
    return interval_of(float(np.mean(means)), np.mean(draws, axis=0))
