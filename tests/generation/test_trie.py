"""The trie against a dict of prefixes."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.generation import random_ids
from muonrec.data.semantic_ids.ids import SemanticIds
from muonrec.generation import CodeTrie
from tests.generation.decoders import tie_key


@st.composite
def catalogues(draw) -> SemanticIds:
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    num_items = draw(st.integers(1, int(np.prod(sizes))))
    return random_ids(num_items, sizes, seed=draw(st.integers(0, 99)))


@given(catalogues())
@settings(max_examples=60, deadline=None)
def test_trie_holds_the_prefixes_of_items_and_nothing_else(semantic_ids):
    trie = CodeTrie.of(semantic_ids)
    rows = [tuple(row) for row in semantic_ids.codes.tolist()]
    assert sorted(rows) == [rows[item] for item in trie.items.tolist()]
    assert trie.items[trie.leaves].tolist() == list(range(len(rows)))

    above = [()]  # prefixes of the nodes, in their order
    for depth, level in enumerate(trie.levels):
        prefixes = sorted({row[: depth + 1] for row in rows})
        assert level.codes.tolist() == [prefix[-1] for prefix in prefixes]
        assert [above[parent] for parent in level.parents.tolist()] == [prefix[:-1] for prefix in prefixes]
        bounds = level.first_children.tolist()
        children = [prefixes[first:last] for first, last in itertools.pairwise(bounds)]
        assert children == [[prefix for prefix in prefixes if prefix[:-1] == parent] for parent in above]
        assert level.max_children == max(map(len, children))
        bounds = level.first_leaves.tolist()
        below = [trie.items[first:last].tolist() for first, last in itertools.pairwise(bounds)]
        assert [{rows[item][: depth + 1] for item in items} for items in below] == [{prefix} for prefix in prefixes]
        keys = [min(map(tie_key, items)) for items in below]
        assert np.argsort(level.tie_ranks.numpy()).tolist() == np.argsort(keys).tolist()
        above = prefixes


def test_memory_is_linear_in_the_items():
    for num_items in (1_000, 50_000):
        trie = CodeTrie.of(random_ids(num_items, (64, 64, 64, 64)))
        tensors = [trie.items, trie.leaves, *(part for level in trie.levels for part in level if part is not level[3])]
        assert sum(part.nbytes for part in tensors) < num_items * (40 * 4 + 16)
