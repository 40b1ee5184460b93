"""Beam search among the items there are, for all users and beams at once; and what a model offers for it."""

# B = users of a batch, K = beams, V = codes of a level, F = children a node has at most, C = K F,
# S = items seen, E = nodes below which all are seen

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from muonrec.batch import SequenceBatch
from muonrec.data.semantic_ids.ids import SemanticIds
from muonrec.generation.trie import CodeTrie, TrieLevel


@runtime_checkable
class CodeDecoder(Protocol):
    """What generates: a user's score of an item is the log-probability of the item's codes, one after the other.

    The calls for a batch are `begin`, then `log_probs` of each level with `select` between two of them; every rank
    makes them equally often, also for an empty batch. Rows of a state beyond the users of the batch count for nothing.
    """

    semantic_ids: SemanticIds
    device: torch.device
    num_beams: int  # where the caller names no number

    def history_lengths(self, batch: SequenceBatch) -> torch.Tensor:
        """Int64 ``[B]``: events of the history that each user of the batch brings."""
        ...

    def begin(self, batch: SequenceBatch) -> Any:
        """The state of the B users of an evaluation batch on ``device``, before the first code."""
        ...

    def log_probs(self, state: Any, codes_BK: torch.Tensor | None, level: int) -> tuple[torch.Tensor, Any]:
        """Append ``codes_BK``, each beam's code of the level before, and say what comes next.

        Args:
            state: of K beams per user.
            codes_BK: int64, each a code of its level, also in beams that no item has; None on level 0, where K = 1.
            level: from 0.

        Returns:
            float32 ``[B, K, V]``, normalised over the codes of ``level``, and the state.
        """
        ...

    def select(self, state: Any, beams_BK: torch.Tensor) -> Any:
        """The state in which beam k of user b goes on from its beam ``beams_BK[b, k]``; K may change."""
        ...


class Beams(NamedTuple):
    """Items in order of falling score.

    Args:
        items: int64 ``[B, K]``, no item twice; -1 where a user has fewer.
        scores: float32 ``[B, K]``, natural logarithms of probabilities; ``-inf`` where the item is -1; NaN in the whole
            row where the decoder gave a number that is no log-probability.
    """

    items: torch.Tensor
    scores: torch.Tensor


@torch.no_grad()
def beam_search(
    decoder: CodeDecoder, trie: CodeTrie, batch: SequenceBatch, *, num_beams: int, seen: SeenLeaves | None = None
) -> Beams:
    """The items whose codes are the most probable, by a search that keeps ``num_beams`` prefixes of items per level.

    A prefix goes on only with codes that some item has, so every beam is an item. Their probabilities are not
    renormalised over those codes: a code with no alternative would cost nothing then, however improbable it is, while
    masking alone ranks items by their probability given that the codes are an item's. (Generation with a constraint in
    Hugging Face's transformers does likewise.) No item is missed where there are no more prefixes of any length than
    beams. Of equally probable prefixes those come first that `TrieLevel.tie_ranks` puts first, so what else is in the
    batch changes nothing.

    About ``B K (60 F + 5 V)`` bytes at the peak beside the decoder, with F at most V.

    Args:
        decoder: gives the probabilities.
        trie: of the decoder's semantic IDs, on its device.
        batch: an evaluation batch on that device.
        num_beams: prefixes kept, at least 1.
        seen: what to leave out; a prefix of nothing else takes up no beam.

    Returns:
        At most ``num_beams`` per row of the decoder's state.
    """
    state = decoder.begin(batch)
    log_probs_BKV, state = decoder.log_probs(state, None, 0)
    nodes_BK = torch.zeros(log_probs_BKV.shape[:2], dtype=torch.int64, device=log_probs_BKV.device)  # the root
    scores_BK = torch.zeros_like(nodes_BK, dtype=torch.float32)
    broken_B = torch.zeros_like(nodes_BK[:, 0], dtype=torch.bool)
    for depth, level in enumerate(trie.levels):
        broken_B |= ~(log_probs_BKV < math.inf).all(2).all(1)  # a comparison with NaN is false
        children_BKF, exists_BKF = _children(level, nodes_BK)
        scores_BKF = scores_BK.unsqueeze(2) + log_probs_BKV.gather(2, level.codes[children_BKF])
        scores_BKF.masked_fill_(~exists_BKF, -math.inf)
        if seen is not None:
            seen.mask(scores_BKF, nodes_BK, depth)
        order_BC = _order_of(scores_BKF, level.tie_ranks[children_BKF]).flatten(1)
        best_BK = order_BC.topk(min(num_beams, order_BC.shape[1]), dim=1).indices
        nodes_BK, scores_BK = children_BKF.flatten(1).gather(1, best_BK), scores_BKF.flatten(1).gather(1, best_BK)
        if depth + 1 < len(trie.levels):
            state = decoder.select(state, best_BK // level.max_children)
            log_probs_BKV, state = decoder.log_probs(state, level.codes[nodes_BK], depth + 1)
    items_BK = trie.items[nodes_BK].masked_fill_(scores_BK == -math.inf, -1)
    return Beams(items_BK, scores_BK.masked_fill_(broken_B.unsqueeze(1), math.nan))


class SeenLeaves:
    """What the users of a batch have seen, and on each level the nodes below which they have seen everything.

    Args:
        trie: on the device of the search.
        rows: int64 ``[S]``, of the batch.
        items: int64 ``[S]``, what the user of each row has seen; may repeat.
    """

    def __init__(self, trie: CodeTrie, rows: torch.Tensor, items: torch.Tensor) -> None:
        num_items = len(trie.items)
        pairs = (rows * num_items + trie.leaves[items]).unique()
        rows_S, leaves_S = pairs // num_items, pairs % num_items
        self._levels: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # rows, parents and children [E]
        for level in trie.levels:
            num_nodes = len(level.codes)
            nodes_S = torch.searchsorted(level.first_leaves, leaves_S, right=True) - 1
            pairs, num_seen = (rows_S * num_nodes + nodes_S).unique_consecutive(return_counts=True)
            rows_E, nodes_E = pairs // num_nodes, pairs % num_nodes
            all_seen = num_seen == level.first_leaves[nodes_E + 1] - level.first_leaves[nodes_E]
            rows_E, nodes_E = rows_E[all_seen], nodes_E[all_seen]
            parents_E = level.parents[nodes_E]
            self._levels.append((rows_E, parents_E, nodes_E - level.first_children[parents_E]))

    def mask(self, scores_BKF: torch.Tensor, nodes_BK: torch.Tensor, depth: int) -> None:
        """Set to ``-inf`` the scores of children of ``nodes_BK`` that lead to nothing unseen."""
        rows_E, parents_E, children_E = self._levels[depth]
        entries, beams = (nodes_BK[rows_E] == parents_E.unsqueeze(1)).nonzero(as_tuple=True)
        scores_BKF[rows_E[entries], beams, children_E[entries]] = -math.inf


def _children(level: TrieLevel, nodes_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The children ``[B, K, F]`` of nodes of the level above, and which of them there are; node 0 for others."""
    first_BK1 = level.first_children[nodes_BK].unsqueeze(2)
    places_F = torch.arange(level.max_children, device=nodes_BK.device)
    exists_BKF = places_F < level.first_children[nodes_BK + 1].unsqueeze(2) - first_BK1
    return torch.where(exists_BKF, first_BK1 + places_F, 0), exists_BKF


def _order_of(scores: torch.Tensor, tie_ranks: torch.Tensor) -> torch.Tensor:
    """An int64 that falls with the score and, at equal scores, with what comes later among ties.

    The bits of a float32, read as an integer, are in order of its value; those of a negative one in the reverse order.
    """
    bits = scores.view(torch.int32)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) - tie_ranks
