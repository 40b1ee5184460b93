"""The report over several comparisons: each beside the others, and their mean, as papers print it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muonrec.comparison.aggregate import Aggregate, ArmAggregate, Found, at_largest_budget, better, difference_of
from muonrec.comparison.answer import LEVELS
from muonrec.comparison.figures import FIGURES
from muonrec.comparison.forest import Mark, Row, draw_forest, label_rows, level_handles, level_marker
from muonrec.comparison.looks import looks
from muonrec.comparison.numbers import Answer
from muonrec.comparison.results import Comparison
from muonrec.comparison.verdict import shown, spread
from muonrec.figures import GREY, save_figures, subplots
from muonrec.page import percent, pretty, write_page

AGGREGATE = "aggregate.html"
# What Shan et al. 2026 (arXiv 2603.00416) report on average: NDCG@10 more, and fewer steps to each run's own best.
_PAPER = (0.126, 0.324)


def write_aggregate_report(found: Sequence[Found], totals: Aggregate, folder: str | Path) -> Path:
    """Write ``aggregate.html`` and ``figures/aggregate.png`` over the largest budgets of several comparisons.

    Args:
        found: comparisons and their answers, in the order of the rows.
        totals: the means over these comparisons, from `aggregated`.
        folder: existing or not.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    figures = save_figures({"aggregate": lambda: _draw(found, totals)}, Path(folder) / FIGURES)
    return write_page(
        Path(folder) / AGGREGATE,
        "comparison/aggregate.html.j2",
        title=f"{len(found)} comparisons" if len(found) > 1 else found[0][0].design.name,
        flags=totals.flags,
        totals=total_cells(totals),
        levels=[f"{100 * level:.0f} %" for level in LEVELS],
        comparisons=[_facts(comparison, answer) for comparison, answer in found],
        figures=figures,
    )


def total_cells(totals: Aggregate) -> list[dict[str, str]]:
    """For each arm what the table of means says of it, by heading."""
    rows = []
    for total in totals.arms:
        cells = {
            "arm": total.arm,
            "comparisons": str(len(total.comparisons)),
            "runs": str(total.num_pairs),
            _metric(totals): shown(total.better) or "–",
        }
        numbers = zip(LEVELS, total.steps_saved, total.num_censored, total.by_chance, strict=True)
        for level, interval, number, by_chance in numbers:
            goal = f"{100 * level:.0f} %"
            cells[f"fewer steps to {goal}"] = shown(interval, is_bound=number > 0) or "–"
            if interval is not None and math.isfinite(by_chance):
                cells[f"fewer steps to {goal}"] += f", by chance {percent(by_chance)}"
            cells[f"never reach {goal}"] = "–" if interval is None else f"{number} of {total.num_pairs}"
        cells["fewer steps to own best"] = shown(total.own_best_saved) or "–"
        rows.append(cells)
    return rows


def _metric(totals: Aggregate) -> str:
    return f"test {pretty(totals.metric)} {'more' if totals.higher_is_better else 'less'}"


def _facts(comparison: Comparison, answer: Answer) -> dict[str, Any]:
    rows = []
    for name, arm in at_largest_budget(comparison, answer).items():
        measured = arm.test.get(answer.metric)
        steps = {target.level: shown(target.steps_saved, is_bound=target.is_bound) for target in arm.targets}
        difference = "" if name == answer.control else shown(difference_of(comparison, arm)) or "–"
        cells = ["–" if measured is None else spread(measured), difference, *(steps.get(level, "") for level in LEVELS)]
        rows.append((name, str(len(arm.seeds)), cells))
    return {
        "name": comparison.design.name,
        "metric": f"test {pretty(answer.metric)}",
        "verdict": answer.verdict,
        "flags": answer.flags,
        "rows": rows,
    }


def _draw(found: Sequence[Found], totals: Aggregate) -> Any:
    """Three panels for each arm, with scales of their own: one that is far off would flatten the others."""
    if not totals.arms:
        return None
    by_arm = [_rows(found, total, totals) for total in totals.arms]
    heights = [len(rows) + 1.6 for rows in by_arm]  # and the title and the ticks
    figure, axes = subplots(3, rows=len(by_arm), height=0.6 + 0.45 * sum(heights), sharey="row", height_ratios=heights)
    for panels, total, rows in zip(axes, totals.arms, by_arm, strict=True):
        draw_forest(panels, rows, labels=["", "", ""])
        label_rows(panels, rows)
        panels[0].set_title(total.arm)
        for axis, value in zip(panels[::2], _PAPER, strict=True):
            if _is_of_the_paper(found, total, totals) and axis.get_xlim()[0] < value < axis.get_xlim()[1]:
                axis.axvline(value, color=GREY, linestyle=":", linewidth=1)
                axis.annotate("paper", (value, -0.6), (3, -9), textcoords="offset points", fontsize=8, color=GREY)
    goals = (
        f"{_metric(totals)}\nthan the control",
        "fewer steps\nto the control's best",
        "fewer steps\nto its own best",
    )
    for axis, goal in zip(axes[-1], goals, strict=True):
        axis.set_xlabel(goal)
    handles, names = level_handles(axes[0][1], LEVELS, [row for rows in by_arm for row in rows])
    figure.legend(handles, names, loc="outside upper right", ncols=3, fontsize=9)
    return figure


def _is_of_the_paper(found: Sequence[Found], total: ArmAggregate, totals: Aggregate) -> bool:
    """Whether an arm is compared in what the paper reports: another dense optimizer, and nothing else."""
    designs = [one.design for one, _ in found if one.design.name in total.comparisons]
    return totals.metric == "ndcg@10" and not any(design.arm(total.arm).also_differs for design in designs)


def _rows(found: Sequence[Found], total: ArmAggregate, totals: Aggregate) -> list[Row]:
    """A row for each comparison that has the arm, and their mean."""
    colour = next(looks(one.design)[total.arm].colour for one, _ in found if total.arm in one.arms)
    rows = []
    for comparison, answer in found:
        arm = at_largest_budget(comparison, answer).get(total.arm)
        if arm is None or total.arm == answer.control:
            continue
        difference = better(difference_of(comparison, arm), higher_is_better=totals.higher_is_better)
        targets = {target.level: target for target in arm.targets}
        marks = [
            Mark(target.steps_saved, level_marker(level), is_bound=target.is_bound)
            for level in LEVELS
            if (target := targets.get(level)) is not None
        ]
        share, seeds = max(comparison.design.budgets), len(arm.paired_seeds)
        note = f"{f'{100 * share:.3g} %' if share < 1 else 'all'} of the steps, {seeds} seed{'s' * (seeds != 1)}"
        own_best = [Mark(arm.steps_to_own_best_saved, "s")]
        rows.append(Row(comparison.design.name, [[Mark(difference)], marks, own_best], colour, note))
    if len(rows) > 1:
        marks = [
            Mark(interval, level_marker(level), is_bound=number > 0)
            for level, interval, number in zip(LEVELS, total.steps_saved, total.num_censored, strict=True)
        ]
        own_best = [Mark(total.own_best_saved, "s")]
        rows.append(Row("mean", [[Mark(total.better)], marks, own_best], colour, is_total=True))
    return rows
