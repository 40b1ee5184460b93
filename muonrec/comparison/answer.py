"""The answer of a comparison, computed from its runs alone."""

# N = test targets

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from muonrec.comparison.bootstrap import Resampled, t_interval
from muonrec.comparison.numbers import Answer, ArmAnswer, Group, Measured, Reached, Target
from muonrec.comparison.results import Comparison, Design, RunResult
from muonrec.comparison.search import END, edges
from muonrec.comparison.verdict import verdict
from muonrec.metrics import Interval, groups_between
from muonrec.report import first_reaching

LEVELS = (0.99, 1.0)
_POPULARITY = ("tail", "middle", "head")
Pairs = Sequence[tuple[RunResult, RunResult]]


def answer(comparison: Comparison, *, num_resamples: int = 1000, seed: int = 0) -> Answer:
    """Everything that the runs say so far, and the verdict.

    Differences are relative to the control, over the seeds that both arms have; see `Resampled` for their intervals.

    Args:
        comparison: finished or not.
        num_resamples, seed: of the bootstrap.
    """
    design = comparison.design
    arms: dict[float, dict[str, ArmAnswer]] = {}
    for budget in design.budgets:
        if finals := {name: runs for name in comparison.arms if (runs := comparison.finals(name, budget))}:
            resampled = resample(comparison, budget, num_resamples=num_resamples, seed=seed)
            arms[budget] = {name: _arm_answer(comparison, budget, finals, name, resampled) for name in finals}
    found = Answer(design.control, design.metric, arms, flags(comparison), "")
    return dataclasses.replace(found, verdict=verdict(design, found))


def resample(comparison: Comparison, budget: float, *, num_resamples: int = 1000, seed: int = 0) -> Resampled:
    """The bootstrap of all final runs of ``budget``."""
    runs = [run for name in comparison.arms for run in comparison.finals(name, budget)]
    metrics = list(dict.fromkeys([comparison.design.metric, *(name for run in runs for name in run.test)]))
    users_N = None if comparison.targets is None else comparison.targets["user_id"]
    parts = {label: is_in_N for labelled in _parts(comparison).values() for label, is_in_N in labelled.items()}
    return Resampled(runs, metrics, users_N, parts, num_resamples=num_resamples, seed=seed)


def pairs_of(comparison: Comparison, arm: str, budget: float) -> list[tuple[RunResult, RunResult]]:
    """The arm's run and the control's of each seed that both have finished."""
    controls = {run.seed: run for run in comparison.finals(comparison.design.control, budget)}
    return [(run, controls[run.seed]) for run in comparison.finals(arm, budget) if run.seed in controls]


def saved(pairs: Pairs, when: Callable[[RunResult], float]) -> list[float]:
    """``1 - arm / control`` of each seed, of what ``when`` says."""
    return [1.0 - when(arm) / when(control) for arm, control in pairs if when(control) > 0]


def steps_to(design: Design, pairs: Pairs, level: float) -> list[tuple[Reached, Reached]]:
    """When the arm, and when its control, reach ``level`` of the control's best, for each seed that has one."""
    found = [(reached(design, arm, control, level), reached(design, control, control, level)) for arm, control in pairs]
    return [(arm, control) for arm, control in found if arm is not None and control is not None]


def reached(design: Design, run: RunResult, control: RunResult, level: float) -> Reached | None:
    """When ``run`` reaches ``level`` of the best median of three of ``control``; None if that has none.

    For a metric that falls, a level of 0.99 is a hundredth above the lowest.
    """
    sign = 1.0 if design.higher_is_better else -1.0
    three = list(zip(control.curve_value, control.curve_value[1:], control.curve_value[2:], strict=False))
    if not three or not run.curve_step:
        return None
    best = max(sign * float(np.median(values)) for values in three)
    points = [
        {"step": step, "seconds": seconds, "value": sign * value}
        for step, seconds, value in zip(run.curve_step, run.curve_seconds, run.curve_value, strict=True)
    ]
    point = first_reaching(points, "value", best * level if best > 0 else best / level)
    found = point or points[-1]
    return Reached(found["step"], found["seconds"], point is None)


def flags(comparison: Comparison) -> list[str]:
    """What a reader must know before believing the numbers, a sentence each."""
    design, found = comparison.design, []
    trials = {name: comparison.trials(name) for name in comparison.arms}
    counts = {name: sum(run.status != "failed" for run in own) for name, own in trials.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        found.append(f"The arms had unequal numbers of trials: {listed}.")
    for arm in design.arms:
        best = comparison.best_trial(arm.name)
        rates = best.rates if best is not None else {}
        for name, side in edges(rates, arm.grids):
            found.append(
                f"The best {name} rate of {arm.name}, {rates[name]:g}, is the {END[side]} end of what was tried: "
                "a better one may lie beyond."
            )
        for status, verb in (("diverged", "diverged"), ("failed", "failed")):
            for stage, what in (("tune", "trials"), ("final", "final runs")):
                own = [run for run in comparison.current if (run.arm, run.stage) == (arm.name, stage)]
                if number := sum(run.status == status for run in own):
                    found.append(f"{number} of {len(own)} {what} of {arm.name} {verb}.")
        for budget in design.budgets:
            missing = set(design.seeds) - {run.seed for run in comparison.finals(arm.name, budget)}
            if missing:
                listed = ", ".join(map(str, sorted(missing)))
                found.append(f"{arm.name} at budget {budget:g} lacks seed{'s' * (len(missing) > 1)} {listed}.")
    for what, key in (("sources", "sources_hash"), ("devices", "device")):
        several = sorted({getattr(run, key) for run in comparison.current if getattr(run, key)})
        if len(several) > 1:
            found.append(f"The runs are of {len(several)} {what}: {', '.join(several)}.")
    return found


def _arm_answer(
    comparison: Comparison,
    budget: float,
    finals: Mapping[str, Sequence[RunResult]],
    arm: str,
    resampled: Resampled,
) -> ArmAnswer:
    design, runs, pairs = comparison.design, finals[arm], pairs_of(comparison, arm, budget)
    is_control = arm == design.control

    def measured(metric: str, part: str = "") -> Measured:
        values = [resampled.mean(run, metric, part) for run in runs]
        return _measured(values, None if is_control else resampled.difference(pairs, metric, part))

    def by_seed(value: Callable[[RunResult], float]) -> Measured:
        relative = t_interval([-share for share in saved(pairs, value)])
        return _measured([value(run) for run in runs], None if is_control else relative)

    def group(label: str, is_in_N: np.ndarray) -> Group:
        users = np.unique(comparison.targets["user_id"][is_in_N]) if comparison.targets is not None else ()
        metric = measured(design.metric, label) if is_in_N.any() else None
        return Group(label, int(is_in_N.sum()), len(users), metric)

    best_trial = comparison.best_trial(arm)
    wanted = (arm, "final", budget)
    unfinished = [run for run in comparison.current if (run.arm, run.stage, run.budget) == wanted]
    means = {
        name: float(np.mean([getattr(run, name) for run in runs]))
        for name in ("events_per_s", "optimizer_share", "peak_memory_bytes", "seconds")
    }
    return ArmAnswer(
        arm=arm,
        budget=budget,
        seeds=tuple(run.seed for run in runs),
        rates=best_trial.rates if best_trial is not None else runs[0].rates,
        num_failed=sum(run.status != "done" for run in unfinished),
        test={name: measured(name) for name in runs[0].test},
        valid=by_seed(lambda run: run.valid.get(design.metric, math.nan)),
        area=by_seed(_area),
        groups={
            title: [group(label, is_in_N) for label, is_in_N in labelled.items()]
            for title, labelled in _parts(comparison).items()
        },
        targets=tuple(target for level in LEVELS if (target := _target(design, pairs, level, is_control=is_control))),
        steps_to_own_best=tuple(run.best_step for run in runs),
        steps_to_own_best_saved=None if is_control else t_interval(saved(pairs, lambda run: run.best_step)),
        **means,
    )


def _target(design: Design, pairs: Pairs, level: float, *, is_control: bool) -> Target | None:
    both = steps_to(design, pairs, level)
    if not both:
        return None
    return Target(
        level=level,
        reached=tuple(arm for arm, _ in both),
        num_censored=sum(arm.is_censored for arm, _ in both),
        steps_saved=None if is_control else t_interval([1 - arm.steps / control.steps for arm, control in both]),
        seconds_saved=None if is_control else t_interval([1 - arm.seconds / control.seconds for arm, control in both]),
    )


def _area(run: RunResult) -> float:
    """Mean height of the validation curve, from the first evaluation to the last; NaN without any."""
    steps, values = run.curve_step, run.curve_value
    if not steps:
        return math.nan
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0])) if len(steps) > 1 else values[0]


def _parts(comparison: Comparison) -> dict[str, dict[str, np.ndarray]]:
    """The parts of the test targets, bool ``[N]``, by kind and label."""
    if comparison.targets is None:
        return {}
    design = comparison.design
    parts = {}
    for kind, column, bounds in (
        ("popularity", "target_train_count", design.popularity_bounds),
        ("length", "history_length", design.length_bounds),
    ):
        group_N, labels = groups_between(comparison.targets[column], bounds)
        names = [f"{name} ({label})" for name, label in zip(_POPULARITY, labels)] if len(labels) == 3 else labels
        shown = names if kind == "popularity" else [f"{label} events" for label in labels]
        parts[kind] = {label: group_N == index for index, label in enumerate(shown)}
    return parts


def _measured(values: Sequence[float], difference: Interval | None) -> Measured:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Measured(tuple(values), float(np.mean(values)), sd, difference)
