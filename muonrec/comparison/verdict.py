"""The verdict: one paragraph, written from the numbers, that claims no more than they show."""

from __future__ import annotations

import math

from muonrec.comparison.numbers import Answer, ArmAnswer, Measured, Target
from muonrec.comparison.results import Comparison, Design
from muonrec.metrics import Interval
from muonrec.page import percent, pretty

_MANY_ARMS = 5  # of more, steps are told only where they differ


def verdict(comparison: Comparison, found: Answer) -> str:
    """What the largest budget shows of every arm, and where smaller budgets or the grids say otherwise."""
    design = comparison.design
    if not found.arms:
        return "No final run has finished yet, so nothing can be said."
    budget, arms = next(iter(found.arms.items()))
    lost = {name: lost_seeds(comparison, name, budget) for name in comparison.arms}
    if found.control not in arms:
        why = _within(lost[found.control])
        return f"The control, {found.control}, has no finished run{why}, so nothing can be compared."
    control = arms[found.control]
    metric = pretty(found.metric)
    seeds = f"{len(control.seeds)} seed{'s' * (len(control.seeds) != 1)}"
    sentences = [
        f"{found.control} reaches test {metric} {control.test[found.metric].mean:.4f} (mean of {seeds}"
        f"{'' if budget == 1.0 else f', at budget {budget:g}'})."
        if found.metric in control.test
        else f"{found.control} has no test {metric}."
    ]
    if lost[found.control]:
        sentences.append(f"Of {found.control}, {lost[found.control]}.")
    # Arms that differ in the dense optimizer alone last: they are what the verdict is about.
    names = [name for name in comparison.arms if name != found.control]
    for name in sorted(names, key=lambda name: not design.arm(name).also_differs):
        if name in arms:
            sentences += _of_arm(comparison, found, arms[name])
            if lost[name]:
                sentences.append(f"Of {name}, {lost[name]}.")
        else:
            sentences.append(f"{name} has no finished final run{_within(lost[name])}, so nothing can be said of it.")
    if any("end of what was tried" in flag for flag in found.flags):
        sentences.append("A best rate lies at the end of what was tried, so tuning may not be finished.")
    return " ".join(sentences)


def lost_seeds(comparison: Comparison, arm: str, budget: float) -> str:
    """``2 of 5 seeds diverged, 1 of 5 seeds failed``; empty where none did."""
    own = [run for run in comparison.current if (run.arm, run.stage, run.budget) == (arm, "final", budget)]
    counts = {status: sum(run.status == status for run in own) for status in ("diverged", "failed")}
    return ", ".join(f"{count} of {len(own)} seeds {status}" for status, count in counts.items() if count)


def _within(lost: str) -> str:
    return f" ({lost})" if lost else ""


def _of_arm(comparison: Comparison, found: Answer, arm: ArmAnswer) -> list[str]:
    design, control = comparison.design, next(iter(found.arms.values()))[found.control]
    also = design.arm(arm.arm).also_differs
    name = f"{arm.arm} (which also differs in {', '.join(also)})" if also else arm.arm
    metric, measured = pretty(found.metric), arm.test.get(found.metric)
    if measured is None or measured.both is None:
        return [f"{name} cannot be compared on test {metric}: it has none, or no seed in common with {found.control}."]
    own, other = measured.both
    reached = f"{name} reaches test {metric} {own:.4f}"
    if set(arm.paired_seeds) != {*arm.seeds, *control.seeds}:
        count = len(arm.paired_seeds)
        where = f"the {count} seeds" if count > 1 else "the one seed"
        reached += f" and {found.control} {other:.4f} over {where} that both have"
    if measured.difference is None:
        return [f"{reached}: there is no relative difference to {other:.4g}."]
    judged = _judged(measured.difference, higher_is_better=design.higher_is_better)
    if len(arm.paired_seeds) == 1:
        of_users = "over users alone, so it " if has_ends(measured.difference) else "it "
        judged += f" (one seed: {of_users}says nothing of another seed)"
    sentences = [f"{reached}, {signed(measured.difference)}: {judged}.", *_of_validation(design, arm, measured)]
    target = next((target for target in arm.targets if target.level == 0.99), None)
    is_brief = len(comparison.arms) > _MANY_ARMS
    if target is not None and target.steps_saved is not None and not (is_brief and target.steps_saved.contains_zero):
        sentences.append(_of_target(found, arm.budget, target))
    for budget, arms in list(found.arms.items())[1:]:
        smaller = arms.get(arm.arm)
        difference = smaller.test[found.metric].difference if smaller and found.metric in smaller.test else None
        if smaller is not None and difference is not None:
            judged = _judged(difference, higher_is_better=design.higher_is_better)
            alone = " (one seed)" * (len(smaller.paired_seeds) == 1)
            sentences.append(f"At budget {budget:g} it is {signed(difference)}: {judged}{alone}.")
            sentences += _of_validation(design, smaller, smaller.test[found.metric])
    return sentences


def _of_validation(design: Design, arm: ArmAnswer, tested: Measured) -> list[str]:
    """A sentence where the validation, which has an interval over the seeds alone, says otherwise than the test."""
    found = arm.valid.difference
    if found is None or tested.difference is None or not has_ends(found):
        return []
    judged, other = (_judged(one, higher_is_better=design.higher_is_better) for one in (found, tested.difference))
    return [f"Its best validation is {signed(found)}: {judged}."] if judged != other else []


def _of_target(found: Answer, budget: float, target: Target) -> str:
    goal = f"{100 * target.level:.0f} % of the best validation {pretty(found.metric)} of {found.control}"
    num_seeds = len(target.reached)
    chances = found.arms[budget][found.control].by_chance if found.control in found.arms[budget] else ()
    chance = next((one for one in chances if one.level == target.level and one.num_censored), None)
    alike = (
        f" ({chance.num_censored} of {chance.num_pairs} pairs of {found.control}'s own seeds never do)"
        if chance
        else ""
    )
    if target.num_censored == num_seeds:
        return f"It never reaches {goal} within the budget{alike}."
    assert target.steps_saved is not None
    text = f"It reaches {goal} in {_fewer(target.steps_saved, 'steps', is_bound=target.is_bound)}"
    if target.seconds_saved is not None:
        text += f" and {_fewer(target.seconds_saved, 'seconds of training', is_bound=target.is_bound)}"
    if target.is_bound:
        never = f"{target.num_censored} of {num_seeds} seeds that never {'do' if target.num_censored > 1 else 'does'}"
        return f"{text}, counting {never} with the whole budget{alike}."
    if num_seeds == 1:
        return f"{text}, in the one seed."
    return text + (", which shows no difference in steps." if target.steps_saved.contains_zero else ".")


def _judged(difference: Interval, *, higher_is_better: bool) -> str:
    if difference.contains_zero:
        return "no difference shown"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"


def spread(measured: Measured) -> str:
    """``0.0512 ± 0.0003``: mean and standard deviation over the seeds, which one seed has none of."""
    if not math.isfinite(measured.mean):
        return "–"
    return f"{measured.mean:.4f}" + (f" ± {measured.sd:.4f}" if len(measured.values) > 1 else "")


def shown(interval: Interval | None, *, is_bound: bool = False) -> str:
    """``+5.1 % (+3.2 to +7.0)``, ``≤ +5.1 %`` for an upper bound, for tables; empty for none."""
    if interval is None or not math.isfinite(interval.mean):
        return ""
    if is_bound:
        return f"≤ {percent(interval.mean)}"
    if not has_ends(interval):
        return f"{percent(interval.mean)}, no interval"
    return f"{percent(interval.mean)} ({' to '.join(percent(end).removesuffix(' %') for end in interval[1:])})"


def signed(interval: Interval) -> str:
    """``+2.0 % (95 % interval −0.5 % to +4.6 %)``."""
    ends = f"95 % interval {percent(interval.low)} to {percent(interval.high)}" if has_ends(interval) else "no interval"
    return f"{percent(interval.mean)} ({ends})"


def has_ends(interval: Interval) -> bool:
    """Whether anything is known beside the mean."""
    return math.isfinite(interval.low) or math.isfinite(interval.high)


def _fewer(saved: Interval, what: str, *, is_bound: bool) -> str:
    """``12 % fewer steps (3 % to 21 %)``, ``at most 12 % fewer steps`` where a seed never reaches."""
    is_fewer = saved.mean >= 0
    percents = f"{100 * abs(saved.mean):.0f}"
    share = f"as many {what}" if percents == "0" else f"{percents} % {'fewer' if is_fewer else 'more'} {what}"
    if is_bound:
        return f"at {'most' if is_fewer else 'least'} {share}"
    if not has_ends(saved):
        return share
    low, high = sorted(end if is_fewer else -end for end in (saved.low, saved.high))
    return f"{share} ({_unsigned(low)} to {_unsigned(high)})"


def _unsigned(share: float) -> str:
    return f"{100 * share:.0f} %".replace("-", "−")
