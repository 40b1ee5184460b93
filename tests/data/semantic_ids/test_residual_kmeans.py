"""Residual k-means equals a plain loop, loses no centre, and repeats itself."""

import numpy as np
import pytest
import torch

from muonrec.data.semantic_ids import residual_kmeans
from muonrec.data.semantic_ids.residual_kmeans import fit_kmeans, fit_residual_kmeans, nearest, quantise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(num_rows: int = 60, width: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=generator(seed), dtype=torch.float64)


def lloyd(x: np.ndarray, centres: np.ndarray, max_rounds: int) -> np.ndarray:
    before: list[int] = []
    for _ in range(max_rounds):
        distances = [[float(((row - centre) ** 2).sum()) for centre in centres] for row in x]
        codes = [int(np.argmin(of_row)) for of_row in distances]
        if codes == before:
            break
        before = codes
        farthest = sorted(range(len(x)), key=lambda row: -distances[row][codes[row]])
        moved = centres.copy()
        for code in range(len(centres)):
            members = [row for row, its in zip(x, codes, strict=True) if its == code]
            moved[code] = np.mean(members, 0) if members else x[farthest.pop(0)]
        centres = moved
    return centres


def test_residual_k_means_equals_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_kmeans, "_BLOCK_ROWS", 25)
    x = rows()
    found = fit_residual_kmeans(x, 2, 8, max_rounds=30, generator=generator())
    left, drawn = x, generator()
    codes = []
    for codebook in found:
        expected = lloyd(left.numpy(), residual_kmeans._spread(left, 8, drawn).numpy(), 30)
        np.testing.assert_allclose(codebook.numpy(), expected, rtol=1e-9, atol=1e-9)
        code = torch.from_numpy(np.array([((row - expected) ** 2).sum(1).argmin() for row in left.numpy()]))
        codes.append(code)
        left = left - torch.from_numpy(expected)[code]
    quantised, what_is_left = quantise(x, found)
    assert torch.equal(quantised, torch.stack(codes, 1))
    torch.testing.assert_close(what_is_left, left, rtol=1e-9, atol=1e-9)


def test_empty_centres_move_to_the_farthest_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [50.0], [90.0]])
    far_off = torch.tensor([[0.0], [1e4], [1e4], [1e4], [1e4]])
    monkeypatch.setattr(residual_kmeans, "_spread", lambda *_: far_off)
    centres = fit_kmeans(x, 5, max_rounds=20, generator=generator())
    assert sorted(centres[:, 0].tolist()) == [0, 1, 2, 50, 90]


def test_fewer_different_rows_than_centres_are_told_without_error() -> None:
    x = rows(3).repeat(5, 1)
    centres = fit_kmeans(x, 8, max_rounds=10, generator=generator())
    codes, distances = nearest(x, centres)
    assert len(codes.unique()) == 3
    assert float(distances.max()) < 1e-20


def test_the_seed_decides_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_kmeans, "_MAX_ROWS_TO_START", 60)
    one, two, other = (fit_residual_kmeans(rows(), 2, 8, max_rounds=9, generator=generator(s)) for s in (3, 3, 4))
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[0], other[0])


def test_the_start_is_spread_over_far_groups() -> None:
    groups = torch.cat([rows(30) * 0.01 + 100 * number for number in range(8)])
    starts = residual_kmeans._spread(groups, 8, generator())
    assert len((starts[:, 0] / 100).round().unique()) == 8
