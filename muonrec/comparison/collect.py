"""What a run left in its folder, as one row of the results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from muonrec.comparison.results import RunResult, Spectrum
from muonrec.runlog import read_metrics
from muonrec.runs import FINGERPRINTS, SPECTRA, RunRecord, read_run


def collect(folder: Path, run: RunResult, metric: str) -> tuple[RunResult, dict[str, np.ndarray] | None]:
    """Fill in what ``run`` left in ``folder``, however far it came.

    Args:
        folder: of the run.
        run: who it is and how it ended.
        metric: the main one, such as ``ndcg@10``.

    Returns:
        The run, and the columns of ``targets.parquet`` if its test targets were ranked.

    Raises:
        ValueError: a file in the folder is damaged.
    """
    if not (folder / "resolved.yaml").is_file():
        return run, None
    record = read_run(folder)
    points = [point for point in record.validation if f"valid_{metric}" in point]
    best = max(points, key=lambda point: point[f"valid_{metric}"], default={})
    fingerprints = folder / FINGERPRINTS
    run = dataclasses.replace(
        run,
        valid={key.removeprefix("valid_"): value for key, value in best.items() if key.startswith("valid_")},
        best_step=best.get("step", 0),
        curve_step=tuple(point["step"] for point in points),
        curve_seconds=tuple(point["seconds"] for point in points),
        curve_value=tuple(point[f"valid_{metric}"] for point in points),
        peak_memory_bytes=max((point.get("peak_memory_bytes", 0) for point in points), default=0),
        fingerprints=json.loads(fingerprints.read_text()) if fingerprints.is_file() else {},
        spectra=_spectra(folder / SPECTRA),
        **_speed(record),
    )
    if run.stage == "tune" or not record.metrics or record.ranked is None:
        return run, None
    columns = record.ranked.columns
    targets = {name: column for name, column in columns.items() if name not in ("num_greater", "num_equal")}
    run = dataclasses.replace(
        run,
        test={name: value["mean"] for name, value in record.metrics["metrics"].items()},
        device=record.metrics["device"],
        num_greater=columns["num_greater"].astype(np.int32),
        num_equal=columns["num_equal"].astype(np.int32),
    )
    return run, targets


def _speed(record: RunRecord) -> dict[str, Any]:
    """Seconds of training, targets a second and the optimizer's share, over all that was logged."""
    lines = record.training
    if not lines:
        return {}
    laps = np.diff([0.0, *(line["seconds"] for line in lines)])
    seconds = float(lines[-1]["seconds"])
    targets = float(sum(lap * line["events_per_s"] for lap, line in zip(laps, lines, strict=True)))
    optimizer_s = sum(line.get("optimizer_s", 0.0) for line in lines)
    return {
        "seconds": seconds,
        "events_per_s": targets / max(seconds, 1e-9),
        "optimizer_share": optimizer_s / max(seconds, 1e-9),
    }


def _spectra(path: Path) -> tuple[Spectrum, ...]:
    if not path.is_file():
        return ()
    found = {(line["step"], line["name"], line["what"]): line for line in read_metrics(path)}
    return tuple(Spectrum(**{**line, "singular_values": tuple(line["singular_values"])}) for line in found.values())
