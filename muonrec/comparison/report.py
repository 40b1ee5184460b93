"""The report of a comparison: one self-contained HTML page with the figures beside it, from its numbers alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from muonrec.comparison.figures import FIGURES, draw_comparison
from muonrec.comparison.looks import budget_name, looks
from muonrec.comparison.numbers import Answer, ArmAnswer, Chance, Measured, Target
from muonrec.comparison.points import best, grids_of, tried
from muonrec.comparison.results import Arm, Comparison
from muonrec.comparison.search import edges
from muonrec.comparison.verdict import lost_seeds, shown, spread
from muonrec.metrics import Interval
from muonrec.page import duration, percent, pretty, short, write_page
from muonrec.report import REPORT

_MAX_TESTS = 6  # columns of the first table
_FIRST_TESTS = {"ndcg@10": 0, "recall@10": 1, "mrr": 2}  # of those that are too many


def write_comparison_report(comparison: Comparison, answer: Answer, folder: str | Path) -> Path:
    """Write ``report.html`` and ``figures/*.png`` into ``folder``; parts without runs are left out.

    Args:
        comparison: finished or not.
        answer: to it.
        folder: existing or not.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    folder = Path(folder)
    design = comparison.design
    figures = draw_comparison(comparison, answer, folder / FIGURES)
    return write_page(
        folder / REPORT,
        "comparison/report.html.j2",
        title=design.name,
        control=design.control,
        metric=pretty(design.metric),
        verdict=answer.verdict,
        flags=answer.flags,
        colours={name: look.colour for name, look in looks(design).items()},
        quality=_quality(comparison, answer),
        soon=_soon(comparison, answer),
        cost=_cost(comparison, answer),
        budgets=[(f"{budget:g}", budget_name(comparison, budget)) for budget in answer.arms],
        figures=figures,
        tuning=_tuning(comparison),
        protocol=_protocol(comparison),
        fingerprints=_fingerprints(comparison),
        facts=json.dumps(design.facts, indent=2, sort_keys=True, default=str) if design.facts else "",
        runs=_runs(comparison),
    )


# Tables of results: a heading per budget, and cells of a text with a smaller one below -------------------------------

Cell = tuple[str, str]


def _table(comparison: Comparison, answer: Answer, columns: Sequence[str], cells: Any) -> dict[str, Any]:
    """Columns, and for each budget the rows of its arms."""
    return {
        "columns": columns,
        "budgets": [
            (budget_name(comparison, budget), [(name, cells(found)) for name, found in arms.items()])
            for budget, arms in answer.arms.items()
        ],
    }


def _quality(comparison: Comparison, answer: Answer) -> dict[str, Any]:
    found = [arm for arms in answer.arms.values() for arm in arms.values()]
    names = list(dict.fromkeys(name for arm in found for name in arm.test))
    names = sorted(names, key=lambda name: _FIRST_TESTS.get(name, len(_FIRST_TESTS)))
    names = sorted(names, key=lambda name: name != answer.metric)[:_MAX_TESTS]
    columns = ["seeds", *(f"test {pretty(name)}" for name in names), "best validation", "area under the curve"]

    def cells(arm: ArmAnswer) -> list[Cell]:
        seeds = (str(len(arm.seeds)), lost_seeds(comparison, arm.arm, arm.budget))
        return [seeds, *(_measured(arm.test.get(name)) for name in names), _measured(arm.valid), _measured(arm.area)]

    return _table(comparison, answer, columns, cells)


def _soon(comparison: Comparison, answer: Answer) -> dict[str, Any]:
    levels = sorted({t.level for arms in answer.arms.values() for arm in arms.values() for t in arm.targets})
    columns = [f"{what} to {100 * level:.0f} %" for level in levels for what in ("steps", "seconds")]

    def cells(arm: ArmAnswer) -> list[Cell]:
        targets = {target.level: target for target in arm.targets}
        chances = {chance.level: chance for chance in arm.by_chance}
        soon = [
            _or_by_chance(reached(targets.get(level), what), chances.get(level) if what == "steps" else None)
            for level in levels
            for what in ("steps", "seconds")
        ]
        own = (
            f"{np.mean(arm.steps_to_own_best):,.0f}" if any(arm.steps_to_own_best) else "–",
            saved(arm.steps_to_own_best_saved),
        )
        return [*soon, own]

    return _table(comparison, answer, [*columns, "steps to own best"], cells)


def _cost(comparison: Comparison, answer: Answer) -> dict[str, Any]:
    def cells(arm: ArmAnswer) -> list[Cell]:
        return [
            (duration(arm.seconds) if arm.seconds else "–", ""),
            (f"{arm.events_per_s:,.0f}" if arm.events_per_s else "–", ""),
            (f"{100 * arm.optimizer_share:.1f} %" if arm.optimizer_share else "–", ""),
            (f"{arm.peak_memory_bytes / 2**30:.2f} GiB" if arm.peak_memory_bytes else "–", ""),
        ]

    columns = ["training time", "events/s", "dense optimizer's share of it", "peak memory of a rank"]
    return _table(comparison, answer, columns, cells)


def _measured(value: Measured | None) -> Cell:
    return ("–", "") if value is None else (spread(value), shown(value.difference))


def _or_by_chance(cell: Cell, chance: Chance | None) -> Cell:
    """What equal arms would show, below the control's steps."""
    if chance is None or not chance.num_pairs:
        return cell
    said = f"by chance {percent(0.0 - chance.steps_saved)}"
    if chance.num_censored:
        said += f"; {chance.num_censored} of {chance.num_pairs} pairs never"
    return cell[0], said


def saved(interval: Interval | None, *, is_bound: bool = False) -> str:
    """A saving as what is added: ``−32.4 % (−40.1 to −20.0)``; ``≥ −32.4 %`` where it is an upper bound."""
    if interval is None:
        return ""
    if is_bound:
        return f"≥ {percent(0.0 - interval.mean)}"
    return shown(Interval(*(0.0 - end for end in (interval.mean, interval.high, interval.low))))  # no -0


def reached(target: Target | None, what: str) -> Cell:
    """Mean over the seeds; ``> N`` where one of them never gets there, since its whole budget counts then."""
    if target is None or not target.reached:
        return "–", ""
    mean = float(np.mean([getattr(one, what) for one in target.reached]))
    text = f"{'> ' * target.is_bound}{mean:,.0f}"
    fewer = saved(target.steps_saved if what == "steps" else target.seconds_saved, is_bound=target.is_bound)
    if not target.num_censored:
        return text, fewer
    never = f"{target.num_censored} of {len(target.reached)} seeds never"
    return text, never if target.num_censored == len(target.reached) or not fewer else f"{fewer}; {never}"


# Protocol -------------------------------------------------------------------------------------------------------------


def _tuning(comparison: Comparison) -> list[dict[str, Any]]:
    """Per budget and arm its trials and, for each rate, what was tuned, what was tried, and which settings it is."""
    found = []
    for budget in comparison.design.budgets:
        arms = [
            _tuned(comparison, arm, budget) for arm in comparison.design.arms if comparison.trials(arm.name, budget)
        ]
        if arms:
            found.append({"budget": f"{budget:g}", "title": budget_name(comparison, budget), "arms": arms})
    return found


def _tuned(comparison: Comparison, arm: Arm, budget: float) -> dict[str, Any]:
    points = tried(comparison.trials(arm.name, budget), comparison.design)
    chosen = best(points, comparison.design)
    grids = grids_of(comparison, arm.name, budget)
    at_edge = {name for name, _ in edges(chosen.rates, grids)} if chosen is not None else set()
    runs = sum(len(point.values) + point.num_lost for point in points)
    rows = []
    for name, grid in grids.items():
        value = chosen.rates.get(name) if chosen is not None else None
        rows.append(
            {
                "name": name,
                "value": "–" if value is None else f"{value:g}",
                "at_edge": name in at_edge,
                "grid": ", ".join(f"{one:g}" for one in grid),
                "settings": ", ".join(arm.rate_settings.get(name, ())),
            }
        )
    return {
        "name": arm.name,
        "trials": f"{len(points)} of {math.prod(map(len, grids.values()))}",
        "runs": f"{runs} runs" if runs > len(points) else "",
        "lost": sum(point.num_lost for point in points),
        "best": "–" if chosen is None else f"{chosen.mean:.4f}",
        "seeds": "" if chosen is None or len(chosen.values) == 1 else f"mean of {len(chosen.values)} seeds",
        "rates": rows,
    }


def _protocol(comparison: Comparison) -> dict[str, Any]:
    design = comparison.design
    hashes = {
        what: sorted({run.sources_hash for run in comparison.current if run.stage == stage and run.sources_hash})
        for what, stage in (("trials", "tune"), ("final runs", "final"))
    }
    arms = [
        {
            "name": arm.name,
            "overrides": [f"{key}={short(value)}" for key, value in arm.overrides.items()],
            "may_differ": list(arm.may_differ),
            "also_differs": list(arm.also_differs),
        }
        for arm in design.arms
    ]
    return {
        "trials": design.trials,
        "leaders": design.leaders,
        "is_tuned_apart": all(comparison.trials(design.control, budget) for budget in design.budgets),
        "tuning_seeds": len(design.tuning_seeds),
        "seeds": ", ".join(map(str, design.seeds)),
        "budgets": ", ".join(budget_name(comparison, budget) for budget in design.budgets),
        "arms": arms,
        "sources": [(what, own) for what, own in hashes.items() if own],
        "devices": sorted({run.device for run in comparison.current if run.device}),
    }


def _fingerprints(comparison: Comparison) -> dict[str, Any]:
    """What the runs of each seed started from: by name a hash for each seed, or which arms started from what."""
    held = [run for run in comparison.current if run.stage == "final" and run.fingerprints]
    seeds = sorted({run.seed for run in held})
    rows = []
    for name in sorted({name for run in held for name in run.fingerprints}):
        cells = []
        for seed in seeds:
            arms: dict[str, dict[str, None]] = {}
            for run in held:
                if run.seed == seed and name in run.fingerprints:
                    arms.setdefault(run.fingerprints[name], {})[run.arm] = None
            cells.append({value: ", ".join(names) for value, names in arms.items()})
        rows.append((name.replace("_", " "), cells))
    return {"seeds": seeds, "rows": rows, "are_equal": all(len(cell) <= 1 for _, cells in rows for cell in cells)}


def _runs(comparison: Comparison) -> list[list[str]]:
    metric = comparison.design.metric
    return [
        [
            run.arm,
            "trial" if run.stage == "tune" else "final",
            f"{run.budget:g}",
            str(run.seed),
            "–" if run.trial is None else str(run.trial),
            ", ".join(f"{name} {value:g}" for name, value in run.rates.items()),
            ("superseded, " if run.superseded else "") + run.status + (f": {short(run.fault)}" if run.fault else ""),
            _number(run.valid, metric),
            _number(run.test, metric),
            f"{run.best_step:,}" if run.best_step else "–",
            duration(run.seconds) if run.seconds else "–",
            run.run,
        ]
        for run in comparison.runs
    ]


def _number(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.4f}" if name in values else "–"
