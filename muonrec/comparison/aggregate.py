"""Means over several comparisons, as papers report them: how much better, and in how many fewer steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from muonrec.comparison.answer import LEVELS
from muonrec.comparison.bootstrap import combined
from muonrec.comparison.numbers import Answer, ArmAnswer
from muonrec.comparison.protocol import differences
from muonrec.comparison.results import Comparison
from muonrec.metrics import Interval

Found = tuple[Comparison, Answer]


@dataclasses.dataclass(frozen=True)
class ArmAggregate:
    """One arm over several comparisons at their largest budgets, each of them with the same weight.

    Args:
        arm: its name.
        comparisons: names of those that have runs of the arm and of their control for the same seed.
        num_pairs: such runs, in all.
        better: mean over the comparisons of the relative difference of the main test metric, positive where the arm is
            better, whichever way the metric goes.
        steps_saved: mean of ``1 - arm / control`` of the steps to each of `LEVELS`, as in `Target`.
        num_censored: runs that never reach each of `LEVELS`: where there are any, the mean is an upper bound.
        own_best_saved: the same mean of the steps to each run's own best validation, as papers count them.
        by_chance: what ``steps_saved`` would be of arms that are as good as their controls, see `Chance`: mean over the
            comparisons that know it, NaN where none does.
    """

    arm: str
    comparisons: tuple[str, ...]
    num_pairs: int
    better: Interval | None
    steps_saved: tuple[Interval | None, ...]
    num_censored: tuple[int, ...]
    own_best_saved: Interval | None
    by_chance: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """What several comparisons show together.

    Args:
        metric, higher_is_better: the main one, which all of them have in common.
        arms: all that are not the control, where a comparison has runs of them; those in the most comparisons first.
        flags: what a reader must know, a sentence each: comparisons that are left out or have a part of their steps
            alone, intervals that are not known, arms that are not the same everywhere.
    """

    metric: str
    higher_is_better: bool
    arms: tuple[ArmAggregate, ...]
    flags: tuple[str, ...]


def aggregated(found: Sequence[Found]) -> Aggregate:
    """The mean over comparisons of what each says of its arms.

    The estimates and their 95 % intervals are the comparisons' own, `combined` as of independent errors, and the
    comparisons are taken as they are, not as a sample of others: the interval says how sure the mean over these is, and
    nothing of other data. It is infinite where one of them has none.

    Args:
        found: comparisons and their answers.

    Raises:
        ValueError: there are none, they differ in their main metric, or one of them was given twice.
    """
    if not found:
        raise ValueError("a mean over no comparisons was asked; pass at least one and its answer")
    designs = [comparison.design for comparison, _ in found]
    metrics = {(design.metric, design.higher_is_better): design.name for design in reversed(designs)}
    if len(metrics) > 1:
        listed = ", ".join(f"{name} by {metric}" for (metric, _), name in metrics.items())
        raise ValueError(f"comparisons of unlike metrics have no mean: {listed}; aggregate those of one metric")
    arms = dict.fromkeys(name for one, _ in found for name in one.arms if name != one.design.control)
    flags = [
        f"{one.design.name} is left out: it has no finished final runs at its largest budget."
        for one, answer in found
        if not at_largest_budget(one, answer)
    ]
    flags += [
        f"{one.design.name} is over {100 * max(one.design.budgets):.3g} % of the steps of its experiment."
        for one, answer in found
        if max(one.design.budgets) < 1 and at_largest_budget(one, answer)
    ]
    alike: dict[str, list[str]] = {}
    for one, answer in found:
        if at_largest_budget(one, answer) and (data := one.design.facts.get("fingerprint")):
            alike.setdefault(data, []).append(one.design.name)
    flags += [
        f"{', '.join(names[:-1])} and {names[-1]} are ranked on the same targets: their errors are not independent, so "
        "that the intervals of the means are too narrow."
        for names in alike.values()
        if len(names) > 1
    ]
    flags += _unlike(found, lambda one: one.design.control)
    totals = []
    for name in arms:
        _check_distinct(name, [one for one, _ in found])
        members, controls = [], []
        for one, answer in found:
            arms_of_it = at_largest_budget(one, answer)
            if name != one.design.control and (arm := arms_of_it.get(name)) and arm.paired_seeds:
                members.append((one, arm))
                controls.append(arms_of_it[one.design.control])
        flags += _flags(name, found, members)
        if members:
            totals.append(_mean(name, members, controls))
    totals.sort(key=lambda total: -len(total.comparisons))
    return Aggregate(designs[0].metric, designs[0].higher_is_better, tuple(totals), tuple(flags))


def better(difference: Interval | None, *, higher_is_better: bool) -> Interval | None:
    """A relative difference as that by which an arm is better: with the other sign for a metric that should fall."""
    if difference is None or higher_is_better:
        return difference
    return Interval(-difference.mean, -difference.high, -difference.low)


def at_largest_budget(comparison: Comparison, answer: Answer) -> dict[str, ArmAnswer]:
    """The arms with finished final runs at the largest budget, by name."""
    return answer.arms.get(max(comparison.design.budgets), {})


def difference_of(comparison: Comparison, arm: ArmAnswer) -> Interval | None:
    """By how much the arm differs from the control in the main test metric."""
    metric = comparison.design.metric
    return arm.test[metric].difference if metric in arm.test else None


def _mean(arm: str, members: Sequence[tuple[Comparison, ArmAnswer]], controls: Sequence[ArmAnswer]) -> ArmAggregate:
    design = members[0][0].design
    differences = [difference_of(one, own) for one, own in members]
    targets = [[target for _, own in members for target in own.targets if target.level == level] for level in LEVELS]
    return ArmAggregate(
        arm,
        tuple(one.design.name for one, _ in members),
        sum(len(own.paired_seeds) for _, own in members),
        better(_mean_of(differences), higher_is_better=design.higher_is_better),
        tuple(_mean_of([target.steps_saved for target in own]) for own in targets),
        tuple(sum(target.num_censored for target in own) for own in targets),
        _mean_of([own.steps_to_own_best_saved for _, own in members]),
        tuple(_mean_by_chance(controls, level) for level in LEVELS),
    )


def _mean_by_chance(controls: Sequence[ArmAnswer], level: float) -> float:
    found = [chance.steps_saved for own in controls for chance in own.by_chance if chance.level == level]
    known = [saved for saved in found if math.isfinite(saved)]
    return float(np.mean(known)) if known else math.nan


def _mean_of(intervals: Sequence[Interval | None]) -> Interval | None:
    known = [interval for interval in intervals if interval is not None]
    if not known:
        return None
    return combined(float(np.mean([one.mean for one in known])), [(1 / len(known), one) for one in known])


def _check_distinct(arm: str, comparisons: Sequence[Comparison]) -> None:
    """Refuse two comparisons with a run of ``arm`` in common: counted twice, it would make the mean look surer."""
    owners: dict[tuple[object, ...], str] = {}
    for one in comparisons:
        runs = one.finals(arm, max(one.design.budgets)) if arm in one.arms else []
        keys = [(run.run, *sorted(run.test.items())) for run in runs]
        if twice := next((owners[key] for key in keys if key in owners), None):
            raise ValueError(
                f"the comparisons {twice} and {one.design.name} have runs of {arm} in common; give each comparison once"
            )
        owners.update(dict.fromkeys(keys, one.design.name))


def _flags(arm: str, found: Sequence[Found], members: Sequence[tuple[Comparison, ArmAnswer]]) -> list[str]:
    flags = []
    names = {id(one) for one, _ in members}
    for one, answer in found:
        if arm in one.arms and arm != one.design.control and at_largest_budget(one, answer) and id(one) not in names:
            flags.append(
                f"{one.design.name} is left out of the means of {arm}: at its largest budget it has no seed with "
                f"finished runs of both {arm} and {one.design.control}."
            )
    for one, own in members:
        name = one.design.name
        difference = difference_of(one, own)
        if difference is None:
            flags.append(f"{name} is left out of the mean difference of {arm}: the control's metric is not above 0.")
        if not own.targets:
            flags.append(f"{name} is left out of the mean steps of {arm}: it has no validation curves.")
        if len(own.paired_seeds) == 1:
            of_users = difference is not None and math.isfinite(difference.low)
            flags.append(
                f"{name} has one seed of {arm}, so that the mean steps have no interval"
                + (
                    ", and its difference is over users alone."
                    if of_users
                    else ", and neither has the mean difference."
                )
            )
    return flags + _unlike(members, lambda one: arm)


def _unlike(found: Sequence[tuple[Comparison, object]], arm_of: Callable[[Comparison], str]) -> list[str]:
    """A flag for each override in which an arm is not the same in all comparisons."""
    flags = []
    settings = [(one.design.name, arm_of(one), one.design.arm(arm_of(one)).overrides) for one, _ in found]
    for name, arm, overrides in settings[1:]:
        for path, (first, other) in differences(settings[0][2], overrides).items():
            where = f"{first!r} in {settings[0][0]}, {other!r} in {name}"
            flags.append(f"{arm} is not the same everywhere: {path} is {where}.")
    return flags
