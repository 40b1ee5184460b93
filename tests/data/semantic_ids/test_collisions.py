"""Collisions are found and resolved as a plain loop would; what cannot be resolved is an error."""

import itertools

import numpy as np
import pytest

from muonrec.data.semantic_ids.collisions import find_collisions, reassign_last
from muonrec.data.semantic_ids.quantised import Codewords, Quantised

CODES = np.array([[1, 2], [3, 4], [1, 2], [1, 4], [1, 2], [3, 4]])


def test_collisions_are_counted_in_order_of_rows() -> None:
    found = find_collisions(CODES)
    assert found.is_collided.tolist() == [True, True, True, False, True, True]
    assert found.places.tolist() == [0, 0, 1, 0, 2, 1]
    assert (found.num_tuples, found.largest) == (3, 3)


def quantised(num_items: int, last_size: int, seed: int = 0) -> Quantised:
    """Two levels; few first codes, so that many items share them."""
    rng = np.random.default_rng(seed)
    encoded = rng.normal(size=(num_items, 3)).astype(np.float32)
    codebooks = [rng.normal(size=(size, 3)).astype(np.float32) for size in (2, last_size)]
    codes, left = [], encoded
    for codebook in codebooks:
        codes.append(np.square(left[:, None] - codebook).sum(-1).argmin(1))
        left = left - codebook[codes[-1]]
    return Quantised(np.stack(codes, 1), (2, last_size), Codewords(encoded, encoded, codebooks))


def plainly_reassigned(of: Quantised) -> np.ndarray:
    codewords, codes = of.codewords, of.codes.copy()
    assert codewords is not None
    for first in range(2):
        group = [item for item in range(len(codes)) if codes[item, 0] == first]
        left = {item: codewords.encoded_NE[item] - codewords.codebooks[0][first] for item in group}

        def far(item: int, code: int, left: dict = left) -> float:
            return float(np.square(left[item] - codewords.codebooks[1][code]).sum())

        taken: dict[int, int] = {}
        for item in sorted(group, key=lambda item: far(item, of.codes[item, 1])):
            taken.setdefault(int(of.codes[item, 1]), item)
        waiting = [item for item in group if item not in taken.values()]
        while waiting:
            free = [code for code in range(len(codewords.codebooks[1])) if code not in taken]
            item, code = min(itertools.product(waiting, free), key=lambda pair: far(*pair))
            taken[code] = item
            waiting.remove(item)
        for code, item in taken.items():
            codes[item, 1] = code
    return codes


@pytest.mark.parametrize("seed", range(4))
def test_reassigning_equals_a_plain_loop(seed: int) -> None:
    before = quantised(24, 20, seed)
    after = reassign_last(before)
    assert find_collisions(before.codes).largest > 1
    assert find_collisions(after).largest == 1
    assert np.array_equal(after, plainly_reassigned(before))
    assert np.array_equal(after[:, 0], before.codes[:, 0])


def test_reassigning_costs_little_more_than_the_best_of_all_assignments() -> None:
    ratios = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        encoded, last = rng.normal(size=(3, 2)).astype(np.float32), rng.normal(size=(12, 2)).astype(np.float32)
        codebooks = [np.zeros((1, 2), np.float32), last]
        asked = np.square(encoded[:, None] - last).sum(-1).argmin(1)
        codewords = Codewords(encoded, encoded, codebooks)
        after = reassign_last(Quantised(np.stack([np.zeros(3, int), asked], 1), (1, 12), codewords))
        distances = np.square(encoded[:, None] - last).sum(-1)
        best = min(distances[range(3), list(codes)].sum() for codes in itertools.permutations(range(12), 3))
        ratios.append(distances[range(3), after[:, 1]].sum() / best)
    assert min(ratios) > 1 - 1e-5
    assert np.mean(ratios) < 1.1


def test_only_collided_items_move_and_the_nearest_of_them_stays() -> None:
    encoded = np.array([[0.0], [0.1], [1.0]], np.float32)
    codebooks = [np.zeros((1, 1), np.float32), np.array([[0.1], [1.0], [0.4]], np.float32)]
    before = Quantised(np.array([[0, 0], [0, 0], [0, 1]]), (1, 3), Codewords(encoded, encoded, codebooks))
    assert reassign_last(before).tolist() == [[0, 2], [0, 0], [0, 1]]


def test_more_items_than_codes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"items have the first codes \[\d\], but the last level has 8 codes .*; set"):
        reassign_last(quantised(24, 8))


def test_the_error_of_a_reconstruction_is_the_share_of_the_variance() -> None:
    vectors = np.array([[0.0, 0.0], [2.0, 0.0]], np.float32)
    codewords = Codewords(vectors, vectors, [np.array([[1.0, 0.0], [2.0, 1.0]], np.float32)])
    assert codewords.reconstruction_error(np.array([[0], [0]])) == 1
    assert codewords.reconstruction_error(np.array([[0], [1]])) == (1 + 1) / (1 + 1)
