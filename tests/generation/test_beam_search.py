"""Beam search against exhaustive scoring and a plain Python twin, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.generation import random_ids
from muonrec.generation import Beams, CodeTrie, SeenLeaves, beam_search
from tests.generation.decoders import AttentiveDecoder, TableDecoder, plain_beam_search
from tests.test_retrieval import batch_of

USERS = np.array([3, 11, 4, 30])
# The last has more codes than items on a level, and one with a single code; and there is a catalogue of one item.
CATALOGUES = [(40, (5, 4, 3, 2)), (24, (4, 1, 9)), (1, (3, 2))]


def searched(decoder, users: np.ndarray, num_beams: int, seen: list[set[int]] | None = None) -> Beams:
    trie = CodeTrie.of(decoder.semantic_ids)
    leaves = None
    if seen is not None:
        rows = [row for row, items in enumerate(seen) for _ in items] * 2  # what was seen twice is seen
        leaves = SeenLeaves(trie, torch.tensor(rows), torch.tensor([item for items in seen for item in items] * 2))
    return beam_search(decoder, trie, batch_of(users), num_beams=num_beams, seen=leaves)


def assert_is(found: Beams, row: int, expected: dict[int, float]) -> None:
    """The same items in the same order, and nothing behind them."""
    items, scores = found.items[row].tolist(), found.scores[row].tolist()
    num_missing = len(items) - len(expected)
    assert items == [*expected, *[-1] * num_missing]
    assert scores == pytest.approx([*expected.values(), *[-np.inf] * num_missing], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("make", [TableDecoder, AttentiveDecoder])
@pytest.mark.parametrize(("num_items", "sizes"), CATALOGUES)
def test_search_equals_its_plain_twin_and_with_enough_beams_scores_every_item(make, num_items, sizes):
    decoder = make(random_ids(num_items, sizes))
    for num_beams in (1, 3, 12, num_items, num_items + 5):
        found = searched(decoder, USERS, num_beams)
        assert found.items.shape == found.scores.shape and found.scores.dtype == torch.float32
        for row, user in enumerate(USERS):
            expected = plain_beam_search(decoder, batch_of(np.array([user])), num_beams)
            assert len(expected) == min(num_beams, num_items)
            assert_is(found, row, expected)


def test_exhaustive_scores_are_the_sum_over_the_codes():
    # Not by way of prefixes: the twin and the search might agree on a wrong one.
    decoder = AttentiveDecoder(random_ids(40, (5, 4, 3, 2)))
    codes = torch.from_numpy(decoder.semantic_ids.codes)
    log_probs, state = decoder.log_probs(decoder.begin(batch_of(USERS)), None, 0)
    state = decoder.select(state, torch.zeros(len(USERS), 40, dtype=torch.int64))
    log_probs, scores = log_probs.expand(-1, 40, -1), torch.zeros(len(USERS), 40, dtype=torch.float64)
    for level in range(4):
        code_BK = codes[:, level].expand(len(USERS), -1)
        scores += log_probs.gather(2, code_BK.unsqueeze(2)).squeeze(2)
        if level < 3:
            log_probs, state = decoder.log_probs(state, code_BK, level + 1)
    best = scores.sort(dim=1, descending=True)
    found = searched(decoder, USERS, 40)
    assert torch.equal(found.items, best.indices)
    torch.testing.assert_close(found.scores.double(), best.values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [TableDecoder, AttentiveDecoder])
def test_what_was_seen_is_left_out_and_takes_up_no_beam(make):
    decoder = make(random_ids(40, (5, 4, 3, 2)))
    first_codes = decoder.semantic_ids.codes[:, 0]
    favourites = [set(found) for found in searched(decoder, USERS, 6).items.tolist()]
    whole_prefixes = [set(np.flatnonzero(first_codes != code).tolist()) for code in first_codes[[0, 1, 2, 3]]]
    for seen in (favourites, whole_prefixes, [set(), set(range(40)), set(range(39)), favourites[3]]):
        for num_beams in (1, 5, 40):
            found = searched(decoder, USERS, num_beams, seen)
            for row, user in enumerate(USERS):
                expected = plain_beam_search(decoder, batch_of(np.array([user])), num_beams, seen[row])
                assert len(expected) == min(num_beams, 40 - len(seen[row]))
                assert_is(found, row, expected)


def test_nothing_but_equals_come_as_in_a_ranking_of_all_items_whatever_the_batch():
    class EvenDecoder(TableDecoder):
        def log_probs(self, state, codes_BK, level):
            log_probs, state = super().log_probs(state, codes_BK, level)
            return torch.full_like(log_probs, -1.0), state

    decoder = EvenDecoder(random_ids(40, (5, 4, 3, 2)))
    together = searched(decoder, USERS, 7)
    everything = searched(decoder, USERS, 40)
    assert torch.equal(together.items, everything.items[:, :7])
    for row, user in enumerate(USERS):
        alone = searched(decoder, np.array([user]), 7)
        assert torch.equal(alone.items[0], together.items[row]) and torch.equal(alone.scores[0], together.scores[row])
        assert_is(together, row, plain_beam_search(decoder, batch_of(np.array([user])), 7))


@pytest.mark.parametrize("make", [TableDecoder, AttentiveDecoder])
def test_a_user_alone_has_the_list_of_the_batch(make):
    decoder = make(random_ids(40, (5, 4, 3, 2)))
    together = searched(decoder, USERS, 6)
    for row, user in enumerate(USERS):
        alone = searched(decoder, np.array([user]), 6)
        assert torch.equal(alone.items[0], together.items[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row])


def test_no_probability_at_all_is_no_item_and_no_number_is_told():
    class OddDecoder(TableDecoder):
        def log_probs(self, state, codes_BK, level):
            log_probs, state = super().log_probs(state, codes_BK, level)
            if level == 1:
                log_probs[0, :, 0] = -torch.inf
                log_probs[1, 0, -1] = torch.nan
                log_probs[2, 0, -1] = torch.inf
            return log_probs, state

    decoder = OddDecoder(random_ids(40, (5, 4, 3, 2)))
    found = searched(decoder, USERS, 40)
    never = set(np.flatnonzero(decoder.semantic_ids.codes[:, 1] == 0).tolist())
    assert set(found.items[0].tolist()) == set(range(40)) - never | {-1}
    assert found.scores.isnan().all(1).tolist() == [False, True, True, False]
