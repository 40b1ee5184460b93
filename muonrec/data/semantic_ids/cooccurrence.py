"""Vectors of items from the training events alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from muonrec.data.semantic_ids.config import Cooccurrence
from muonrec.data.shards import Sequences

_EXTRA_DIRECTIONS = 16  # of the range finder; Halko et al. 2011 ask for 5 to 10
_POWER_ITERATIONS = 4


def cooccurrence_vectors(
    source: Cooccurrence, sequences: Sequences, *, seed: int, on_distance: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Cut the table of `positive_pmi` down to the root of its largest singular values.

    Args:
        source: window, smoothing and width.
        sequences: of which the training part alone is read.
        seed: of the range finder (Halko, Martinsson & Tropp 2011).
        on_distance: told up to which distance pairs are counted.

    Returns:
        float32 ``[num_items, dim]``; zeros for an item that has no neighbour in training.

    Raises:
        ValueError: there are fewer items than ``dim``, or no two training events of one user.
    """
    import torch

    num_items = sequences.num_items
    if source.dim > num_items:
        raise ValueError(f"{num_items:,} items have no {source.dim} dimensions; lower data.semantic_ids.source.dim")
    lefts, rights, values = positive_pmi(source, sequences, on_distance=on_distance)
    if not len(values):
        raise ValueError(
            "no two items stand near each other in training more often than by chance: nothing can be told from "
            "co-occurrence; pass other data or another data.semantic_ids.source"
        )
    table = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([lefts, rights])),
        torch.from_numpy(values.astype(np.float32)),
        (num_items, num_items),
        check_invariants=False,
        is_coalesced=True,
    )
    num_directions = min(source.dim + _EXTRA_DIRECTIONS, num_items)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left_ND, size_D, _ = torch.svd_lowrank(table, q=num_directions, niter=_POWER_ITERATIONS)
    vectors: np.ndarray = (left_ND * size_D.sqrt())[:, : source.dim].numpy()
    # Their rows are zeros but for rounding.
    vectors[np.bincount(lefts, minlength=num_items) == 0] = 0
    return vectors


def positive_pmi(
    source: Cooccurrence, sequences: Sequences, *, on_distance: Callable[[int], None] = lambda done: None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is positive of ``log P(left, right) / (P(left) P(right))``, ``P(right)`` smoothed; in nats.

    Returns:
        Items left and right, int64, and float64 values, of the pairs with a positive one; in order of left, then right.
    """
    pairs, counts = count_pairs(sequences, source.window, on_distance=on_distance)
    lefts, rights = np.divmod(pairs, sequences.num_items)
    of_item = np.bincount(lefts, weights=counts, minlength=sequences.num_items)  # of left as of right: both ways count
    smoothed = of_item**source.smoothing
    values = np.log(counts * smoothed.sum() / (of_item[lefts] * smoothed[rights]))
    is_positive = values > 0
    return lefts[is_positive], rights[is_positive], values[is_positive]


def count_pairs(
    sequences: Sequences, window: int, *, on_distance: Callable[[int], None] = lambda done: None
) -> tuple[np.ndarray, np.ndarray]:
    """Count each two different items within ``window`` training events of one user, both ways.

    Returns:
        ``left * num_items + right``, int64 and ascending, and how often, float64.
    """
    lengths = np.diff(sequences.offsets)
    place = np.arange(len(sequences.values)) - np.repeat(sequences.offsets[:-1], lengths)
    in_train = place < np.repeat(sequences.num_train, lengths)
    items = sequences.values[in_train].astype(np.int64)
    users = np.repeat(sequences.user_ids, lengths)[in_train]
    found = [np.empty(0, np.int64)]
    how_often = [np.empty(0)]
    for distance in range(1, window + 1):
        left, right = items[:-distance], items[distance:]
        is_pair = (users[:-distance] == users[distance:]) & (left != right)
        left, right = left[is_pair], right[is_pair]
        both_ways = np.concatenate([left * sequences.num_items + right, right * sequences.num_items + left])
        pairs, counts = np.unique(both_ways, return_counts=True)
        found.append(pairs)
        how_often.append(counts.astype(np.float64))
        on_distance(distance)
    pairs, places = np.unique(np.concatenate(found), return_inverse=True)
    return pairs, np.bincount(places, weights=np.concatenate(how_often), minlength=len(pairs))
