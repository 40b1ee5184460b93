"""The figures of a comparison, an arm in the same colour and with the same marker in each."""

# S = seeds, E = evaluations, G = places on an axis

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from muonrec.comparison.answer import best_of_three
from muonrec.comparison.forest import (
    Mark,
    Row,
    draw_forest,
    known,
    label_rows,
    level_handles,
    level_marker,
    share_tick,
)
from muonrec.comparison.numbers import Answer, ArmAnswer, Group, Measured
from muonrec.comparison.points import best, tried
from muonrec.comparison.results import Comparison, Design, RunResult, Spectrum
from muonrec.figures import COLOURS, DASHES, GREY, MARKERS, max_ticks, save_figures, short_name, subplots
from muonrec.metrics import Interval
from muonrec.page import pretty

FIGURES = "figures"
_BREAKDOWNS = {"popularity": "training events of the target", "length": "events of the history"}


@dataclasses.dataclass(frozen=True)
class Look:
    """How an arm is drawn: one that shares the colour of another has a dash and a marker of its own."""

    colour: str
    marker: str
    dash: str


def looks(design: Design) -> dict[str, Look]:
    """By place: the control, the arms that differ in the dense optimizer alone, and the others.

    So Muon looks the same in a comparison that has one-rate and in one that does not.
    """
    others = [arm for arm in design.arms if arm.name != design.control]
    names = [design.control, *(arm.name for arm in sorted(others, key=lambda arm: bool(arm.also_differs)))]
    found = {}
    for place, name in enumerate(names):
        turn, index = divmod(place, len(COLOURS))
        found[name] = Look(COLOURS[index], MARKERS[(index + turn) % len(MARKERS)], DASHES[turn % len(DASHES)])
    return found


def budget_name(comparison: Comparison, budget: float) -> str:
    """``full budget (2,000 steps)``."""
    share = "full budget" if budget == 1 else f"{100 * budget:.3g} % of the budget"
    steps = max((run.num_steps for arm in comparison.arms for run in comparison.finals(arm, budget)), default=0)
    return f"{share} ({steps:,} steps)" if steps else share


def draw_comparison(comparison: Comparison, answer: Answer, folder: Path) -> dict[str, str]:
    """Draw every figure that has something to show; a PNG each into ``folder``, and the SVG texts by name.

    Those of budgets that are no more go; other files there stay.

    ``results``, ``savings`` and ``validation`` show all budgets; ``sensitivity-B``, ``groups-B`` and ``spectra-B``
    that of budget ``B``.
    """
    draws: dict[str, Callable[[], Any]] = {
        "results": lambda: _draw_results(comparison, answer),
        "savings": lambda: _draw_savings(comparison, answer),
        "validation": lambda: _draw_validation(comparison, answer),
    }
    for budget in comparison.design.budgets:
        draws[f"sensitivity-{budget:g}"] = lambda budget=budget: _draw_sensitivity(comparison, budget)  # type: ignore[misc]
    for budget in answer.arms:
        draws[f"groups-{budget:g}"] = lambda budget=budget: _draw_groups(comparison, answer, budget)  # type: ignore[misc]
        draws[f"spectra-{budget:g}"] = lambda budget=budget: _draw_spectra(comparison, budget)  # type: ignore[misc]
    for kind in ("sensitivity", "groups", "spectra"):
        for path in folder.glob(f"{kind}-*.png"):
            if path.stem not in draws:
                path.unlink()
    return save_figures(draws, folder)


# How good, how soon ---------------------------------------------------------------------------------------------------


def _grouped(comparison: Comparison, answer: Answer, row_of: Callable[[str, ArmAnswer], Row | None]) -> list[Row]:
    """The rows of every arm, under a header for each budget where there are several."""
    rows = []
    for budget, arms in answer.arms.items():
        of_budget = [row for row in (row_of(name, found) for name, found in arms.items()) if row is not None]
        if of_budget and len(answer.arms) > 1:
            rows.append(Row(budget_name(comparison, budget), is_header=True))
        rows += of_budget
    return rows


def _draw_results(comparison: Comparison, answer: Answer) -> Any:
    """Left the metric on the test targets, a small dot a seed; right what it is to the control's."""
    design, look = comparison.design, looks(comparison.design)
    measured: dict[int, Measured] = {}

    def row_of(name: str, found: ArmAnswer) -> Row:
        row = Row(name, [[Mark(_main(answer, found).difference)]], look[name].colour)
        measured[id(row)] = _main(answer, found)
        return row

    rows = _grouped(comparison, answer, row_of)
    if not rows:
        return None
    has_others = any(known(mark.interval) for row in rows for panel in row.panels for mark in panel)
    figure, [axes] = subplots(1 + has_others, height=1.0 + 0.36 * len(rows), sharey=True)
    for place, row in enumerate(rows):
        if row.is_header:
            continue
        values = measured[id(row)]
        axes[0].plot(values.values, [place] * len(values.values), "|", color=row.colour, ms=12, mew=1.2)
        axes[0].plot([values.mean], [place], "D", color=row.colour, ms=7, mec="white")
        axes[0].annotate(
            f"{values.mean:.4f}", (values.mean, place), (0, 9), textcoords="offset points", ha="center", fontsize=9
        )
    axes[0].margins(x=0.12)
    axes[0].xaxis.set_major_locator(max_ticks(5))
    axes[0].set_xlabel(f"test {pretty(answer.metric)}: seeds, and their mean")
    if has_others:
        label = f"to {short_name(design.control)}, 95 % interval"
        draw_forest(axes[1:], rows, labels=[label], with_ends=True)
    axes[0].set_ylim(len(rows) - 0.4, -0.75)
    label_rows(axes, rows)
    return figure


def _draw_savings(comparison: Comparison, answer: Answer) -> Any:
    """Steps and seconds that each arm needs less to reach what the control ever reaches."""
    look = looks(comparison.design)

    def row_of(name: str, found: ArmAnswer) -> Row | None:
        if not found.targets or name == answer.control:
            return None
        panels = [
            [
                Mark(getattr(target, key), level_marker(target.level), is_bound=target.is_bound)
                for target in found.targets
            ]
            for key in ("steps_saved", "seconds_saved")
        ]
        return Row(name, panels, look[name].colour)

    rows = _grouped(comparison, answer, row_of)
    if not rows:
        return None
    figure, [axes] = subplots(2, height=1.35 + 0.42 * len(rows), sharey=True)
    control = short_name(answer.control)
    draw_forest(axes, rows, labels=[f"fewer steps than {control}", f"fewer seconds than {control}"])
    levels = sorted({t.level for arms in answer.arms.values() for found in arms.values() for t in found.targets})
    label_rows(axes, rows)
    handles, names = level_handles(axes[0], levels, rows)
    figure.legend(handles, names, loc="outside upper left", ncols=3)
    return figure


# Curves ---------------------------------------------------------------------------------------------------------------


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


def _draw_validation(comparison: Comparison, answer: Answer) -> Any:
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
            axis.xaxis.set_major_formatter(_in_thousands)
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


def _in_thousands(number: float, _: int) -> str:
    return f"{number:,.10g}"


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


# Learning rates -------------------------------------------------------------------------------------------------------


def rate_panels(design: Design) -> dict[str, dict[str, str]]:
    """The tuned rates, each with the rate that every arm has in its place.

    An arm whose one rate sets what others tune apart appears in each of their panels.
    """
    settings: dict[str, set[str]] = {}
    for arm in design.arms:
        for name in arm.grids:
            settings.setdefault(name, set()).update(arm.rate_settings.get(name, ()))
    narrow = {
        name
        for name, wide in settings.items()
        if not (wide and wide <= set().union(*(s for other, s in settings.items() if other != name and s < wide)))
    }
    panels = {}
    for name in settings:
        if name in narrow:
            panels[name] = {
                arm.name: rate
                for arm in design.arms
                for rate in arm.grids
                if rate == name or (name not in arm.grids and settings[name] & set(arm.rate_settings.get(rate, ())))
            }
    return panels


def _draw_sensitivity(comparison: Comparison, budget: float) -> Any:
    """Every point, the best of each arm at each value of one rate, whatever the others were, and the one it got."""
    design, look = comparison.design, looks(comparison.design)
    points = {arm: tried(comparison.trials(arm, budget), design) for arm in comparison.arms}
    chosen = {arm: point for arm, own in points.items() if (point := best(own, design)) is not None}
    panels = {
        name: rates
        for name, rates in rate_panels(design).items()
        if len({point.rates[rate] for arm, rate in rates.items() for point in points[arm]}) > 1
    }
    means = np.array([point.mean for own in points.values() for point in own if point.values])
    if not panels or not len(means):
        return None
    figure, [axes] = subplots(len(panels), height=3.5, sharey=True)
    sign = 1.0 if design.higher_is_better else -1.0
    # A rate far off the mark would flatten the rest: it is named at the edge.
    top, typical = sign * (sign * means).max(), float(np.median(means))
    floor = top - sign * max(2.5 * abs(top - typical), 0.02 * abs(top))
    worst = sign * max((sign * means).min(), sign * floor)
    margin = 0.08 * abs(top - worst) or 0.05 * abs(top) or 1.0
    edge = worst - sign * 1.2 * margin
    handles = {}
    for axis, (name, rates) in zip(axes, panels.items(), strict=True):
        for arm, rate in rates.items():
            colour, marker, dash = look[arm].colour, look[arm].marker, look[arm].dash
            most = max((len(point.values) for point in points[arm]), default=0)
            for point in points[arm]:
                x = point.rates[rate]
                if not point.values:
                    axis.plot([x], [edge], marker="x", color=colour, markersize=7, clip_on=False)
                    continue
                if sign * point.mean < sign * worst:
                    axis.plot([x], [edge], marker="v" if sign > 0 else "^", color=colour, markersize=5, clip_on=False)
                else:
                    face = colour if len(point.values) == most else "none"  # of few seeds: no match for the others
                    axis.plot([x], [point.mean], marker, color=colour, alpha=0.6, markersize=4.5, markerfacecolor=face)
            xs = sorted({point.rates[rate] for point in points[arm]})
            tops = [best([point for point in points[arm] if point.rates[rate] == x], design) for x in xs]
            line = [(x, top.mean) for x, top in zip(xs, tops, strict=True) if top is not None]
            if line:
                axis.plot(*zip(*line, strict=True), dash, color=colour, linewidth=1.2)
            if arm in chosen:
                place = ([chosen[arm].rates[rate]], [chosen[arm].mean])
                (handles[arm],) = axis.plot(*place, marker, color=colour, markersize=10, mec="black")
        axis.set_xscale("log")
        axis.set_xlabel(f"learning rate: {name}")
        axis.minorticks_off()
        values = sorted({point.rates[rate] for arm, rate in rates.items() for point in points[arm]})
        if values:
            tuned = [point.rates[rates[arm]] for arm, point in chosen.items() if arm in rates]
            axis.set_xticks(values, _spaced(values, [*tuned, *values], share=0.06 * len(panels)))
            axis.set_xlim(values[0] / 1.6, values[-1] * 1.6)
    axes[0].set_ylim(*sorted((edge, top + sign * margin)))
    axes[0].set_ylabel(f"best validation {pretty(design.metric)}")
    figure.legend(handles.values(), [short_name(name) for name in handles], loc="outside upper left", ncols=4)
    return figure


def _spaced(ticks: Sequence[float], by_weight: Sequence[float], *, share: float) -> list[str]:
    """Labels of rising ticks on a logarithmic axis, but for those that would touch one of more weight.

    Args:
        ticks: from left to right.
        by_weight: the same, or more than once; what comes first has its label.
        share: of the axis that a label takes.
    """
    width, named = (ticks[-1] / ticks[0]) ** share, set[float]()
    for tick in by_weight:
        if all(tick == other or max(tick, other) > width * min(tick, other) for other in named):
            named.add(tick)
    short = [f"{tick:g}" if tick >= 1e-3 else f"{tick:.1e}".replace(".0e", "e").replace("e-0", "e-") for tick in ticks]
    return [text if tick in named else "" for tick, text in zip(ticks, short, strict=True)]


# Parts of the targets -------------------------------------------------------------------------------------------------


_MOST_GAIN = 1.0  # relative; where the control finds next to nothing the gain of the others knows no bounds


def _draw_groups(comparison: Comparison, answer: Answer, budget: float) -> Any:
    """Above the metric in each part of the test targets, below what it is to the control's there."""
    arms = answer.arms[budget]
    breakdowns = {
        name: list(
            dict.fromkeys(g.label for found in arms.values() for g in found.groups.get(name, []) if g.num_targets)
        )
        for name in dict.fromkeys(name for found in arms.values() for name in found.groups)
    }
    breakdowns = {name: labels for name, labels in breakdowns.items() if labels}
    if not breakdowns:
        return None
    others = [name for name in arms if name != answer.control]
    figure, axes = subplots(
        len(breakdowns), rows=2 if others else 1, height=5.6 if others else 3.0, sharey="row", sharex="col"
    )
    handles = {}
    for column, (breakdown, labels) in enumerate(breakdowns.items()):
        sizes = {g.label: g.num_targets for found in arms.values() for g in found.groups.get(breakdown, [])}
        for panel, names in enumerate([list(arms), others][: len(axes)]):
            axis = axes[panel][column]
            for index, name in enumerate(names):
                look = looks(comparison.design)[name]
                shift = 0.6 * ((index + 0.5) / len(names) - 0.5)
                for group in arms[name].groups.get(breakdown, []):
                    interval = _of_group(group, relative=panel == 1)
                    if interval is None:
                        continue
                    x = labels.index(group.label) + shift
                    most = _MOST_GAIN if panel == 1 else math.inf
                    low, mean, high = (min(end, most) for end in (interval.low, interval.mean, interval.high))
                    marker = look.marker if mean == interval.mean else "^"  # beyond the edge
                    axis.plot([x, x], [low, high], color=look.colour, linewidth=1.6)
                    axis.plot([x], [mean], marker, color=look.colour, markersize=6, clip_on=False)
                    handles[name] = axis.plot([], [], look.marker, color=look.colour, markersize=6)[0]
            axis.grid(visible=False, axis="x")
            axis.set_xlim(-0.6, len(labels) - 0.4)
            if panel == 1:
                axis.axhline(0, color=GREY, linewidth=1)
                axis.yaxis.set_major_formatter(share_tick)
        axes[-1][column].set_xticks(range(len(labels)), [f"{_nicer(label)}\n{sizes[label]:,}" for label in labels])
        axes[-1][column].set_xlabel(f"{_BREAKDOWNS.get(breakdown, breakdown)}; below: test targets")
    axes[0][0].set_ylabel(f"test {pretty(answer.metric)}, ± sd")
    if others:
        axes[1][0].set_ylabel(f"to {short_name(answer.control)}, 95 % interval")
        axes[1][0].set_ylim(top=min(axes[1][0].get_ylim()[1], _MOST_GAIN))
    figure.legend(
        [handles[name] for name in arms if name in handles],
        [short_name(name) for name in arms if name in handles],
        loc="outside upper left",
        ncols=4,
    )
    return figure


def _of_group(group: Group, *, relative: bool) -> Interval | None:
    if group.metric is None:
        return None
    if relative:
        return known(group.metric.difference)
    mean, sd = group.metric.mean, group.metric.sd
    return Interval(mean, mean - sd, mean + sd)


def _nicer(label: str) -> str:
    """``tail (≤ 5)`` on two lines, so that labels do not meet."""
    label = label.replace(" (", "\n(").replace("-", "–").replace("<=", "≤").removesuffix(" events")
    return re.sub(r"([≤>]) *(?=\d)", r"\1 ", label)


# Spectra --------------------------------------------------------------------------------------------------------------


def _draw_spectra(comparison: Comparison, budget: float) -> Any:
    """Left the stable rank as a share of the possible over the steps, right the profile of the singular values."""
    spectra = {
        arm: [s for run in comparison.finals(arm, budget) for s in run.spectra if math.isfinite(s.stable_rank)]
        for arm in comparison.arms
    }
    spectra = {arm: found for arm, found in spectra.items() if found}
    if not spectra:
        return None
    # Arms may give Muon other matrices: those that all of them have are compared, if there are any.
    common = set.intersection(*({s.name for s in found} for found in spectra.values()))
    if common:
        spectra = {arm: [s for s in found if s.name in common] for arm, found in spectra.items()}
    whats = [what for what in ("update", "weight") if any(s.what == what for found in spectra.values() for s in found)]
    figure, axes = subplots(2, rows=len(whats), height=0.5 + 2.7 * len(whats), sharex="col")
    handles = {}
    for row, what in zip(axes, whats, strict=True):
        for arm, found in spectra.items():
            colour, dash = looks(comparison.design)[arm].colour, looks(comparison.design)[arm].dash
            chosen = [s for s in found if s.what == what]
            if not chosen:
                continue
            steps = sorted({s.step for s in chosen})
            shares = [
                [100 * s.stable_rank / len(s.singular_values) for s in chosen if s.step == step] for step in steps
            ]
            _draw_band(row[0], steps, shares, colour)
            marker = {"marker": looks(comparison.design)[arm].marker, "ms": 5} if len(steps) <= 12 else {}
            handles[arm] = row[0].plot(steps, [np.median(share) for share in shares], dash, color=colour, **marker)[0]
            x_G, y_NG = _profiles([s for s in chosen if s.step == steps[-1]])
            _draw_band(row[1], x_G, y_NG.T, colour)
            row[1].plot(x_G, np.median(y_NG, axis=0), dash, color=colour)
        row[0].set_ylim(bottom=0)
        row[0].set_xlim(left=0)
        row[0].set_ylabel("stable rank (% of full rank)")
        row[0].set_title("what one step adds" if what == "update" else "weights")
        row[1].set_ylim(-3, 103)
        row[1].set_ylabel("% of the largest singular value")
        row[1].set_title(f"{'what one step adds' if what == 'update' else 'weights'}, at the end")
    axes[-1][0].xaxis.set_major_formatter(_in_thousands)
    axes[-1][0].xaxis.set_major_locator(max_ticks(6, whole=True))
    axes[-1][0].set_xlabel("training step")
    axes[-1][1].set_xlabel("place of the singular value (% of all)")
    figure.legend(handles.values(), [short_name(name) for name in handles], loc="outside upper left", ncols=4)
    return figure


def _draw_band(axis: Any, x: Sequence[float] | np.ndarray, samples: Iterable[Sequence[float]], colour: str) -> None:
    quartiles = np.array([np.quantile(sample, [0.25, 0.75]) for sample in samples])
    axis.fill_between(x, quartiles[:, 0], quartiles[:, 1], color=colour, alpha=0.2, linewidth=0)


def _profiles(spectra: Sequence[Spectrum]) -> tuple[np.ndarray, np.ndarray]:
    """Singular values in percent of the largest, of matrices of any width at the same places: ``[G]``, ``[N, G]``."""
    x_G = np.linspace(0, 100, 101)
    rows = []
    for spectrum in spectra:
        values = np.asarray(spectrum.singular_values)
        if len(values) and values[0] > 0:
            rows.append(np.interp(x_G, np.linspace(0, 100, len(values)), 100 * values / values[0]))
    return x_G, np.stack(rows) if rows else np.full((1, len(x_G)), np.nan)


def _main(answer: Answer, found: ArmAnswer) -> Measured:
    """The main metric on the test targets, or on validation where the test was of something else."""
    return found.test.get(answer.metric, found.valid)
