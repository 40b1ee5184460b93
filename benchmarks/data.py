"""Time and peak memory of the data stage on synthetic logs of stated sizes.

    python -m benchmarks.data --events 1000000 5000000 --memory-limit 1GiB

The log is written to Parquet first, untimed, so that what is timed is reading, ordering and writing; the generator has
its own column. Each size runs in a process of its own: peak RSS is a property of a process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from muonrec.data.events import EVENT_SCHEMA
from muonrec.data.synthetic import SyntheticSource, read_synthetic
from pipeline.data import DataConfig, build_dataset


def write_log(source: SyntheticSource, path: Path) -> tuple[int, float]:
    """Write the log to one Parquet file; returns its number of events and how many were generated per second."""
    num_events, generating_s = 0, 0.0
    with pq.ParquetWriter(path, EVENT_SCHEMA) as writer:
        batches, started = read_synthetic(source), time.perf_counter()
        for batch in batches:
            generating_s += time.perf_counter() - started
            writer.write_batch(batch)
            num_events += len(batch)
            started = time.perf_counter()
    return num_events, num_events / generating_s


def time_stage(log: str, folder: str, k_core: int, memory_limit: str) -> dict[str, float]:
    """Build the data set in this process; returns its rates and the peak RSS in MiB."""
    config = DataConfig.model_validate(
        {"source": {"format": "parquet", "path": log}, "output": folder, "k_core": k_core, "memory_limit": memory_limit}
    )
    imported_mib = _peak_rss_mib()
    started = time.perf_counter()
    manifest = build_dataset(config)
    seconds = time.perf_counter() - started
    return {**manifest.rates, "seconds": seconds, "peak_rss_mib": _peak_rss_mib(), "imported_mib": imported_mib}


def main() -> None:
    """Run all sizes and print a table."""
    parser = argparse.ArgumentParser(description="Time and peak memory of python -m pipeline.data.")
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000], help="sizes of the logs")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--k-core", type=int, default=5)
    parser.add_argument("--memory-limit", default="1GiB", help="of DuckDB")
    options = parser.parse_args()

    table = Table(
        title=f"pipeline.data: {options.items:,} items, k_core={options.k_core}, memory_limit={options.memory_limit}"
    )
    names = [
        "events",
        "log MiB",
        "generate/s",
        "read/s",
        "order/s",
        "write/s",
        "whole stage/s",
        "seconds",
        "peak RSS MiB",
        "of it imports",
    ]
    for name in names:
        table.add_column(name, justify="right")
    for num_events in options.events:
        with tempfile.TemporaryDirectory() as scratch:
            source = SyntheticSource(
                format="synthetic", num_users=num_events // 20, num_items=options.items, num_clusters=200
            )
            log = Path(scratch) / "log.parquet"
            written, generated_per_s = write_log(source, log)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rates = pool.apply(
                    time_stage, (str(log), str(Path(scratch) / "data"), options.k_core, options.memory_limit)
                )
            figures = [
                written,
                log.stat().st_size / 2**20,
                generated_per_s,
                rates["read_events_per_s"],
                rates["order_events_per_s"],
                rates["write_events_per_s"],
                rates["total_events_per_s"],
                rates["seconds"],
                rates["peak_rss_mib"],
                rates["imported_mib"],
            ]
            table.add_row(*(f"{figure:,.0f}" for figure in figures))
    Console(width=140).print(table)


def _peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


if __name__ == "__main__":
    main()
