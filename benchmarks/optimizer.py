"""Milliseconds of an optimizer step on stated towers against `torch.optim.Muon`, and how orthogonal the updates are.

python -m benchmarks.optimizer [--quick] [--towers sasrec-64 mixed] [--ranks 1 2 4] [--threads 1]
    [--json out/optimizer.json] [--other package.module:Class '{"lr": 0.01}'] [--kernels]

Every contestant steps in turn in the same processes, so that other work on the machine meets all alike: a ratio is the
median over the rounds of torch's seconds by the contestant's in the same round. "processor" is time of the processor on
rank 0, which other work prolongs less; with `--threads 1` its ratio can be trusted on a busy machine, too. On several
ranks (gloo, the cores dealt out to them) each holds the whole tower, as under DDP; a step lasts until the slowest rank
has made it. The errors are of the first update, divided by the learning rate and the shape's scale, in float64, the
worst of the tower: of orthogonality `||U U^T - I|| / sqrt(r)` and of what torch does, `||U - U_torch|| / ||U_torch||`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from muonrec.optim.ownership import assign_owners, newton_schulz_cost

Shape = tuple[int, int]

TORCH = "torch.optim.Muon"


def _sasrec(width: int, layers: int = 8) -> list[Shape]:
    """q, k, v, output and the two of the feed-forward, all square (Kang & McAuley, 2018)."""
    return [(width, width)] * (6 * layers)


def _hstu() -> list[Shape]:
    """u, v, q, k and the output of 16 layers that widen from 256 to 1024: 80 matrices."""
    return [(width, width) for width, layers in ((256, 8), (512, 4), (1024, 4)) for _ in range(5 * layers)]


def _mixed() -> list[Shape]:
    """Feed-forwards of four times the width, gates of a GRU, flattened convolutions, a DLRM's sides, odd sizes."""
    transformer = [(128, 128)] * 16 + [(512, 128)] * 4 + [(128, 512)] * 4
    gates = [(96, 64)] * 3 + [(96, 96)] * 3
    convolutions = [(16, 64 * k) for k in (2, 3, 4, 5)]
    dlrm = [(512, 13), (256, 512), (64, 256), (512, 479), (256, 512), (60, 100), (62, 100), (64, 97)]
    return transformer + gates + convolutions + dlrm


TOWERS: dict[str, Callable[[], list[Shape]]] = {
    "sasrec-64": lambda: _sasrec(64),
    "sasrec-128": lambda: _sasrec(128),
    "sasrec-256": lambda: _sasrec(256),
    "square-1024": lambda: [(1024, 1024)],
    "mixed": _mixed,
    "hstu-256-1024": _hstu,
    "square-4096": lambda: [(4096, 4096)],
}
QUICK = ("sasrec-64", "sasrec-128", "sasrec-256", "square-1024", "mixed")

# Seconds after which a tower gets no further round, and the fewest rounds of the largest.
SECONDS_PER_TOWER = 40.0
FEWEST_ROUNDS = 3

Contestant = tuple[str, dict[str, Any]]  # import path and arguments of the constructor
CONTESTANTS: dict[str, Contestant] = {
    TORCH: ("torch.optim:Muon", {}),
    "Muon (plain twin)": ("muonrec.optim:Muon", {}),
    "DistributedMuon": ("muonrec.optim:DistributedMuon", {}),
    "AdamW, fused": ("torch.optim:AdamW", {"fused": True}),
}


def main() -> None:
    """Run all towers on all numbers of ranks; print tables and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one rank, few rounds, no large matrices")
    parser.add_argument("--towers", nargs="+", choices=TOWERS)
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, help="of each rank; by default the cores are dealt out")
    parser.add_argument("--other", nargs=2, action="append", default=[], metavar=("MODULE:CLASS", "JSON"))
    parser.add_argument("--kernels", action="store_true", help="measure what the cost model of batches is made of")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    console = Console(width=140)
    if options.kernels:
        print_kernels(console)
        return
    towers = options.towers or (QUICK if options.quick else list(TOWERS))
    ranks = options.ranks or ([1] if options.quick else [1, 2, 4])
    rounds = options.rounds or (7 if options.quick else 21)
    contestants = CONTESTANTS | {path: (path, json.loads(arguments)) for path, arguments in options.other}

    rows: list[dict[str, Any]] = []
    for num_ranks in ranks:
        for tower in towers:
            found = run_on_ranks(num_ranks, options.threads, tower, contestants, rounds)
            print_rows(console, tower, num_ranks, found)
            rows += [{"tower": tower, "ranks": num_ranks, **row} for row in found]
    owners = owner_loads(num_ranks=64)
    planning_s = planning_seconds(num_matrices=1000, num_ranks=1024)
    print_owners(console, owners, planning_s)

    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "machine": {"processor": platform.processor(), "cores": os.cpu_count(), "torch": torch.__version__},
            "steps": rows,
            "owners": owners,
            "planning_s": planning_s,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


# Steps ----------------------------------------------------------------------------------------------------------------


def run_on_ranks(
    num_ranks: int, num_threads: int | None, tower: str, contestants: dict[str, Contestant], rounds: int
) -> list[dict[str, Any]]:
    """Time one tower in fresh processes; the rows of its table."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_ranks, num_threads, folder, tower, contestants, rounds)
        torch.multiprocessing.spawn(_run_rank, arguments, nprocs=num_ranks)  # type: ignore[attr-defined]
        return json.loads((Path(folder) / "rows.json").read_text())


def _run_rank(
    rank: int,
    num_ranks: int,
    num_threads: int | None,
    folder: str,
    tower: str,
    contestants: dict[str, Contestant],
    rounds: int,
) -> None:
    torch.set_num_threads(num_threads or max(1, (os.cpu_count() or 1) // num_ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    try:
        rows = time_tower(TOWERS[tower](), contestants, rounds)
        if rank == 0:
            (Path(folder) / "rows.json").write_text(json.dumps(rows))
    finally:
        dist.destroy_process_group()


def time_tower(shapes: Sequence[Shape], contestants: dict[str, Contestant], rounds: int) -> list[dict[str, Any]]:
    """Step every contestant in turns; medians, ratios and errors by contestant. Every rank must call it."""
    updates = {name: first_update(shapes, *contestants[name]) for name in contestants}
    steps = {name: make_step(shapes, *contestants[name]) for name in contestants}
    for step in steps.values():
        step()

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    processor_seconds: dict[str, list[float]] = {name: [] for name in contestants}
    started = time.perf_counter()
    for i in range(rounds):
        for name, step in steps.items():
            wall_s, processor_s = timed(step)
            seconds[name].append(wall_s)
            processor_seconds[name].append(processor_s)
        is_late = torch.tensor(time.perf_counter() - started > SECONDS_PER_TOWER)
        dist.broadcast(is_late, 0)
        if is_late and i + 1 >= FEWEST_ROUNDS:
            break

    rows = []
    for name, found in seconds.items():
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        is_muon = "Adam" not in name
        rows.append(
            {
                "optimizer": name,
                "ms": 1000 * median,
                "quartiles_ms": [1000 * low, 1000 * high],
                "ratio": statistics.median(a / b for a, b in zip(seconds[TORCH], found, strict=True)),
                "processor_ms": 1000 * statistics.median(processor_seconds[name]),
                "processor_ratio": statistics.median(
                    a / b for a, b in zip(processor_seconds[TORCH], processor_seconds[name], strict=True)
                ),
                "rounds": len(found),
                "orthogonality_error": max(map(orthogonality_error, updates[name])) if is_muon else None,
                "from_torch": max(map(distance, updates[name], updates[TORCH])) if is_muon else None,
            }
        )
    return rows


def parameters(shapes: Sequence[Shape], fill: Callable[..., Tensor] = torch.randn) -> list[tuple[str, nn.Parameter]]:
    """Named parameters with gradients, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    named = []
    for i, shape in enumerate(shapes):
        param = nn.Parameter(fill(shape) if fill is torch.zeros else fill(shape, generator=generator))
        param.grad = torch.randn(shape, generator=generator)
        named.append((f"layers.{i:03}.weight", param))
    return named


def make_step(shapes: Sequence[Shape], path: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    """A contestant with a tower of its own, ready to step."""
    return load(path)(parameters(shapes), **arguments).step


def load(path: str) -> Callable[..., torch.optim.Optimizer]:
    """``package.module:Class``."""
    module, _, name = path.partition(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))  # type: ignore[arg-type]


def first_update(shapes: Sequence[Shape], path: str, arguments: dict[str, Any]) -> list[Tensor]:
    """What a contestant subtracts in its first step, by a rate of 1 and without the scale of the shape; float64."""
    named = parameters(shapes, torch.zeros)
    load(path)(named, **{**arguments, "lr": 1.0, "weight_decay": 0.0}).step()
    return [
        -param.detach().double() / math.sqrt(max(1, rows / columns))
        for (rows, columns), (_, param) in zip(shapes, named, strict=True)
    ]


def orthogonality_error(update_RC: Tensor) -> float:
    """``||U U^T - I|| / sqrt(r)`` on the short side."""
    u_RC = update_RC if update_RC.shape[0] <= update_RC.shape[1] else update_RC.mT
    return ((u_RC @ u_RC.mT - torch.eye(len(u_RC), dtype=u_RC.dtype)).norm() / math.sqrt(len(u_RC))).item()


def distance(update_RC: Tensor, expected_RC: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((update_RC - expected_RC).norm() / expected_RC.norm()).item()


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Seconds until the slowest rank has stepped, and seconds of the processor on this rank."""
    dist.barrier()
    start, processor_start = time.perf_counter(), time.process_time()
    step()
    processor_s = time.process_time() - processor_start
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item(), processor_s


# Owners ---------------------------------------------------------------------------------------------------------------


def owner_loads(num_ranks: int) -> list[dict[str, Any]]:
    """The busiest rank by the floating-point count, against a bound that no plan of whole matrices can beat by much."""
    rows = []
    for tower in ("hstu-256-1024", "mixed"):
        costs = {f"{i:03}": newton_schulz_cost(shape, 5) for i, shape in enumerate(TOWERS[tower]())}
        owners = assign_owners(costs, num_ranks)
        loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(num_ranks)]
        in_order = [*sorted(costs.values(), reverse=True), *[0] * (num_ranks + 1)]
        bound = max(sum(loads) / num_ranks, in_order[0], in_order[num_ranks - 1] + in_order[num_ranks])
        rows.append({"tower": tower, "matrices": len(costs), "ranks": num_ranks, "load_by_bound": max(loads) / bound})
    return rows


def planning_seconds(num_matrices: int, num_ranks: int) -> float:
    """Best of three, to assign owners."""
    costs = {f"{i:04}": newton_schulz_cost((64 + i % 17, 64 + i % 31), 5) for i in range(num_matrices)}

    def seconds() -> float:
        start = time.perf_counter()
        assign_owners(costs, num_ranks)
        return time.perf_counter() - start

    return min(seconds() for _ in range(3))


# Kernels --------------------------------------------------------------------------------------------------------------


def print_kernels(console: Console) -> None:
    """What `muonrec.optim.batching.COST_MODELS` is made of: a launch, and products of batches that fit or do not."""
    torch.set_num_threads(1)
    table = Table(title="products on one core, medians of 31", box=None)
    for column in ("dtype", "launch us", "width", "MiB", "batch", "one by one us", "batched us", "GFLOP/s batched"):
        table.add_column(column, justify="right")
    for dtype in (torch.bfloat16, torch.float32):
        tiny = torch.randn(8, 8).to(dtype)
        launch_us = _median_us(lambda tiny=tiny: tiny @ tiny)
        for width, batch in ((64, 16), (64, 64), (128, 16), (128, 64), (256, 4), (256, 32), (512, 2), (1024, 1)):
            x = torch.randn(batch, width, width).to(dtype)
            one_by_one = _median_us(lambda x=x: [matrix @ matrix for matrix in x.unbind()]) / batch
            batched = _median_us(lambda x=x: x @ x) / batch
            table.add_row(
                str(dtype).removeprefix("torch."),
                f"{launch_us:.1f}",
                str(width),
                f"{4 * x.numel() * x.element_size() / 2**20:.1f}",
                str(batch),
                f"{one_by_one:.1f}",
                f"{batched:.1f}",
                f"{2e-3 * width**3 / batched:.0f}",
            )
    console.print(table)


def _median_us(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(32):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[1:])


# Tables ---------------------------------------------------------------------------------------------------------------


def print_rows(console: Console, tower: str, num_ranks: int, rows: Sequence[dict[str, Any]]) -> None:
    """One tower on one number of ranks."""
    shapes = TOWERS[tower]()
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    table = Table(
        title=f"{tower}: {len(shapes)} matrices, {ranks}, medians of {rows[0]['rounds']}", title_justify="left"
    )
    table.add_column("optimizer", no_wrap=True, min_width=20)
    for column in (
        "ms",
        "quartiles",
        "torch / this",
        "processor ms",
        "torch / this",
        "orthogonality error",
        "from torch's",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["quartiles_ms"]
        errors = [row["orthogonality_error"], row["from_torch"]]
        table.add_row(
            row["optimizer"],
            f"{row['ms']:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{row['ratio']:.2f} x",
            f"{row['processor_ms']:.2f}",
            f"{row['processor_ratio']:.2f} x",
            *("" if error is None else f"{error:.4f}" for error in errors),
        )
    console.print(table)


def print_owners(console: Console, owners: Sequence[dict[str, Any]], planning_s: float) -> None:
    """The plans."""
    table = Table(title="busiest owner / max(mean, largest, sum of the nth and the next)", title_justify="left")
    for column in ("tower", "matrices", "ranks", "load / bound"):
        table.add_column(column, justify="right")
    for row in owners:
        table.add_row(row["tower"], str(row["matrices"]), str(row["ranks"]), f"{row['load_by_bound']:.3f}")
    console.print(table)
    console.print(f"1,000 matrices over 1,024 ranks planned in {1000 * planning_s:.1f} ms")


if __name__ == "__main__":
    main()
