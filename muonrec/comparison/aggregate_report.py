"""The report over several comparisons: each beside the others, and their mean, as papers print it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muonrec.comparison.aggregate import Aggregate
from muonrec.comparison.answer import LEVELS
from muonrec.comparison.figures import FIGURES
from muonrec.comparison.forest import Mark, Row, draw_forest, label_rows, level_handles, level_marker
from muonrec.comparison.numbers import Answer, ArmAnswer
from muonrec.comparison.report import relative, saved
from muonrec.comparison.results import Comparison
from muonrec.figures import COLOURS, GREY, save_figures, subplots
from muonrec.page import pretty, write_page

AGGREGATE = "aggregate.html"
# What Shan et al. 2026 (arXiv 2603.00416) report on average: NDCG@10 more, and steps to convergence fewer.
_PAPER = (0.126, 0.324)

Found = tuple[Comparison, Answer]


def write_aggregate_report(found: Sequence[Found], totals: Sequence[Aggregate], folder: str | Path) -> Path:
    """Write ``aggregate.html`` and ``figures/aggregate.png`` over the full budgets of several comparisons.

    Args:
        found: comparisons and their answers, in the order of the rows.
        totals: the means over these comparisons, from `aggregated`.
        folder: existing or not.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        ValueError: no comparison was given.
    """
    if not found:
        raise ValueError("a report over no comparisons was asked; pass at least one and its answer")
    metrics = list(dict.fromkeys(pretty(comparison.design.metric) for comparison, _ in found))
    figures = save_figures({"aggregate": lambda: _draw(found, totals, metrics)}, Path(folder) / FIGURES)
    return write_page(
        Path(folder) / AGGREGATE,
        "comparison/aggregate.html.j2",
        title=f"{len(found)} comparisons" if len(found) > 1 else found[0][0].design.name,
        metric=", ".join(metrics),
        levels=[f"{100 * level:.0f} %" for level in LEVELS],
        totals=[
            {
                "arm": total.arm,
                "comparisons": total.num_comparisons,
                "runs": total.num_pairs,
                "metric": relative(total.metric) or "–",
                "steps": [saved(interval) or "–" for interval in total.steps_saved],
                "never": [f"{number} of {total.num_pairs}" for number in total.num_censored],
            }
            for total in totals
        ],
        comparisons=[_facts(comparison, answer) for comparison, answer in found],
        figures=figures,
    )


def _at_full_budget(answer: Answer) -> dict[str, ArmAnswer]:
    return answer.arms[max(answer.arms)] if answer.arms else {}


def _facts(comparison: Comparison, answer: Answer) -> dict[str, Any]:
    arms = _at_full_budget(answer)
    rows = []
    for name, arm in arms.items():
        measured = arm.test.get(answer.metric, arm.valid)
        steps = {target.level: saved(target.steps_saved) for target in arm.targets}
        difference = "" if name == answer.control else relative(measured.difference) or "–"
        cells = [f"{measured.mean:.4f}", difference, *(steps.get(level, "") for level in LEVELS)]
        rows.append((name, str(len(arm.seeds)), cells))
    return {"name": comparison.design.name, "verdict": answer.verdict, "flags": answer.flags, "rows": rows}


def _draw(found: Sequence[Found], totals: Sequence[Aggregate], metrics: Sequence[str]) -> Any:
    rows: list[Row] = []
    for place, total in enumerate(totals):
        colour = COLOURS[(place + 1) % len(COLOURS)]  # the control would have the first
        rows.append(Row(total.arm, is_header=True))
        for comparison, answer in found:
            arm = _at_full_budget(answer).get(total.arm)
            if arm is None or total.arm == answer.control:
                continue
            difference = arm.test[answer.metric].difference if answer.metric in arm.test else None
            targets = {target.level: target for target in arm.targets}
            marks = [
                Mark(target.steps_saved, level_marker(level), is_bound=target.num_censored > 0)
                for level in LEVELS
                if (target := targets.get(level)) is not None
            ]
            rows.append(Row(comparison.design.name, [[Mark(difference)], marks], colour))
        marks = [
            Mark(interval, level_marker(level), is_bound=number > 0)
            for level, interval, number in zip(LEVELS, total.steps_saved, total.num_censored, strict=True)
        ]
        rows.append(Row("mean", [[Mark(total.metric)], marks], colour, is_total=True))
    if not rows:
        return None
    figure, [axes] = subplots(2, height=1.35 + 0.42 * len(rows), sharey=True)
    draw_forest(axes, rows, labels=[f"test {', '.join(metrics)} to the control's", "fewer steps than the control"])
    label_rows(axes, rows)
    for axis, value in zip(axes, _PAPER, strict=True):
        if metrics == ["NDCG@10"] and axis.get_xlim()[0] < value < axis.get_xlim()[1]:
            axis.axvline(value, color=GREY, linestyle=":", linewidth=1)
            axis.annotate("paper", (value, -0.6), (3, -9), textcoords="offset points", fontsize=8, color=GREY)
    handles, names = level_handles(axes[1], LEVELS)
    figure.legend(handles, names, loc="outside upper right", ncols=2)
    return figure
