"""Spectra of a tower's matrices and of what one step adds to them: singular values and stable rank, for the record."""

# R = rows, C = columns of a matrix, S = its singular values, the smaller of the two

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from muonrec.comparison.results import Spectrum
from muonrec.optim.update import Split, as_matrix

if TYPE_CHECKING:
    import pyarrow as pa

SPECTRA = "spectra.parquet"
# Evenly among a tower's matrices where it has more: one decomposition takes milliseconds at 64 wide, at 1024 half a
# second.
_MAX_MATRICES = 12


def singular_values(matrix_RC: Tensor) -> Tensor:
    """float32 ``[S]`` on the CPU, in falling order; NaN where the matrix holds what is not finite."""
    matrix_RC = matrix_RC.detach().float()
    if not matrix_RC.isfinite().all():  # a record must not stop what it records
        return torch.full((min(matrix_RC.shape),), torch.nan)
    return torch.linalg.svdvals(matrix_RC).cpu()


def stable_rank(singular_values_S: Tensor) -> float:
    """``|W|_F^2 / |W|_2^2``, which no small singular value moves (Rudelson & Vershynin 2007); 0 for a matrix of zeros.

    Args:
        singular_values_S: ``[S]``, in falling order.
    """
    shares_S = singular_values_S.double() / singular_values_S[0].double()
    return float(shares_S.square().sum()) if singular_values_S[0] != 0 else 0.0


class SpectraLog:
    """Writes the spectra of a run to ``spectra.parquet``; it reads weights, and changes none.

    The file appears whole or not at all. Opening it at ``start_step`` drops later rows, which an interrupted run wrote
    after its last checkpoint. Every rank must make it and call it alike: sharded matrices are gathered.

    Args:
        folder: of the run.
        matrices: the parameters that Muon would update, by name, with the blocks that it would split them into; none
            to record nothing.
        is_first: whether this rank decomposes and writes.
        start_step: steps that were done before.
    """

    def __init__(
        self,
        folder: str | Path,
        matrices: Mapping[str, tuple[Tensor, Split | None]],
        *,
        is_first: bool,
        start_step: int,
    ) -> None:
        self._path = Path(folder) / SPECTRA
        self._is_first = is_first
        self._blocks = [(name, place) for name, (_, split) in matrices.items() for place in _places(split)]
        stride = max(len(self._blocks) / _MAX_MATRICES, 1.0)
        self._blocks = [self._blocks[int(at * stride)] for at in range(min(len(self._blocks), _MAX_MATRICES))]
        self._matrices = {name: matrices[name] for name, _ in self._blocks}
        self._before: dict[str, Tensor] = {}
        self._rows: pa.Table | None = None
        if self._is_first and self._blocks:
            if start_step and self._path.is_file():
                import pyarrow.compute as pc
                import pyarrow.parquet as pq

                self._rows = pq.read_table(self._path).filter(pc.field("step") <= start_step)
            else:
                self._path.unlink(missing_ok=True)

    def before_step(self) -> None:
        """Keep the weights that the next step starts from."""
        self._before = {name: _whole(parameter).clone() for name, (parameter, _) in self._matrices.items()}

    def after_step(self, step: int) -> None:
        """Record the weights after ``step`` steps, and what the last of them added, if `before_step` came before it."""
        after = {name: _whole(parameter) for name, (parameter, _) in self._matrices.items()}
        if self._is_first and self._blocks:
            self._write([row for name, place in self._blocks for row in self._spectra(step, name, place, after[name])])
        self._before = {}

    def _spectra(self, step: int, name: str, place: int | None, after: Tensor) -> list[dict[str, Any]]:
        split = self._matrices[name][1]
        tensors = {"weight": after} | ({"update": after - self._before[name]} if name in self._before else {})
        label = name if place is None else f"{name}[{place}]"
        rows = []
        for what, tensor in tensors.items():
            matrix_RC = as_matrix(tensor)
            if split is not None and place is not None:
                matrix_RC = matrix_RC.split(split.sizes, split.dim)[place]
            values_S = singular_values(matrix_RC)
            row = {"step": step, "name": label, "what": what, "stable_rank": stable_rank(values_S)}
            rows.append({**row, "singular_values": values_S.numpy()})
        return rows

    def _write(self, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema(
            {
                "step": pa.int64(),
                "name": pa.string(),
                "what": pa.string(),
                "stable_rank": pa.float64(),
                "singular_values": pa.list_(pa.float32()),
            }
        )
        added = pa.Table.from_pylist(rows, schema=schema)
        self._rows = added if self._rows is None else pa.concat_tables([self._rows, added])
        partial = self._path.with_name(f".{self._path.name}.partial")
        pq.write_table(self._rows, partial, compression="zstd")
        partial.replace(self._path)


def read_spectra(folder: str | Path) -> tuple[Spectrum, ...]:
    """What `SpectraLog` wrote into the folder of a run, by step; empty where it recorded nothing."""
    import pyarrow.parquet as pq

    path = Path(folder) / SPECTRA
    if not path.is_file():
        return ()
    rows = pq.read_table(path).to_pylist()
    return tuple(Spectrum(**{**row, "singular_values": tuple(row["singular_values"])}) for row in rows)


def _places(split: Split | None) -> list[int | None]:
    """The numbers of a parameter's blocks; None for one that stands for a single matrix."""
    return [None] if split is None or len(split.sizes) == 1 else list(range(len(split.sizes)))


def _whole(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
