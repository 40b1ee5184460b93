"""What the optimizer does to the tower's matrices: their singular values, and those of what one step adds to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from muonrec.embeddings.joined import Overrides, explain
from muonrec.optim.update import Split, as_matrix
from muonrec.runs import SPECTRA


class Spectra:
    """Writes a line per matrix, and per block of a fused one, to ``spectra.jsonl``; every rank must make and use it.

    A line has ``step``, ``name``, ``what`` (``weight``, or ``update``: the whole difference of one step, its rate and
    decay included), ``stable_rank`` (squared Frobenius norm over squared spectral norm; Rudelson & Vershynin 2007) and
    ``singular_values``. A resumed run may write a step again; the last line counts.

    Args:
        folder: of the run.
        model: sharded.
        overrides: of the routing: the matrices are those that Muon would take, whoever updates them.
        every_steps: 0 for never.
        enabled: False on all ranks but the first, which decomposes and writes.
        paused: entered while it records, such as `muonrec.runlog.Clock.paused`.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        overrides: Overrides,
        *,
        every_steps: int,
        enabled: bool,
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._paused = paused
        self._path, self._every_steps, self._enabled = folder / SPECTRA, every_steps, enabled
        self._matrices: list[tuple[str, nn.Parameter, Split | None]] = []
        if every_steps:
            parameters = dict(model.named_parameters())
            routed = explain(model, overrides=overrides)
            self._matrices = [(a.name, parameters[a.name], a.split) for a in routed if a.optimizer == "muon"]

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around the step that makes ``step`` done."""
        if not self._every_steps or step % self._every_steps:
            yield
            return
        with self._paused():
            before = [_whole(parameter) for _, parameter, _ in self._matrices]
        yield
        with self._paused():
            after = [_whole(parameter) for _, parameter, _ in self._matrices]
            if not self._enabled:
                return
            lines = []
            for (name, _, split), old, new in zip(self._matrices, before, after, strict=True):
                for what, matrix in (("weight", new), ("update", new - old)):
                    lines += [{"step": step, "what": what, **line} for line in _lines(name, matrix, split)]
            with self._path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return as_matrix(whole.detach()).to(torch.float32, copy=True)


def _lines(name: str, matrix_RC: torch.Tensor, split: Split | None) -> Iterator[dict[str, object]]:
    blocks: Sequence[torch.Tensor] = [matrix_RC] if split is None else matrix_RC.split(split.sizes, dim=split.dim)
    for index, block in enumerate(blocks):
        if not block.isfinite().all():  # a record must not stop what it records: the loss will tell
            continue
        values = torch.linalg.svdvals(block)
        stable_rank = float(values.square().sum() / values[0].square().clamp(min=torch.finfo(torch.float32).tiny))
        yield {
            "name": name if len(blocks) == 1 else f"{name}[{index}]",
            "stable_rank": stable_rank,
            "singular_values": [float(f"{value:.4g}") for value in values.tolist()],
        }
