"""For how long training stands still at a checkpoint, written in place and beside the training.

torchrun --nproc-per-node 2 -m benchmarks.checkpoint [--rows 500000] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from benchmarks.loader import random_sequences
from muonrec import checkpoint
from muonrec.batch import SequenceBatch
from muonrec.data.candidates import CandidateSampler
from muonrec.data.loader import TrainingBatches
from muonrec.embeddings.joined import build_optimizer
from muonrec.embeddings.sharding import shard_model
from muonrec.embeddings.tables import TableConfig, initialize_tables
from muonrec.losses import NextItemLoss
from muonrec.mesh import Ranks, join_ranks
from muonrec.models import SASRec, SASRecConfig


def main() -> None:
    """Train the same steps without checkpoints, with them in place and with them beside, and print the pauses."""
    parser = argparse.ArgumentParser(prog="torchrun -m benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500_000, help="of the item table")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--folder", type=Path, help="on the disk to be written; the system's temporary folder if none")
    options = parser.parse_args()
    with join_ranks() as ranks:
        measure(options, ranks)


def measure(options: argparse.Namespace, ranks: Ranks) -> None:
    """Of each way: median pause and total seconds; rank 0 prints."""
    sequences = random_sequences(20_000, options.rows, 20)
    config = SASRecConfig(embedding_dim=options.dim, max_length=50)
    model = SASRec(config, num_items=options.rows, loss=NextItemLoss("sampled_softmax"))
    model, _ = shard_model(model, {"item": TableConfig(lr=0.1)}, dense="ddp", ranks=ranks, batch_size=256)
    initialize_tables(model, std={"item": 0.02}, seed=0)
    optimizer = build_optimizer(model, muon={"lr": 3e-3}, adamw={"lr": 1e-3})
    sampler = CandidateSampler("uniform", num_items=options.rows, count=256)
    loader = TrainingBatches(
        sequences, batch_size=256, max_length=50, sampler=sampler, needs_targets=True, seed=0, ranks=ranks
    )
    pipeline = TrainPipelineSparseDist(model, optimizer, ranks.device)
    model.train()

    batches: Iterator[SequenceBatch] = loader.iterate(0, 3 * options.steps + 10)
    for _ in range(5):
        pipeline.progress(batches)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as mine:
        shared = [mine]
        dist.broadcast_object_list(shared)
        for name, asynchronous in (("no checkpoints", None), ("in place", False), ("asynchronous", True)):
            root, pauses = Path(shared[0]) / name, []
            started_s = time.perf_counter()
            with checkpoint.Writer(root, keep=1, asynchronous=bool(asynchronous)) as writer:
                for step in range(1, options.steps + 1):
                    pipeline.progress(batches)
                    if asynchronous is not None and step % options.every == 0:
                        writer.save(step, model, optimizer)
                        pauses.append(writer.pause_s)
                trained_s = time.perf_counter() - started_s
            rows.append((name, pauses, trained_s, time.perf_counter() - started_s))
        num_bytes = sum(path.stat().st_size for path in checkpoint.finished(root)[-1].iterdir())
        dist.barrier()
    if ranks.is_first:
        table = Table(
            title=f"{options.steps} steps, {ranks.num_ranks} ranks, checkpoints of {num_bytes / 2**20:,.0f} MiB"
        )
        for column in ("", "pause, median s", "longest s", "steps took s", "with the end of writing s"):
            table.add_column(column, justify="left" if not column else "right")
        for name, pauses, trained_s, whole_s in rows:
            median, longest = (statistics.median(pauses), max(pauses)) if pauses else (0.0, 0.0)
            table.add_row(name, f"{median:.2f}", f"{longest:.2f}", f"{trained_s:.1f}", f"{whole_s:.1f}")
        Console().print(table)


if __name__ == "__main__":
    main()
