"""The figure of the search: what validation makes of every learning rate tried, by arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from muonrec.comparison.looks import looks
from muonrec.comparison.points import best, tried
from muonrec.comparison.results import Comparison, Design
from muonrec.figures import short_name, subplots
from muonrec.page import pretty


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


def draw_sensitivity(comparison: Comparison, budget: float) -> Any:
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
    # Of arms that are off the mark at the same rate, one is drawn over the other: the first are the larger.
    sizes = {arm: 5 + 3 * max(0, 2 - place) for place, arm in enumerate(comparison.arms)}
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
                    kind = "v" if sign > 0 else "^"
                    axis.plot([x], [edge], marker=kind, color=colour, markersize=sizes[arm], clip_on=False)
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
