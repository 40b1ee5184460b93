"""Items with the same codes: found, and told apart."""

from __future__ import annotations

import dataclasses

import numpy as np

from muonrec.data.semantic_ids.quantised import Quantised


@dataclasses.dataclass(frozen=True)
class Collisions:
    """Which items share their codes with others.

    Attributes:
        is_collided: bool ``[num_items]``.
        places: int64 ``[num_items]``: each item's place among those of its codes, in order of rows, from 0.
        num_tuples: different tuples of codes.
        largest: items of the commonest tuple.
    """

    is_collided: np.ndarray
    places: np.ndarray
    num_tuples: int
    largest: int


def find_collisions(codes: np.ndarray) -> Collisions:
    """Compare the codes of all items, int ``[num_items, num_levels]``."""
    _, tuple_of, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    tuple_of = tuple_of.reshape(-1)
    order = np.argsort(tuple_of, kind="stable")
    places = np.empty(len(codes), dtype=np.int64)
    places[order] = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Collisions(counts[tuple_of] > 1, places, len(counts), int(counts.max()))


def reassign_last(quantised: Quantised) -> np.ndarray:
    """Let the nearest of the items that share their codes keep them, and move the others on the last level.

    Of all pairs of a waiting item and a code that is free beside the same first codes, the nearest is taken, and so on;
    of equally near ones that of the first item. Not the least sum of distances, which would move more items.

    Returns:
        int64 ``[num_items, num_levels]``, no two rows alike.

    Raises:
        ValueError: more items share their first codes than the last level has codes.
    """
    codes, codewords = quantised.codes.copy(), quantised.codewords
    assert codewords is not None
    last_KE = codewords.codebooks[-1]
    _, group_of = np.unique(codes[:, :-1], axis=0, return_inverse=True)
    group_of = group_of.reshape(-1)
    sizes = np.bincount(group_of)
    if sizes.max() > len(last_KE):
        first = codes[np.flatnonzero(group_of == sizes.argmax())[0], :-1].tolist()
        raise ValueError(
            f"{sizes.max():,} items have the first codes {first}, but the last level has {len(last_KE)} codes to tell "
            "them apart; set data.semantic_ids.collisions=extra_level, or raise method.codebook_size or num_levels"
        )
    left_NE = codewords.encoded_NE - codewords.sums(codes, num_levels=codes.shape[1] - 1)
    lengths = np.square(last_KE).sum(1)
    for group in np.unique(group_of[find_collisions(codes).is_collided]):
        items = np.flatnonzero(group_of == group)
        distances = np.square(left_NE[items]).sum(1)[:, None] - 2 * left_NE[items] @ last_KE.T + lengths
        codes[items, -1] = _deal_out(distances, codes[items, -1])
    return codes


def _deal_out(distances: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """A code for each item, ``distances`` being ``[items, codes]`` and ``asked`` what each would have alone."""
    by_distance = np.argsort(distances[np.arange(len(asked)), asked], kind="stable")
    kept, nearest = np.unique(asked[by_distance], return_index=True)
    dealt = np.full(len(asked), -1)
    dealt[by_distance[nearest]] = kept
    waiting = np.flatnonzero(dealt < 0)
    free = np.setdiff1d(np.arange(distances.shape[1]), kept)
    while len(waiting):
        place, code = np.unravel_index(distances[np.ix_(waiting, free)].argmin(), (len(waiting), len(free)))
        dealt[waiting[place]] = free[code]
        waiting, free = np.delete(waiting, place), np.delete(free, code)
    return dealt
