"""The answer of a comparison, computed from its runs alone."""

# N = test targets

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from muonrec.comparison.bootstrap import Paired, Pairs, mean_of, relative_t_interval, t_interval
from muonrec.comparison.numbers import Answer, ArmAnswer, Chance, Group, Measured, Reached, Target
from muonrec.comparison.points import best_of, grids_of, tried
from muonrec.comparison.results import Comparison, Design, RunResult
from muonrec.comparison.search import END, edges
from muonrec.comparison.verdict import verdict
from muonrec.metrics import Interval, groups_between
from muonrec.runs import first_reaching

LEVELS = (0.99, 1.0)
_POPULARITY = ("tail", "middle", "head")
_FEW_SEEDS = 3  # fewer say next to nothing of how much seeds differ
Some = TypeVar("Some")


def answer(comparison: Comparison, *, num_resamples: int = 1000, seed: int = 0) -> Answer:
    """Everything that the runs say so far, and the verdict.

    Differences are relative to the control, over the seeds that both arms have; see `Paired` for their intervals.

    Args:
        comparison: finished or not.
        num_resamples, seed: of the bootstrap.
    """
    design = comparison.design
    parts = _parts(comparison)
    arms: dict[float, dict[str, ArmAnswer]] = {}
    for budget in design.budgets:
        for name in comparison.arms:
            if comparison.finals(name, budget):
                own = paired(comparison, name, budget, num_resamples=num_resamples, seed=seed)
                arms.setdefault(budget, {})[name] = _arm_answer(comparison, budget, name, own, parts)
    found = Answer(design.control, design.metric, arms, flags(comparison), "")
    return dataclasses.replace(found, verdict=verdict(comparison, found))


def paired(comparison: Comparison, arm: str, budget: float, *, num_resamples: int = 1000, seed: int = 0) -> Paired:
    """The runs of ``arm`` at ``budget`` beside the control's, with every metric that they have."""
    pairs = [] if arm == comparison.design.control else pairs_of(comparison, arm, budget)
    metrics = list(dict.fromkeys([comparison.design.metric, *(name for pair in pairs for name in pair[0].test)]))
    users_N = None if comparison.targets is None else comparison.targets["user_id"]
    parts = {label: is_in_N for labelled in _parts(comparison).values() for label, is_in_N in labelled.items()}
    return Paired(pairs, metrics, users_N, parts, num_resamples=num_resamples, seed=seed)


def pairs_of(comparison: Comparison, arm: str, budget: float) -> list[tuple[RunResult, RunResult]]:
    """The arm's run and the control's of each seed that both have finished."""
    controls = {run.seed: run for run in comparison.finals(comparison.design.control, budget)}
    return [(run, controls[run.seed]) for run in comparison.finals(arm, budget) if run.seed in controls]


def saved(pairs: Iterable[tuple[Some, Some]], when: Callable[[Some], float]) -> list[float]:
    """``1 - arm / control`` of each seed, of what ``when`` says."""
    return [1.0 - when(arm) / when(control) for arm, control in pairs if when(control) > 0]


def reached(design: Design, run: RunResult, control: RunResult, level: float) -> Reached | None:
    """When ``run`` reaches ``level`` of the best median of three of ``control``; None if that has none.

    For a metric that falls, a level of 0.99 is a hundredth above the lowest. A run that never gets there counts with
    its whole budget, even if it ended early.
    """
    sign = 1.0 if design.higher_is_better else -1.0
    best = best_of_three(design, control)
    if best is None or not run.curve_step:
        return None
    best *= sign
    points = [
        {"step": step, "seconds": seconds, "value": sign * value}
        for step, seconds, value in zip(run.curve_step, run.curve_seconds, run.curve_value, strict=True)
    ]
    point = first_reaching(points, "value", best * level if best > 0 else best / level)
    if point is not None:
        return Reached(point["step"], point["seconds"], is_censored=False)
    last = points[-1]
    steps = max(run.num_steps, last["step"])
    return Reached(steps, last["seconds"] * steps / max(last["step"], 1), is_censored=True)


def best_of_three(design: Design, run: RunResult) -> float | None:
    """The best median of three successive validations of a run; None where it has fewer."""
    three = zip(run.curve_value, run.curve_value[1:], run.curve_value[2:], strict=False)
    medians = [float(np.median(values)) for values in three]
    return (max if design.higher_is_better else min)(medians) if medians else None


def flags(comparison: Comparison) -> list[str]:
    """What a reader must know before believing the numbers, a sentence each."""
    design, found = comparison.design, []
    for budget in design.budgets:
        at = f" at budget {budget:g}" * (len(design.budgets) > 1)
        found += _unequal(comparison, budget, at)
        for arm in design.arms:
            point = best_of(comparison, arm.name, budget)
            rates = point.rates if point is not None else {}
            for name, side in edges(rates, grids_of(comparison, arm.name, budget)):
                found.append(
                    f"The best {name} rate of {arm.name}{at}, {rates[name]:g}, is the {END[side]} end of what was "
                    "tried: a better one may lie beyond."
                )
            finals = comparison.finals(arm.name, budget)
            if any(run.rates != rates for run in finals):
                known = "are not at the rates that its search there chose" if rates else "are at rates not tuned there"
                found.append(
                    f"The final runs of {arm.name}{at} {known}: the comparison is under way or of an earlier kind."
                )
    if comparison.targets is None and any(run.num_greater is not None for run in comparison.current):
        found.append(
            "There is no targets.parquet to tell the users of the test targets: each target counts as one of its own, "
            "so intervals are too narrow if users have several. The comparison's own command writes it from the data."
        )
    for arm in design.arms:
        for status, verb in (("diverged", "diverged"), ("failed", "failed")):
            for stage, what in (("tune", "tuning runs"), ("final", "final runs")):
                own = [run for run in comparison.current if (run.arm, run.stage) == (arm.name, stage)]
                if number := sum(run.status == status for run in own):
                    found.append(f"{number} of {len(own)} {what} of {arm.name} {verb}.")
        missing: dict[str, list[str]] = {}
        few: dict[int, list[str]] = {}
        for budget in design.budgets:
            if lacking := set(design.seeds) - {run.seed for run in comparison.finals(arm.name, budget)}:
                listed = f"seed{'s' * (len(lacking) > 1)} {', '.join(map(str, sorted(lacking)))}"
                missing.setdefault(listed, []).append(f"{budget:g}")
            if arm.name != design.control and 0 < (number := len(pairs_of(comparison, arm.name, budget))) < _FEW_SEEDS:
                few.setdefault(number, []).append(f"{budget:g}")
        for seeds, budgets in missing.items():
            found.append(f"{arm.name} at budget {' and '.join(budgets)} lacks {seeds}.")
        for number, budgets in few.items():
            what = (
                f"{number} seeds: so few make wide intervals" if number > 1 else "1 seed, which says nothing of another"
            )
            found.append(f"{arm.name} at budget {' and '.join(budgets)} is held against {design.control} over {what}.")
        early = [run for budget in design.budgets for run in comparison.finals(arm.name, budget) if _ended_early(run)]
        if early:
            ends = ", ".join(f"{run.curve_step[-1]:,} of {run.num_steps:,}" for run in early)
            found.append(
                f"{len(early)} final run{'s' * (len(early) > 1)} of {arm.name} ended early, at step {ends}: a target "
                "never reached counts with the whole budget, and the area under the curve goes on at the last value."
            )
    for what, stage, key in (
        ("trials are of {} sources", "tune", "sources_hash"),
        ("final runs are of {} sources", "final", "sources_hash"),
        ("final runs are of {} devices", "final", "device"),
        ("final runs are of {} machines, and seconds compared where both are of one", "final", "machine"),
    ):
        several = sorted({value for run in comparison.current if run.stage == stage and (value := getattr(run, key))})
        if len(several) > 1:
            found.append(f"The {what.format(len(several))}: {'; '.join(several)}.")
    return found


def _unequal(comparison: Comparison, budget: float, at: str) -> list[str]:
    """A flag where the arms had unequal numbers of points or of their runs."""
    counts, words = set(), []
    for name in comparison.arms:
        own = tried(comparison.trials(name, budget), comparison.design)
        num_runs = sum(len(point.values) + point.num_lost for point in own)
        is_whole = len(own) >= math.prod(map(len, grids_of(comparison, name, budget).values()))
        counts.add((len(own), num_runs))
        runs = f" in {num_runs} runs" * (num_runs > len(own))
        words.append(f"{name} {len(own)}{' (its whole grid)' * is_whole}{runs}")
    return [f"The arms had unequal numbers of trials{at}: {', '.join(words)}."] if len(counts) > 1 else []


def _ended_early(run: RunResult) -> bool:
    """Whether the last validation is further from the last step than validations are from each other."""
    return bool(run.curve_step) and run.curve_step[-1] + run.curve_step[0] <= run.num_steps


def _arm_answer(
    comparison: Comparison, budget: float, arm: str, own: Paired, parts: Mapping[str, Mapping[str, np.ndarray]]
) -> ArmAnswer:
    design, runs, pairs = comparison.design, comparison.finals(arm, budget), pairs_of(comparison, arm, budget)
    is_control = arm == design.control

    def measured(value: Callable[[RunResult], float], difference: Interval | None) -> Measured:
        values = tuple(value(run) for run in runs)
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        arm_S, control_S = ([value(pair[side]) for pair in pairs] for side in (0, 1))
        both = (float(np.mean(arm_S)), float(np.mean(control_S))) if pairs else None
        return Measured(values, float(np.mean(values)), sd, difference, both)

    def tested(metric: str, part: str = "", is_in_N: np.ndarray | None = None) -> Measured:
        return measured(lambda run: mean_of(run, metric, is_in_N), own.difference(metric, part))

    def by_seed(value: Callable[[RunResult], float]) -> Measured:
        arm_S, control_S = ([value(pair[side]) for pair in pairs] for side in (0, 1))
        return measured(value, None if is_control else relative_t_interval(arm_S, control_S))

    def group(label: str, is_in_N: np.ndarray) -> Group:
        users = np.unique(comparison.targets["user_id"][is_in_N]) if comparison.targets is not None else ()
        metric = tested(design.metric, label, is_in_N) if is_in_N.any() else None
        return Group(label, int(is_in_N.sum()), len(users), metric)

    means = {
        name: float(np.mean([getattr(run, name) for run in runs]))
        for name in ("events_per_s", "optimizer_share", "peak_memory_bytes", "seconds")
    }
    return ArmAnswer(
        arm=arm,
        budget=budget,
        seeds=tuple(run.seed for run in runs),
        paired_seeds=tuple(run.seed for run, _ in pairs),
        rates=runs[0].rates,
        test={name: tested(name) for name in runs[0].test},
        valid=by_seed(lambda run: run.valid.get(design.metric, math.nan)),
        area=by_seed(_area),
        groups={
            title: [group(label, is_in_N) for label, is_in_N in labelled.items()] for title, labelled in parts.items()
        },
        targets=tuple(target for level in LEVELS if (target := _target(design, pairs, level, is_control=is_control))),
        by_chance=tuple(_by_chance(design, runs, level) for level in LEVELS) if is_control else (),
        steps_to_own_best=tuple(run.best_step for run in runs),
        steps_to_own_best_saved=None if is_control else t_interval(saved(pairs, lambda run: run.best_step)),
        **means,
    )


def _target(design: Design, pairs: Pairs, level: float, *, is_control: bool) -> Target | None:
    both, timed = [], []
    for run, control in pairs:
        own, other = reached(design, run, control, level), reached(design, control, control, level)
        if own is not None and other is not None:
            both.append((own, other))
            if run.machine == control.machine:
                timed.append((own, other))
    if not both:
        return None
    return Target(
        level=level,
        reached=tuple(own for own, _ in both),
        num_censored=sum(own.is_censored for own, _ in both),
        steps_saved=None if is_control else t_interval(saved(both, lambda one: one.steps)),
        seconds_saved=None if is_control else t_interval(saved(timed, lambda one: one.seconds)),
    )


def _by_chance(design: Design, runs: Sequence[RunResult], level: float) -> Chance:
    """What `_target` says of the control's ``runs``, each held against every other one."""
    both = []
    for run, other in itertools.permutations(runs, 2):
        own, its = reached(design, run, other, level), reached(design, other, other, level)
        if own is not None and its is not None:
            both.append((own, its))
    found = saved(both, lambda one: one.steps)
    return Chance(
        level, len(both), sum(own.is_censored for own, _ in both), float(np.mean(found)) if found else math.nan
    )


def _area(run: RunResult) -> float:
    """Mean height of the validation curve, from the first evaluation to the last step of the budget; NaN without any.

    Where a run ended early its last value is carried to the end, so that all are over the same range.
    """
    if not run.curve_step:
        return math.nan
    steps = [*run.curve_step, max(run.num_steps, run.curve_step[-1])]
    values = [*run.curve_value, run.curve_value[-1]]
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0])) if steps[-1] > steps[0] else values[0]


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
