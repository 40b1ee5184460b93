"""Milliseconds of a training step as the item table grows and the batch stays, on one rank.

python -m benchmarks.table_rows [--rows 100000 1000000 10000000] [--width 64] [--batch-size 256]

The table is FBGEMM's with row-wise Adagrad fused into the backward pass. Ids are uniform over the rows, which is the
worst case: hardly a row is met twice, or is in a cache. "table" is the lookup and the fused update without the tower;
beside it the plain twin, `nn.Embedding` under `torch.optim.Adagrad`, whose step walks over every row there is. Times
are of the processor, so that what else runs on a shared machine counts less; wall-clock is given too.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from muonrec.batch import SequenceBatch
from muonrec.data.loader import make_batch
from muonrec.embeddings.fused import check_tables
from muonrec.embeddings.joined import build_optimizer
from muonrec.embeddings.sharding import shard_model
from muonrec.embeddings.tables import TableConfig
from muonrec.losses import NextItemLoss
from muonrec.mesh import Ranks, join_ranks
from muonrec.models import SASRec, SASRecConfig
from muonrec.runlog import configure_logging

# Larger plain twins would take most of the time and teach nothing new.
_MOST_PLAIN_ROWS = 1_000_000

_NUM_BATCHES = 8


def main() -> None:
    """Time all sizes in turns, and print medians and their ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table_rows", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64, help="users, each with 50 events")
    parser.add_argument("--negatives", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    configure_logging()
    sizes = within_memory(options.rows, options.width)
    with join_ranks() as ranks:
        steps: dict[tuple[int, str], Callable[[], None]] = {}
        for rows in sizes:
            batches = [make_up(rows, options, seed) for seed in range(_NUM_BATCHES)]
            steps[rows, "step"], steps[rows, "table"] = training_steps(rows, options.width, batches, ranks)
            if rows <= _MOST_PLAIN_ROWS:
                steps[rows, "plain"] = plain_step(rows, options.width, batches)
        times: dict[tuple[int, str], list[tuple[float, float]]] = {key: [] for key in steps}
        for _ in range(options.rounds):
            for key, step in steps.items():
                times[key].append(timed(step))

    title = f"{options.batch_size} users x 50 events, {options.negatives:,} negatives, width {options.width}"
    table = Table(title=f"{title}; medians of {options.rounds}, in turns", caption="milliseconds")
    for column in ("rows", "GiB", "step", "ratio", "quartiles", "wall", "table", "plain table"):
        table.add_column(column, justify="right", no_wrap=True)
    medians = {key: statistics.median(seconds for seconds, _ in found) for key, found in times.items()}
    for rows in sizes:
        low, _, high = statistics.quantiles([seconds for seconds, _ in times[rows, "step"]], n=4)
        table.add_row(
            f"{rows:,}",
            f"{table_bytes(rows, options.width) / 2**30:.2f}",
            f"{1000 * medians[rows, 'step']:.1f}",
            f"{medians[rows, 'step'] / medians[sizes[0], 'step']:.2f}",
            f"{1000 * low:.0f}-{1000 * high:.0f}",
            f"{1000 * statistics.median(wall for _, wall in times[rows, 'step']):.1f}",
            f"{1000 * medians[rows, 'table']:.1f}",
            f"{1000 * medians[rows, 'plain']:.1f}" if (rows, "plain") in medians else "not run",
        )
    Console(width=100).print(table)


def timed(step: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the processor and of the clock for one call."""
    processor, clock = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - processor, time.perf_counter() - clock


def table_bytes(rows: int, width: int) -> int:
    """Float32 rows and their float32 of state."""
    return rows * (width + 1) * 4


def within_memory(sizes: list[int], width: int) -> list[int]:
    """The sizes, smallest first, that together take at most half of the memory there is; says what is left out."""
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    sizes = sorted(sizes)
    totals = itertools.accumulate(table_bytes(rows, width) for rows in sizes)
    kept = [rows for rows, total in zip(sizes, totals, strict=True) if total <= available / 2]
    for rows in sizes[len(kept) :]:
        print(f"left out: {rows:,} rows, for want of memory ({table_bytes(rows, width) / 2**30:.1f} GiB)")
    if not kept:
        raise SystemExit("no size fits into half of the memory that is available; pass smaller --rows")
    return kept


def make_up(num_items: int, options: argparse.Namespace, seed: int) -> SequenceBatch:
    """A batch of full histories over all rows; as many ids and distinct shapes whatever the table."""
    generator = np.random.default_rng(seed)
    lengths = np.full(options.batch_size, 50)
    history, labels = (generator.integers(0, num_items, lengths.sum()) for _ in range(2))
    return make_batch(
        history=history,
        lengths=lengths,
        labels=labels,
        targets=labels,
        candidates=generator.integers(0, num_items, options.negatives),
        log_q=np.empty(0, dtype=np.float32),
        user_ids=np.arange(options.batch_size),
        num_items=num_items,
        step=seed,
    )


def training_steps(
    rows: int, width: int, batches: list[SequenceBatch], ranks: Ranks
) -> tuple[Callable[[], None], Callable[[], None]]:
    """SASRec's forward pass, backward pass with the fused update, and Muon; and the same of its table alone."""
    torch.manual_seed(0)
    config = SASRecConfig(embedding_dim=width, dropout=0.0)
    tables = {"item": TableConfig(lr=0.1, sharding="row_wise")}
    model = SASRec(config, num_items=rows, loss=NextItemLoss("sampled_softmax"))
    dmp, _ = shard_model(model, tables, dense="ddp", ranks=ranks, batch_size=len(batches[0].user_ids))
    check_tables(dmp, tables)
    optimizer = build_optimizer(dmp, muon={"lr": 1e-3}, adamw={"lr": 1e-3})
    endless = itertools.cycle(batches)
    dmp.train()

    def step() -> None:
        optimizer.zero_grad()
        loss, _ = dmp(next(endless))
        loss.backward()
        optimizer.step()

    def table_step() -> None:
        embedded = dmp.module.embeddings(next(endless).features)
        sum(rows.values().square().mean() for rows in embedded.values()).backward()

    for warm_up in (step, step, table_step):
        warm_up()
    return step, table_step


def plain_step(rows: int, width: int, batches: list[SequenceBatch]) -> Callable[[], None]:
    """The same lookups in a table whose gradient and optimizer are dense."""
    table = nn.Embedding(rows, width)
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.1)
    endless = itertools.cycle(batches)

    def step() -> None:
        optimizer.zero_grad()
        table(next(endless).features.values()).square().mean().backward()
        optimizer.step()

    step()
    return step


if __name__ == "__main__":
    main()
