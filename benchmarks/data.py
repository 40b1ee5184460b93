"""Time and peak memory of the data stage on synthetic logs of stated sizes.

    python -m benchmarks.data --events 1000000 10000000 100000000 --logs /scratch/logs

What is timed is `build_dataset`: hashing and reading the Parquet log, distinct to split, writing shards and manifest.
Each size runs in a process of its own, whose peak RSS is the figure: reader, database and writer together. CPU seconds
count all threads: on two cores the stage takes at least half of them. The log is written beforehand, streamed, by
another process: it costs neither time nor memory here, and with --logs it is kept.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from muonrec.data.events import EVENT_SCHEMA
from muonrec.data.synthetic import SyntheticSource, read_synthetic
from pipeline.data import DataConfig, build_dataset

_COLUMNS = {
    "events": "source_events",
    "log MiB": "log_mib",
    "read/s": "read_events_per_s",
    "order/s": "order_events_per_s",
    "write/s": "write_events_per_s",
    "whole stage/s": "total_events_per_s",
    "seconds": "seconds",
    "CPU s": "cpu_s",
    "peak RSS MiB": "peak_rss_mib",
    "of it imports": "imported_mib",
}


def write_log(num_events: int, num_items: int, path: Path) -> None:
    """Stream a synthetic log of about ``num_events`` to one Parquet file, unless it is there."""
    if path.exists():
        return
    source = SyntheticSource(format="synthetic", num_users=num_events // 20, num_items=num_items, num_clusters=200)
    partial = path.with_suffix(".partial")
    with pq.ParquetWriter(partial, EVENT_SCHEMA) as writer:
        for batch in read_synthetic(source):
            writer.write_batch(batch)
    partial.replace(path)


def time_stage(log: Path, folder: Path, k_core: int, memory_limit: str) -> dict[str, float]:
    """Build the data set in this process; returns its rates and the peak RSS in MiB."""
    config = DataConfig.model_validate(
        {
            "source": {"format": "parquet", "path": str(log)},
            "output": folder,
            "k_core": k_core,
            "memory_limit": memory_limit,
        }
    )
    imported_mib = _peak_rss_mib()
    started, cpu_started = time.perf_counter(), time.process_time()
    manifest = build_dataset(config)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    return {
        **manifest.rates,
        "source_events": manifest.num_source_events,
        "log_mib": log.stat().st_size / 2**20,
        "seconds": seconds,
        "cpu_s": cpu_s,
        "peak_rss_mib": _peak_rss_mib(),
        "imported_mib": imported_mib,
    }


def main() -> None:
    """Run all sizes and print a table."""
    parser = argparse.ArgumentParser(description="Time and peak memory of python -m pipeline.data.")
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000], help="sizes of the logs")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--k-core", type=int, default=5)
    parser.add_argument("--memory-limit", default="4GiB", help="of DuckDB")
    parser.add_argument("--logs", type=Path, help="keep the logs in this folder, and use those that are there")
    options = parser.parse_args()

    table = Table(
        title=f"pipeline.data: {options.items:,} items, k_core={options.k_core}, memory_limit={options.memory_limit}"
    )
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for num_events in options.events:
        with tempfile.TemporaryDirectory(dir=options.logs) as scratch:
            log = (options.logs or Path(scratch)) / f"events-{num_events}-items-{options.items}.parquet"
            _in_own_process(write_log, num_events, options.items, log)
            figures = _in_own_process(time_stage, log, Path(scratch) / "data", options.k_core, options.memory_limit)
            table.add_row(*(f"{figures[figure]:,.0f}" for figure in _COLUMNS.values()))
    Console(width=140).print(table)


def _in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


if __name__ == "__main__":
    main()
