"""Items with the same codes: found, and told apart."""

from __future__ import annotations

import dataclasses

import numpy as np


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
