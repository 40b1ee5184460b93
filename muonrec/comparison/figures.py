"""The figures of a comparison; those of the search and of validation are drawn beside this file."""

# N = spectra, G = places on an axis

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
from muonrec.comparison.looks import budget_name, in_thousands, looks
from muonrec.comparison.numbers import Answer, ArmAnswer, Group, Measured
from muonrec.comparison.rates_figure import draw_sensitivity
from muonrec.comparison.results import Comparison, Spectrum
from muonrec.comparison.validation_figure import draw_validation
from muonrec.figures import GREY, max_ticks, save_figures, short_name, subplots
from muonrec.metrics import Interval
from muonrec.page import pretty

FIGURES = "figures"
_BREAKDOWNS = {"popularity": "training events of the target", "length": "events of the history"}


def draw_comparison(comparison: Comparison, answer: Answer, folder: Path) -> dict[str, str]:
    """Draw every figure that has something to show; a PNG each into ``folder``, and the SVG texts by name.

    Those of budgets that are no more go; other files there stay.

    ``results``, ``savings`` and ``validation`` show all budgets; ``sensitivity-B``, ``groups-B`` and ``spectra-B``
    that of budget ``B``.
    """
    draws: dict[str, Callable[[], Any]] = {
        "results": lambda: _draw_results(comparison, answer),
        "savings": lambda: _draw_savings(comparison, answer),
        "validation": lambda: draw_validation(comparison, answer),
    }
    for budget in comparison.design.budgets:
        draws[f"sensitivity-{budget:g}"] = lambda budget=budget: draw_sensitivity(comparison, budget)  # type: ignore[misc]
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
    axes[-1][0].xaxis.set_major_formatter(in_thousands)
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
