"""Batches per second of the loader with no model behind, beside its plain twin, a Python loop per user.

python -m benchmarks.loader [--users 200000] [--batch-size 512] [--length 20]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from muonrec.data.candidates import CandidateSampler
from muonrec.data.loader import TrainingBatches, make_batch
from muonrec.data.shards import Sequences
from muonrec.mesh import Ranks


def main() -> None:
    """Time both in turns, and print medians and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--length", type=int, default=20, help="mean events of a user")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--negatives", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sequences = random_sequences(options.users, options.items, options.length)
    sampler = CandidateSampler("uniform", num_items=options.items, count=options.negatives)
    ranks = Ranks(0, 1, torch.device("cpu"))
    loader = TrainingBatches(
        sequences,
        batch_size=options.batch_size,
        max_length=50,
        sampler=sampler,
        needs_targets=True,
        seed=0,
        ranks=ranks,
    )
    steps = min(loader.steps_per_epoch, 50)
    events = sum(loader.share(step).labels.numel() for step in range(steps))
    candidates = {
        "loader, prefetched": lambda: [None for _ in loader.iterate(0, steps)],
        "loader, in the foreground": lambda: [loader.share(step) for step in range(steps)],
        "a Python loop per user": lambda: loop_per_user(sequences, sampler, options.batch_size, steps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(options.rounds):
        for name, run in candidates.items():
            seconds[name].append(timed(run))

    table = Table(
        title=f"{steps} global batches of {options.batch_size} users, {events / steps:,.0f} events each, 1 rank"
    )
    for column in ("", "batches/s", "events/s", "times the loop"):
        table.add_column(column, justify="left" if not column else "right")
    loop = statistics.median(seconds["a Python loop per user"])
    for name, times in seconds.items():
        median = statistics.median(times)
        table.add_row(name, f"{steps / median:,.0f}", f"{events / median:,.0f}", f"{loop / median:.1f}")
    Console().print(table)


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def random_sequences(num_users: int, num_items: int, mean_length: int) -> Sequences:
    """Users of geometric length with random items, in memory."""
    generator = np.random.default_rng(0)
    lengths = 3 + generator.geometric(1 / max(mean_length - 3, 1), num_users)
    values = generator.integers(0, num_items, lengths.sum(), dtype=np.int32)
    ones = np.ones(num_users, dtype=np.int32)
    return Sequences(
        values=values,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        num_train=(lengths - 2).astype(np.int32),
        num_valid=ones,
        num_test=ones,
        user_ids=np.arange(num_users),
        num_items=num_items,
        item_train_counts=np.bincount(values, minlength=num_items),
        manifest=None,  # type: ignore[arg-type]
    )


def loop_per_user(sequences: Sequences, sampler: CandidateSampler, batch_size: int, num_steps: int) -> None:
    """The plain twin: the same arrays, a user at a time."""
    order = np.random.default_rng(0).permutation(len(sequences.user_ids))
    for step in range(num_steps):
        users = order[step * batch_size : (step + 1) * batch_size]
        rows = []
        for user in users:
            first = sequences.offsets[user]
            rows.append(sequences.values[first : first + sequences.num_train[user]][-51:].tolist())
        rows.sort(key=len, reverse=True)
        labels = np.array([item for row in rows for item in row[1:]], dtype=np.int64)
        make_batch(
            history=np.array([item for row in rows for item in row[:-1]], dtype=np.int64),
            lengths=np.array([len(row) - 1 for row in rows]),
            labels=labels,
            targets=labels,
            candidates=sampler.shared(step),
            log_q=np.empty(0, dtype=np.float32),
            user_ids=users,
            num_items=sequences.num_items,
            step=step,
        )


if __name__ == "__main__":
    main()
