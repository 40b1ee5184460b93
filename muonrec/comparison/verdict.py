"""The verdict: one paragraph, written from the numbers, that claims no more than they show."""

from __future__ import annotations

import math

from muonrec.comparison.numbers import Answer, ArmAnswer, Target
from muonrec.comparison.results import Design
from muonrec.metrics import Interval
from muonrec.page import percent, pretty


def verdict(design: Design, found: Answer) -> str:
    """What the full budget shows of every arm, and where smaller budgets or the grids say otherwise."""
    if not found.arms:
        return "No final run has finished yet, so nothing can be said."
    budget, arms = next(iter(found.arms.items()))
    if found.control not in arms:
        return f"The control, {found.control}, has no finished run, so nothing can be compared."
    control = arms[found.control]
    metric = pretty(found.metric)
    seeds = f"{len(control.seeds)} seed{'s' * (len(control.seeds) != 1)}"
    sentences = [
        f"{found.control} reaches test {metric} {control.test[found.metric].mean:.4f} (mean of {seeds}"
        f"{'' if budget == 1.0 else f', at budget {budget:g}'})."
        if found.metric in control.test
        else f"{found.control} has no test {metric}."
    ]
    # Arms that differ in the dense optimizer alone last: they are what the verdict is about.
    names = [name for name in arms if name != found.control]
    for name in sorted(names, key=lambda name: not design.arm(name).also_differs):
        sentences += _of_arm(design, found, arms[name])
    if any("end of what was tried" in flag for flag in found.flags):
        sentences.append("A best rate lies at the end of what was tried, so tuning may not be finished.")
    return " ".join(sentences)


def _of_arm(design: Design, found: Answer, arm: ArmAnswer) -> list[str]:
    also = design.arm(arm.arm).also_differs
    name = f"{arm.arm} (which also differs in {', '.join(also)})" if also else arm.arm
    measured = arm.test.get(found.metric)
    if measured is None or measured.difference is None:
        return [f"{name} cannot be compared on test {pretty(found.metric)}."]
    metric = f"test {pretty(found.metric)} {measured.mean:.4f}, {signed(measured.difference)}"
    sentences = [f"{name} reaches {metric}: {_judged(measured.difference, design.higher_is_better)}."]
    target = next((target for target in arm.targets if target.level == 0.99), None)
    if target is not None and target.steps_saved is not None:
        sentences.append(_of_target(found, arm, target))
    for budget, arms in list(found.arms.items())[1:]:
        smaller = arms[arm.arm].test.get(found.metric) if arm.arm in arms else None
        if smaller is not None and smaller.difference is not None:
            shown = _judged(smaller.difference, design.higher_is_better)
            sentences.append(f"At budget {budget:g} it is {signed(smaller.difference)}: {shown}.")
    return sentences


def _of_target(found: Answer, arm: ArmAnswer, target: Target) -> str:
    assert target.steps_saved is not None and target.seconds_saved is not None
    goal = f"{100 * target.level:.0f} % of the best validation {pretty(found.metric)} of {found.control}"
    num_seeds = len(target.reached)
    if target.num_censored == num_seeds:
        return f"It never reaches {goal} within the budget."
    text = f"It reaches {goal} in {_fewer(target.steps_saved)} steps"
    text += f" and {_fewer(target.seconds_saved)} seconds of training"
    if target.num_censored:
        text += f", counting {target.num_censored} of {num_seeds} seeds that never do with their whole budget"
    return text + (", which shows no difference in steps." if target.steps_saved.contains_zero else ".")


def _judged(difference: Interval, higher_is_better: bool) -> str:
    if difference.contains_zero:
        return "no difference shown"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"


def shown(interval: Interval | None) -> str:
    """``+2.0 % (−0.5 % to +4.6 %)``, for tables; empty for None."""
    if interval is None:
        return ""
    return f"{percent(interval.mean)} ({percent(interval.low)} to {percent(interval.high)})"


def signed(interval: Interval) -> str:
    """``+2.0 % (95 % interval -0.5 % to +4.6 %)``."""
    return f"{percent(interval.mean)} (95 % interval {percent(interval.low)} to {percent(interval.high)})"


def _fewer(saved: Interval) -> str:
    """``12 % fewer (95 % interval 3 % to 21 %)``."""
    word = "fewer" if saved.mean >= 0 else "more"
    sign = 1 if saved.mean >= 0 else -1
    low, high = sorted((sign * saved.low, sign * saved.high))
    return f"{100 * abs(saved.mean):.0f} % {word} ({_unsigned(low)} to {_unsigned(high)})"


def _unsigned(share: float) -> str:
    return f"{100 * share:.0f} %".replace("-", "−") if math.isfinite(share) else "unknown"
