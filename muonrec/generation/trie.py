"""CodeTrie: the items there are as a tree of codes, in sorted arrays on the device."""

# N = items, L = levels, M = nodes of a level, P = nodes of the level above (the root alone above the first)

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch

from muonrec.data.semantic_ids.ids import SemanticIds
from muonrec.retrieval import tie_key


class TrieLevel(NamedTuple):
    """The nodes of one level, in order of their prefixes: those of one parent are neighbours.

    Args:
        codes: int64 ``[M]``, the last code of each node's prefix.
        parents: int64 ``[M]``, into the level above.
        first_children: int64 ``[P + 1]``: nodes ``first_children[p]`` to ``first_children[p + 1]`` are the children of
            node p of the level above.
        max_children: of any one parent.
        first_leaves: int64 ``[M + 1]``: leaves ``first_leaves[m]`` to ``first_leaves[m + 1]`` are below node m.
        tie_ranks: int64 ``[M]``, a permutation: the order of nodes with equal scores. A node comes where the first of
            its items comes by `muonrec.retrieval.tie_key`, so that a search among nothing but equals finds the items
            that a ranking of all items would put first.
    """

    codes: torch.Tensor
    parents: torch.Tensor
    first_children: torch.Tensor
    max_children: int
    first_leaves: torch.Tensor
    tie_ranks: torch.Tensor


@dataclasses.dataclass(frozen=True)
class CodeTrie:
    """Every prefix of an item's codes, and nothing else; a leaf is an item.

    Takes at most ``40 L + 16`` bytes per item, and less the more items share their prefixes.

    Args:
        levels: from the first code to the last; the nodes of the last are the leaves.
        items: int64 ``[N]``, the item of each leaf.
        leaves: int64 ``[N]``, the leaf of each item.
    """

    levels: tuple[TrieLevel, ...]
    items: torch.Tensor
    leaves: torch.Tensor

    @classmethod
    def of(cls, semantic_ids: SemanticIds, device: torch.device | str = "cpu") -> CodeTrie:
        """Build it by one sort of the items."""
        codes_NL = np.asarray(semantic_ids.codes)
        num_items, num_levels = codes_NL.shape
        items_N = np.lexsort(codes_NL.T[::-1])
        codes_NL = codes_NL[items_N]
        starts_NL = np.ones((num_items, num_levels), dtype=bool)  # whether a leaf is the first of its node
        np.logical_or.accumulate(codes_NL[1:] != codes_NL[:-1], axis=1, out=starts_NL[1:])
        tie_keys_N = tie_key(torch.from_numpy(items_N)).numpy()

        def moved(array: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(array, dtype=torch.int64, device=device)

        levels = []
        above_P = np.zeros(1, dtype=np.int64)  # the root's first leaf
        for level in range(num_levels):
            leaves_M = np.flatnonzero(starts_NL[:, level])
            first_children = np.append(np.searchsorted(leaves_M, above_P), len(leaves_M))
            levels.append(
                TrieLevel(
                    codes=moved(codes_NL[leaves_M, level]),
                    parents=moved(np.repeat(np.arange(len(above_P)), np.diff(first_children))),
                    first_children=moved(first_children),
                    max_children=int(np.diff(first_children).max()),
                    first_leaves=moved(np.append(leaves_M, num_items)),
                    tie_ranks=moved(_inverse(np.argsort(np.minimum.reduceat(tie_keys_N, leaves_M)))),
                )
            )
            above_P = leaves_M
        return cls(tuple(levels), items=moved(items_N), leaves=moved(_inverse(items_N)))


def _inverse(permutation: np.ndarray) -> np.ndarray:
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation))
    return inverse
