"""Vectors from a file or from training events: in the order of the vocabulary, and never from what is held out."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muonrec.data.semantic_ids.config import Cooccurrence, Embeddings
from muonrec.data.semantic_ids.cooccurrence import cooccurrence_vectors, count_pairs, positive_pmi
from muonrec.data.semantic_ids.embeddings import read_embeddings
from muonrec.data.shards import Sequences

RAW_IDS = ["b", "a", "7"]
MATRIX = np.arange(6, dtype=np.float64).reshape(3, 2)


def sequences(users: list[list[int]], num_held_out: int = 2, num_items: int = 8) -> Sequences:
    lengths = np.array([len(user) for user in users])
    return Sequences(
        values=np.concatenate(users).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        num_train=(lengths - num_held_out).astype(np.int32),
        num_valid=np.ones(len(users), np.int32),
        num_test=np.ones(len(users), np.int32),
        user_ids=np.arange(len(users)),
        num_items=num_items,
        item_train_counts=np.zeros(num_items, np.int64),
        manifest=None,  # type: ignore[arg-type]
    )


def users(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 7, size=rng.integers(3, 9)).tolist() for _ in range(30)]  # item 7 is met by nobody


def pairs_by_loops(users: list[list[int]], window: int) -> Counter:
    counts: Counter = Counter()
    for user in users:
        train = user[:-2]
        for place, left in enumerate(train):
            for right in train[place + 1 : place + 1 + window]:
                if left != right:
                    counts[left, right] += 1
                    counts[right, left] += 1
    return counts


@pytest.mark.parametrize("window", [1, 3, 50])
def test_pairs_and_their_information_equal_loops(window: int) -> None:
    counts = pairs_by_loops(users(), window)
    pairs, how_often = count_pairs(sequences(users()), window)
    assert {(pair // 8, pair % 8): count for pair, count in zip(pairs.tolist(), how_often, strict=True)} == counts

    source = Cooccurrence(window=window, smoothing=0.75)
    totals = Counter()
    for (left, _), count in counts.items():
        totals[left] += count
    norm = sum(total**0.75 for total in totals.values())
    expected = {
        (left, right): math.log(count / totals[left] / (totals[right] ** 0.75 / norm))
        for (left, right), count in counts.items()
    }
    lefts, rights, values = positive_pmi(source, sequences(users()))
    assert dict(zip(zip(lefts.tolist(), rights.tolist(), strict=True), values.tolist(), strict=True)) == pytest.approx(
        {pair: value for pair, value in expected.items() if value > 0}
    )


def test_vectors_are_the_largest_singular_directions_of_the_table() -> None:
    source = Cooccurrence(window=3, dim=8)
    lefts, rights, values = positive_pmi(source, sequences(users()))
    table = np.zeros((8, 8))
    table[lefts, rights] = values
    whole = cooccurrence_vectors(source, sequences(users()), seed=0)
    left, size, _ = np.linalg.svd(table)
    np.testing.assert_allclose(whole @ whole.T, left * size @ left.T, atol=1e-4)
    assert not whole[7].any()
    cut = cooccurrence_vectors(Cooccurrence(window=3, dim=2), sequences(users()), seed=0)
    assert np.array_equal(cut, whole[:, :2])


def test_what_is_held_out_changes_nothing() -> None:
    source, log = Cooccurrence(window=3, dim=4), users()
    changed = [[*user[:-2], 7, 7] for user in log]
    one, two = (cooccurrence_vectors(source, sequences(of), seed=0) for of in (log, changed))
    assert np.array_equal(one, two)


def test_too_little_training_is_refused() -> None:
    with pytest.raises(ValueError, match="8 items have no 64 dimensions; lower data"):
        cooccurrence_vectors(Cooccurrence(), sequences(users()), seed=0)
    lonely = sequences([[1, 2, 3], [2, 3, 4]])
    with pytest.raises(ValueError, match="no two items stand near each other in training"):
        cooccurrence_vectors(Cooccurrence(dim=2), lonely, seed=0)
    assert dataclasses.replace(lonely).num_train.tolist() == [1, 1]


def test_npy_with_ids_without_them_and_parquet_give_the_same_vectors(tmp_path: Path) -> None:
    np.save(tmp_path / "in_order.npy", MATRIX)
    np.save(tmp_path / "mixed.npy", MATRIX[[2, 0, 1]].astype(np.float16))
    (tmp_path / "ids.txt").write_text("7\nb\na\n")
    table = {"item_id": ["x", "7", "a", "b"], "embedding": [[9.0, 9.0], *MATRIX[[2, 1, 0]].tolist()]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    for name, settings in (
        ("in_order.npy", {}),
        ("mixed.npy", {"ids": str(tmp_path / "ids.txt")}),
        ("a.parquet", {"ignore_unknown": True}),
    ):
        path = tmp_path / name
        vectors = read_embeddings(Embeddings(path=str(path), **settings), path, RAW_IDS)
        assert vectors.dtype == np.float32
        assert np.array_equal(vectors, MATRIX), name


@pytest.mark.parametrize(
    ("matrix", "ids", "message"),
    [
        (MATRIX[:2], None, "has 2 rows but the data set 3 items; pass the raw id of each row as"),
        (MATRIX, "b\na", "ids.txt has 2 lines but .*matrix.npy has 3 rows; a line is a row"),
        (MATRIX, "b\na\na", "item 'a' stands twice"),
        (MATRIX, "b\na\nc", "lacks a row for '7', 1 of the 3 items"),
        (np.tile(MATRIX, (2, 1))[:4], "b\na\n7\nc", "has a row for 'c', 1 items that the data set does not have"),
        (MATRIX[0], None, r"is float64 \[2\], expected numbers \[rows, width\]"),
        (np.array([["a"]]), None, r"is <U1 \[1, 1\], expected numbers"),
        (np.array([[1.0], [np.nan], [2.0]]), None, "the row of item 'a' is not finite"),
        (b"not npy", None, "cannot be read as .npy"),
    ],
)
def test_unfit_matrices_are_refused(tmp_path: Path, matrix: np.ndarray | bytes, ids: str | None, message: str) -> None:
    path = tmp_path / "matrix.npy"
    if isinstance(matrix, bytes):
        path.write_bytes(matrix)
    else:
        np.save(path, matrix)
    (tmp_path / "ids.txt").write_text(ids or "")
    source = Embeddings(path=str(path), ids=None if ids is None else str(tmp_path / "ids.txt"))
    with pytest.raises(ValueError, match=message):
        read_embeddings(source, path, RAW_IDS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [1], "embedding": [[1.0]]}, "has no column 'item_id'; it has 'id', 'embedding'. Name them as"),
        ({"item_id": [1], "embedding": [1.0]}, "column 'embedding' is double, expected lists of numbers"),
        ({"item_id": [1, 2], "embedding": [[1.0], None]}, "columns 'item_id' and 'embedding' hold nulls"),
        ({"item_id": [1, 2], "embedding": [[1.0], [1.0, 2.0]]}, "vectors are 1 to 2 wide, expected the same of all"),
        (
            {"item_id": [{"id": 1}], "embedding": [[1.0]]},
            "column 'item_id' is struct<id: int64>, expected raw item ids",
        ),
        ({"item_id": pa.array([], pa.string()), "embedding": pa.array([], pa.list_(pa.float32()))}, "has no row; pass"),
    ],
)
def test_unfit_parquet_is_refused(tmp_path: Path, columns: dict, message: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match=message):
        read_embeddings(Embeddings(path=str(path)), path, RAW_IDS)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    for name, message in (("a.csv", "ends in neither .npy nor .parquet"), ("a.parquet", "cannot be read as Parquet")):
        with pytest.raises(ValueError, match=message):
            read_embeddings(Embeddings(path=name), tmp_path / name, RAW_IDS)
    with pytest.raises(
        ValueError, match=r"source.ids ids.txt was asked, but .*a.parquet has its ids in a column; leave"
    ):
        read_embeddings(Embeddings(path="a.parquet", ids="ids.txt"), tmp_path / "a.parquet", RAW_IDS)
