"""Read a matrix of item embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from muonrec.data.semantic_ids.config import Embeddings
from muonrec.data.semantic_ids.ready_made import rows_of
from muonrec.data.text import read_text


def read_embeddings(source: Embeddings, path: Path, raw_ids: Sequence[str]) -> np.ndarray:
    """The vector of every item, float32 ``[num_items, width]`` in the order of ``raw_ids``.

    Args:
        source: how to read.
        path: the file that ``source`` names.
        raw_ids: the item vocabulary.

    Raises:
        ValueError: the file is no matrix of finite numbers, or its rows are not of these items.
    """
    if path.suffix not in (".npy", ".parquet"):
        raise ValueError(f"{path} ends in neither .npy nor .parquet, which tell what it holds")
    if path.suffix == ".parquet" and source.ids is not None:
        raise ValueError(
            f"data.semantic_ids.source.ids {source.ids} was asked, but {path} has its ids in a column; leave ids out, "
            "and name the column as id_column"
        )
    ids, matrix = _read_npy(source, path) if path.suffix == ".npy" else _read_parquet(source, path)
    if ids is None:
        if len(matrix) != len(raw_ids):
            raise ValueError(
                f"{path} has {len(matrix):,} rows but the data set {len(raw_ids):,} items; pass the raw id of each row "
                "as data.semantic_ids.source.ids"
            )
    else:
        matrix = matrix[rows_of(path, ids, raw_ids, ignore_unknown=source.ignore_unknown, what="a row")]
    vectors = np.array(matrix, dtype=np.float32)
    if not np.isfinite(vectors).all():
        item = raw_ids[int((~np.isfinite(vectors)).any(1).argmax())]
        raise ValueError(f"{path}: the row of item {item!r} is not finite; leave no NaN or infinity in it")
    return vectors


def _read_npy(source: Embeddings, path: Path) -> tuple[list[str] | None, np.ndarray]:
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as .npy: {error}") from None
    if matrix.ndim != 2 or not (np.issubdtype(matrix.dtype, np.number) and not np.iscomplexobj(matrix)):
        raise ValueError(f"{path} is {matrix.dtype} {list(matrix.shape)}, expected numbers [rows, width]")
    if source.ids is None:
        return None, matrix
    ids = read_text(Path(source.ids)).splitlines()
    if len(ids) != len(matrix):
        raise ValueError(f"{source.ids} has {len(ids):,} lines but {path} has {len(matrix):,} rows; a line is a row")
    return ids, matrix


def _read_parquet(source: Embeddings, path: Path) -> tuple[list[str], np.ndarray]:
    try:
        names = pq.read_schema(path).names
        wanted = [source.id_column, source.vector_column]
        if missing := [name for name in wanted if name not in names]:
            raise ValueError(
                f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, names))}. "
                "Name them as data.semantic_ids.source.id_column and vector_column"
            )
        ids, lists = (pq.read_table(path, columns=[name]).column(0).combine_chunks() for name in wanted)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None
    kind = lists.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise ValueError(f"{path}: column {source.vector_column!r} is {kind}, expected lists of numbers")
    try:
        ids = ids.cast(pa.string())
    except pa.ArrowException:
        raise ValueError(f"{path}: column {source.id_column!r} is {ids.type}, expected raw item ids as text") from None
    if not len(ids):
        raise ValueError(f"{path} has no row; pass a file with a row for each item")
    if lists.null_count or ids.null_count or lists.flatten().null_count:
        raise ValueError(f"{path}: columns {' and '.join(map(repr, wanted))} hold nulls; every row needs id and vector")
    widths = np.unique(lists.value_lengths().to_numpy(zero_copy_only=False))
    if len(widths) != 1:
        raise ValueError(f"{path}: vectors are {widths.min()} to {widths.max()} wide, expected the same of all")
    return ids.to_pylist(), lists.flatten().to_numpy().reshape(-1, int(widths[0]))
