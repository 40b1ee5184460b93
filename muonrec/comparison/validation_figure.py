"""The figure of validation over training: curves with bands over seeds, and when they reach the control's best."""

# S = seeds, G = places on an axis

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from muonrec.comparison.answer import best_of_three
from muonrec.comparison.looks import budget_name, in_thousands, looks
from muonrec.comparison.numbers import Answer
from muonrec.comparison.results import Comparison, RunResult
from muonrec.figures import GREY, max_ticks, short_name, subplots
from muonrec.page import pretty


def common_curves(runs: Sequence[RunResult]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Validation curves at common steps, up to where the shortest ends, linear in between.

    Args:
        runs: with at least one validation each.

    Returns:
        float64 ``[G]`` steps, ``[G]`` seconds of training until then (means over the runs) and ``[S, G]`` values.
    """
    steps = [np.asarray(run.curve_step, dtype=np.float64) for run in runs]
    start, end = max(step[0] for step in steps), min(step[-1] for step in steps)
    longest = max(steps, key=len)
    steps_G = np.unique(np.clip(longest, start, end)) if end >= start else longest[:1]
    seconds_SG = [np.interp(steps_G, step, run.curve_seconds) for step, run in zip(steps, runs, strict=True)]
    values_SG = [np.interp(steps_G, step, run.curve_value) for step, run in zip(steps, runs, strict=True)]
    return steps_G, np.mean(seconds_SG, 0), np.stack(values_SG)


def target_value(comparison: Comparison, budget: float) -> float | None:
    """Mean over the control's seeds of the best median of three successive validations; None without any."""
    found = [best_of_three(comparison.design, run) for run in comparison.finals(comparison.design.control, budget)]
    bests = [best for best in found if best is not None]
    return float(np.mean(bests)) if bests else None


def draw_validation(comparison: Comparison, answer: Answer) -> Any:
    """A row for each budget; against steps and against seconds, the band from the worst seed to the best."""
    budgets = [b for b in comparison.design.budgets if any(_curves(comparison, arm, b) for arm in comparison.arms)]
    if not budgets:
        return None
    figure, axes = subplots(2, rows=len(budgets), height=0.5 + 2.9 * len(budgets), sharey="row")
    handles = {}
    for row, budget in zip(axes, budgets, strict=True):
        ends, early = [], []
        for arm in comparison.arms:
            runs = _curves(comparison, arm, budget)
            if not runs:
                continue
            look = looks(comparison.design)[arm]
            steps_G, seconds_G, values_SG = common_curves(runs)
            mean_G = values_SG.mean(0)
            for axis, x_G in zip(row, (steps_G, seconds_G), strict=True):
                axis.fill_between(x_G, values_SG.min(0), values_SG.max(0), color=look.colour, alpha=0.2, linewidth=0)
                axis.plot(x_G, mean_G, look.dash, color=look.colour)
                early.append(float(np.interp(0.2 * x_G[-1], x_G, mean_G)))
            handles[arm] = row[0].plot([], [], look.dash, color=look.colour, marker=look.marker, ms=7, mec="white")[0]
            ends += [values_SG.min(0)[-1], values_SG.max(), values_SG.min()]
        for axis in row:
            axis.xaxis.set_major_locator(max_ticks(6, whole=axis is row[0]))
            axis.xaxis.set_major_formatter(in_thousands)
        _target_lines(row, comparison, answer, budget)
        for axis in row:
            axis.set_xlim(left=0)  # last, since it also fixes the right end, beyond the markers
        _set_limits(row[0], ends, early, higher_is_better=comparison.design.higher_is_better)
        row[0].set_ylabel(f"validation {pretty(answer.metric)}")
        row[0].set_title(budget_name(comparison, budget))
    axes[-1][0].set_xlabel("training step")
    axes[-1][1].set_xlabel("seconds of training")
    figure.legend(handles.values(), [short_name(name) for name in handles], loc="outside upper left", ncols=4)
    return figure


def _curves(comparison: Comparison, arm: str, budget: float) -> list[RunResult]:
    return [run for run in comparison.finals(arm, budget) if run.curve_value]


def _target_lines(row: Sequence[Any], comparison: Comparison, answer: Answer, budget: float) -> None:
    """The two targets, and a marker where each arm reaches them on average, hollow where a seed never does."""
    target = target_value(comparison, budget)
    if target is None:
        return
    levels = {t.level for found in answer.arms.get(budget, {}).values() for t in found.targets} or {1.0}
    for axis, key in zip(row, ("steps", "seconds"), strict=True):
        for level in sorted(levels):
            axis.axhline(level * target, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for name, found in answer.arms.get(budget, {}).items():
            look = looks(comparison.design)[name]
            for reaching in found.targets:
                if reaching.num_censored < len(reaching.reached):
                    axis.plot(
                        [float(np.mean([getattr(one, key) for one in reaching.reached]))],
                        [reaching.level * target],
                        marker=look.marker,
                        markersize=7,
                        color=look.colour,
                        markerfacecolor="white" if reaching.num_censored else look.colour,
                        markeredgecolor=look.colour if reaching.num_censored else "white",
                        zorder=5,
                    )
    row[0].annotate(
        f"best of {short_name(comparison.design.control)}"
        + (f" and {100 * min(levels):.0f} % of it" if len(levels) > 1 else ""),
        (0.015, max(levels) * target),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=9,
    )


def _set_limits(axis: Any, ends: Sequence[float], early: Sequence[float], *, higher_is_better: bool) -> None:
    """Leave out the first fifth of the climb, which would flatten where the arms part."""
    finite = [value for value in ends if math.isfinite(value)]
    if not finite:
        return
    if higher_is_better:
        low, high = min(early), max(finite)
    else:
        low, high = min(finite), max(early)
    margin = 0.08 * ((high - low) or abs(high) or 1.0)
    axis.set_ylim(low - margin, high + 1.5 * margin)
