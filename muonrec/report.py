"""The report: one self-contained HTML page over finished runs, its sentences written from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from muonrec.figures import figure_style, line_styles, max_ticks, reach, subplots, svg
from muonrec.page import duration, percent, pretty, short, times, write_page
from muonrec.runs import RunRecord, first_reaching, paired_differences

REPORT = "report.html"

_PARTS = {
    "lr_tables": "tables",
    "lr_muon": "matrices, by Muon",
    "lr_matrices": "matrices, by AdamW",
    "lr_adamw": "the rest, by AdamW",
}


def write_report(
    folder: str | Path, runs: Sequence[RunRecord], *, main_metric: str = "ndcg@10", title: str | None = None
) -> Path:
    """Write ``report.html`` over ``runs`` into ``folder``; the first run is the control of every comparison.

    Args:
        folder: existing or not.
        runs: at least one; those that were not evaluated yet appear in the curves only.
        main_metric: of the headline, the curves and the breakdowns.
        title: of the page; the runs' names unless given.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        ValueError: no run was given.
    """
    if not runs:
        raise ValueError("a report of no runs was asked; pass at least one from muonrec.runs.read_run")
    valid_key = _valid_key(runs, main_metric)
    differences = _differences(runs, main_metric)
    with figure_style():
        figures = _figures(runs, valid_key, main_metric)
    return write_page(
        Path(folder) / REPORT,
        "report.html.j2",
        title=title or _title(runs),
        headline=headline(runs, differences, main_metric),
        results=_results(runs, main_metric),
        differences=differences,
        targets=_steps_to_target(runs, valid_key),
        valid_name=valid_key.removeprefix("valid_"),
        control=runs[0].name,
        figures=figures,
        breakdowns=_breakdowns(runs, main_metric),
        main_metric=main_metric,
        runs=[_facts(run, valid_key, style) for run, style in zip(runs, line_styles(len(runs)), strict=True)],
        config_names=[run.name for run in runs],
        config_differences=config_differences(runs),
        texts={title: _texts(runs, key) for title, key in (("Routing", "routing"), ("Sharding plan", "plan"))},
        versions=_versions(runs),
    )


# Sentences and tables -------------------------------------------------------------------------------------------------


def _title(runs: Sequence[RunRecord]) -> str:
    if len(runs) <= 2:
        return " against ".join(run.name for run in reversed(runs))
    return f"{len(runs) - 1} runs against {runs[0].name}"


def headline(runs: Sequence[RunRecord], differences: Sequence[Mapping[str, Any]], main_metric: str) -> str:
    """Say in two or three sentences how the last run does, and where it stands to the control."""
    arm, control = runs[-1], runs[0]
    if not arm.metrics:
        return f"{arm.name} has not been evaluated yet; below is how it trained."
    if main_metric not in arm.metrics["metrics"]:
        return f"{arm.name} was evaluated without {main_metric}; run python -m pipeline.eval with that length among k."
    value = arm.metrics["metrics"][main_metric]
    name = main_metric.upper()
    sentences = [
        f"{arm.name} reaches {name} {value['mean']:.4f} (95 % interval {value['low']:.4f} to {value['high']:.4f}) "
        f"on the {arm.metrics['part']} items of {arm.metrics['num_users']:,} users, ranked against all "
        f"{arm.metrics['num_items']:,} items{' but those the user has seen' if arm.metrics['mask_seen'] else ''}"
    ]
    popularity = arm.metrics["popularity"]["metrics"][main_metric]["mean"]
    if popularity > 0:
        sentences[0] += f": {times(value['mean'] / popularity)} what ranking by popularity reaches"
    best = (arm.metrics.get("best_possible") or {}).get(main_metric)
    if best:
        sentences[0] += f", {100 * value['mean'] / best:.0f} % of the best possible"
    for row in differences:
        if row["arm"] == arm.name and row["metric"] == main_metric:
            if row["fault"]:
                sentences.append(f"It cannot be paired with {control.name}: {row['fault']}")
            elif row["interval"].contains_zero:
                sentences.append(
                    f"No difference to {control.name} is shown: {percent(row['interval'].mean)}, "
                    f"95 % interval {percent(row['interval'].low)} to {percent(row['interval'].high)}"
                )
            else:
                word = "better" if row["interval"].mean > 0 else "worse"
                sentences.append(
                    f"It is {100 * abs(row['interval'].mean):.1f} % {word} than {control.name} (paired "
                    f"over users, 95 % interval {percent(row['interval'].low)} to {percent(row['interval'].high)})"
                )
    return ". ".join(sentences) + "."


def config_differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, each with its value per run; where a run was written is none."""
    keys = sorted({key for run in runs for key in run.config} - {"output"})
    rows = [(key, [short(run.config.get(key, "–")) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _results(runs: Sequence[RunRecord], main_metric: str) -> dict[str, Any]:
    """Rows of the results table: each evaluated run, and per protocol popularity and the best possible."""
    evaluated = [run for run in runs if run.metrics]
    names = list(dict.fromkeys(name for run in evaluated for name in run.metrics["metrics"]))
    # mrr at several lengths says what ndcg says: metrics.json has it, the table would grow past the page.
    names = [name for name in names if not name.startswith("mrr@") or name == main_metric]
    names.sort(key=lambda name: (name != main_metric, ("ndcg", "recall", "mrr").index(name.partition("@")[0])))
    wanted = f"coverage@{main_metric.partition('@')[2]}"
    coverages = [wanted] if any(wanted in run.metrics["coverage"] for run in evaluated) else []
    rows, protocols = [], []
    for run in evaluated:
        rows.append(_result_row(run.name, run.metrics, "run"))
        protocol = [run.metrics[key] for key in ("part", "mask_seen", "num_users", "num_items")]
        if protocol not in protocols:
            protocols.append(protocol)
            rows.append(_result_row("popularity", run.metrics["popularity"], "reference"))
            if best := run.metrics.get("best_possible"):
                cells = {name: {"mean": value} for name, value in best.items() if name in names}
                rows.append(_result_row("best possible", {"metrics": cells, "coverage": {}}, "reference"))
    rows.sort(key=lambda row: row["kind"] != "run")
    # No bold face for the largest number of a column: whether it is larger is for the paired intervals to say.
    notes = [
        f"{part} items of {users:,} users, full ranking over {items:,} items, "
        + ("items seen before left out" if masked else "items seen before included")
        for part, masked, users, items in protocols
    ]
    return {"names": names, "coverages": coverages, "rows": rows, "notes": notes}


def _result_row(name: str, metrics: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "metrics": metrics["metrics"], "coverage": metrics["coverage"]}


def _differences(runs: Sequence[RunRecord], main_metric: str) -> list[dict[str, Any]]:
    control, rows = runs[0], []
    for arm in runs[1:]:
        names = list(dict.fromkeys([main_metric, "ndcg@10", "recall@10"]))
        if not any(run.ranked is not None and run.ranked.list_length for run in (control, arm)):
            names.append("mrr")
        try:
            intervals = paired_differences(control, arm, names)
        except ValueError as error:
            rows.append({"arm": arm.name, "metric": main_metric, "fault": str(error), "interval": None, "verdict": ""})
            continue
        for name, interval in intervals.items():
            verdict = "no difference shown" if interval.contains_zero else "better" if interval.mean > 0 else "worse"
            cells = {part: percent(value) for part, value in interval._asdict().items()}
            row: dict[str, Any] = {"arm": arm.name, "metric": name, "fault": "", "cells": cells}
            rows.append(row | {"interval": interval, "verdict": verdict})
    return rows


def _steps_to_target(runs: Sequence[RunRecord], valid_key: str) -> list[dict[str, Any]]:
    """When each run first reaches 99 % and 100 % of the control's best validation value."""
    best = max((point[valid_key] for point in runs[0].validation if valid_key in point), default=None)
    if best is None or len(runs) < 2:
        return []
    rows = []
    for run in runs:
        row: dict[str, Any] = {"name": run.name, "cells": []}
        for share in (0.99, 1.0):
            point = first_reaching(run.validation, valid_key, share * best)
            row["cells"].append(
                "not reached" if point is None else f"step {point['step']:,} · {duration(point.get('seconds'))}"
            )
        rows.append(row)
    return rows


def _facts(run: RunRecord, valid_key: str, style: Mapping[str, Any]) -> dict[str, Any]:
    last = run.training[-1] if run.training else {}
    rates = [line["events_per_s"] for line in run.training if "events_per_s" in line]
    points = [point for point in run.validation if valid_key in point]
    best = max(points, key=lambda point: point[valid_key], default=None)
    return {
        "name": run.name,
        "colour": style["color"],
        "steps": f"{last['step']:,}" if last else "–",
        "seconds": duration(last.get("seconds")),
        "rate": f"{np.median(rates):,.0f}" if rates else "–",
        "loss": f"{last['loss_nats']:.3f}" if last else "–",
        "best": f"{best[valid_key]:.4f} at step {best['step']:,}" if best else "–",
        "checkpoint": f"step {run.metrics['checkpoint_step']:,}"
        if run.metrics.get("checkpoint_step") is not None
        else "–",
        "eval_rate": f"{run.metrics['users_per_s']:,.0f}" if run.metrics.get("users_per_s") else "–",
    }


def _breakdowns(runs: Sequence[RunRecord], main_metric: str) -> list[dict[str, Any]]:
    """Per breakdown: its groups, with the users and the main metric of each run."""
    evaluated = [run for run in runs if run.metrics.get("breakdowns")]
    tables = []
    for title in dict.fromkeys(title for run in evaluated for title in run.metrics["breakdowns"]):
        holders = [run for run in evaluated if title in run.metrics["breakdowns"]]
        labels = list(dict.fromkeys(row["group"] for run in holders for row in run.metrics["breakdowns"][title]))
        rows = []
        for label in labels:
            found: list[dict[str, Any]] = [
                next((r for r in run.metrics["breakdowns"][title] if r["group"] == label), {}) for run in holders
            ]
            cells = [row.get(main_metric) for row in found]
            if not any(row.get("num_users") for row in found):
                continue
            label = label.replace("<=", "≤ ").replace(">", "> ").replace("-", "–")
            rows.append({"group": label, "num_users": max(row.get("num_users", 0) for row in found), "cells": cells})
        tables.append({"title": title, "names": [run.name for run in holders], "rows": rows})
    return tables


def _texts(runs: Sequence[RunRecord], key: str) -> list[dict[str, str]]:
    """Each distinct text once, under the names of the runs that share it."""
    texts: dict[str, list[str]] = {}
    for run in runs:
        if getattr(run, key).strip():
            texts.setdefault(getattr(run, key).rstrip(), []).append(run.name)
    return [{"names": ", ".join(names), "text": text} for text, names in texts.items()]


def _versions(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    names = sorted({name for run in runs for name in run.metrics.get("versions", {})})
    return [(name, [str(run.metrics.get("versions", {}).get(name, "–")) for run in runs]) for name in names]


def _valid_key(runs: Sequence[RunRecord], main_metric: str) -> str:
    """The validation value that the curves show: the main metric's, or the first that was logged."""
    keys = [key for run in runs for point in run.validation for key in point if key.startswith("valid_")]
    wanted = f"valid_{main_metric}"
    return wanted if wanted in keys or not keys else next((key for key in keys if "ndcg" in key), keys[0])


# Figures --------------------------------------------------------------------------------------------------------------


def _figures(runs: Sequence[RunRecord], valid_key: str, main_metric: str) -> dict[str, str]:
    """SVG text by name; a figure that would be empty is an empty text."""
    return {
        "results": _draw_results(runs, main_metric),
        "validation": _draw_validation(runs, valid_key),
        "loss": _draw_loss(runs),
        "rates": _draw_rates(runs),
        "breakdowns": _draw_breakdowns(runs, main_metric),
    }


def _draw_results(runs: Sequence[RunRecord], main_metric: str) -> str:
    rows = [
        (run.name, run.metrics["metrics"][main_metric], style)
        for run, style in zip(runs, line_styles(len(runs)), strict=True)
        if main_metric in run.metrics.get("metrics", {})
    ]
    if not rows:
        return ""
    figure, [[axis]] = subplots(1, height=0.9 + 0.32 * (len(rows) + 1))
    metrics = next(run.metrics for run in runs if run.metrics)
    for place, (_, value, style) in enumerate(rows):
        axis.errorbar(value["mean"], place, xerr=reach(value), fmt="o", color=style["color"], capsize=4, markersize=6)
    popularity = metrics["popularity"]["metrics"][main_metric]
    axis.errorbar(popularity["mean"], len(rows), xerr=reach(popularity), fmt="s", color="#888888", capsize=4)
    if best := (metrics.get("best_possible") or {}).get(main_metric):
        axis.axvline(best, color="#888888", linestyle="--")
        axis.annotate("best possible", (best, len(rows)), (-6, 0), textcoords="offset points", ha="right", va="center")
    axis.set_yticks(range(len(rows) + 1), [name for name, _, _ in rows] + ["popularity"])
    axis.set_ylim(len(rows) + 0.6, -0.6)
    axis.set_xlim(left=0)
    axis.set_xlabel(f"{pretty(main_metric)} on the {metrics['part']} items, 95 % interval")
    axis.grid(visible=False, axis="y")
    return svg(figure)


def _draw_validation(runs: Sequence[RunRecord], valid_key: str) -> str:
    if not any(valid_key in point for run in runs for point in run.validation):
        return ""
    timed = any("seconds" in point for run in runs for point in run.validation)
    figure, [axes] = subplots(1 + timed, height=3.4, sharey=True)
    for run, style in zip(runs, line_styles(len(runs)), strict=True):
        points = [point for point in run.validation if valid_key in point]
        marker = {"marker": "o", "markersize": 3.5} if len(points) <= 60 else {}
        axes[0].plot([p["step"] for p in points], [p[valid_key] for p in points], label=run.name, **style, **marker)
        if timed:
            points = [point for point in points if "seconds" in point]
            axes[1].plot([p["seconds"] for p in points], [p[valid_key] for p in points], **style, **marker)
    best = max((point[valid_key] for point in runs[0].validation if valid_key in point), default=None)
    for axis, label in zip(axes, ("training step", "training time (s)"), strict=False):
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        if best is not None and len(runs) > 1:
            axis.axhline(best, color="#888888", linewidth=1, linestyle=(0, (1, 2)))
    if best is not None and len(runs) > 1:
        axes[0].annotate(
            f"best of {runs[0].name}",
            (0.02, best),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
        )
    axes[0].set_ylabel(f"validation {pretty(valid_key.removeprefix('valid_'))}")
    axes[0].legend(loc="lower right")
    return svg(figure)


def _draw_loss(runs: Sequence[RunRecord]) -> str:
    if not any(run.training for run in runs):
        return ""
    figure, [[axis]] = subplots(1, height=3.2)
    for run, style in zip(runs, line_styles(len(runs)), strict=True):
        steps = np.array([line["step"] for line in run.training])
        loss = np.array([line["loss_nats"] for line in run.training])
        window = len(loss) // 40
        if window > 1:  # the eye wants the course, the raw line shows that smoothing hides nothing
            axis.plot(steps, loss, **(style | {"linewidth": 0.6, "alpha": 0.35}))
            kernel = np.ones(window) / window
            steps, loss = steps[window - 1 :], np.convolve(loss, kernel, mode="valid")
        axis.plot(steps, loss, label=run.name, **style)
    finite = np.array([line["loss_nats"] for run in runs for line in run.training])
    finite = finite[np.isfinite(finite)]
    if finite.size:  # the fall of the first steps would flatten everything after it
        low, high = finite.min(), np.quantile(finite, 0.98)
        margin = 0.05 * (high - low) or 0.1
        axis.set_ylim(low - margin, high + 2 * margin)
    axis.set_xlabel("training step")
    axis.set_ylabel("training loss (nats per target)")
    axis.set_xlim(left=0)
    axis.legend(loc="upper right")
    return svg(figure)


def _draw_rates(runs: Sequence[RunRecord]) -> str:
    keys = sorted({key for run in runs for line in run.training for key in line if key.startswith("lr_")})
    if not keys:
        return ""
    figure, [axes] = subplots(len(keys), height=2.7)
    for axis, key in zip(axes, keys, strict=True):
        for index, (run, style) in enumerate(zip(runs, line_styles(len(runs)), strict=True)):
            lines = [line for line in run.training if line.get(key) is not None]
            if lines:  # equal rates lie on one another: the later are thinner, so that all are seen
                style = style | {"linewidth": 1.5 + 2.0 * (len(runs) - 1 - index) / max(len(runs) - 1, 1)}
                axis.plot([line["step"] for line in lines], [line[key] for line in lines], label=run.name, **style)
        axis.set_title(_PARTS.get(key, key.removeprefix("lr_")))
        axis.set_xlabel("training step")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(max_ticks(5))
        axis.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3)
    axes[0].set_ylabel("learning rate")
    return svg(figure)


def _draw_breakdowns(runs: Sequence[RunRecord], main_metric: str) -> str:
    styles = {run.name: style for run, style in zip(runs, line_styles(len(runs)), strict=True)}
    tables = _breakdowns(runs, main_metric)
    if not any(cell for table in tables for row in table["rows"] for cell in row["cells"]):
        return ""
    figure, [axes] = subplots(len(tables), height=3.0, sharey=True)
    for axis, table in zip(axes, tables, strict=True):
        labels = [f"{row['group']}\n({row['num_users']:,})" for row in table["rows"]]
        for index, name in enumerate(table["names"]):
            shift = 0.5 * ((index + 0.5) / len(table["names"]) - 0.5)
            known = [
                (place + shift, row["cells"][index]) for place, row in enumerate(table["rows"]) if row["cells"][index]
            ]
            axis.errorbar(
                [place for place, _ in known],
                [cell["mean"] for _, cell in known],
                yerr=np.concatenate([reach(cell) for _, cell in known], axis=1) if known else None,
                fmt="o",
                markersize=5,
                capsize=3,
                color=styles[name]["color"],
                label=name,
            )
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlim(-0.6, len(labels) - 0.4)
        axis.set_xlabel(f"{table['title']} (users)")
        axis.grid(visible=False, axis="x")
    # Set once all is drawn, since the panels share it; a little below zero, so that a zero is seen whole.
    highest = max(cell["high"] for table in tables for row in table["rows"] for cell in row["cells"] if cell) or 1.0
    axes[0].set_ylim(-0.03 * highest, 1.06 * highest)
    axes[0].set_ylabel(f"{pretty(main_metric)}, 95 % interval")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return svg(figure)
