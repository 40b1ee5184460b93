"""Held-out items ranked by what a model generates; and the choice between this and scoring every item."""

# B = users of a batch, K = beams, N = users

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from muonrec.batch import SequenceBatch
from muonrec.generation.beam_search import Beams, CodeDecoder, SeenLeaves, beam_search
from muonrec.generation.trie import CodeTrie
from muonrec.mesh import Ranks
from muonrec.retrieval import (
    Encoder,
    RankedTargets,
    SeenItems,
    check_targets,
    gather_rows,
    in_order_of_users,
    left_out,
    rank_targets,
    rows_of_ranks,
)


def rank_held_out(
    model: Encoder | CodeDecoder,
    batches: Iterable[SequenceBatch],
    *,
    ranks: Ranks,
    k: int | None = None,
    num_beams: int | None = None,
    item_chunk: int = 8192,
    user_block: int = 2048,
    mask_seen: SeenItems | None = None,
    progress: Callable[[int], None] | None = None,
) -> RankedTargets:
    """Rank the held-out items by what the model offers: `rank_generated` if it generates, else `rank_targets`.

    Collective; arguments as there. What only the other of the two would take is ignored, but ``num_beams``.

    Raises:
        ValueError: ``num_beams`` is given and the model scores every item; or as there.
    """
    if isinstance(model, CodeDecoder):
        return rank_generated(
            model, batches, ranks=ranks, k=k, num_beams=num_beams, mask_seen=mask_seen, progress=progress
        )
    if num_beams is not None:
        raise ValueError(
            f"num_beams={num_beams} was asked, but the model generates nothing, it scores every item; leave it out"
        )
    return rank_targets(
        model,
        batches,
        ranks=ranks,
        k=k,
        item_chunk=item_chunk,
        user_block=user_block,
        mask_seen=mask_seen,
        progress=progress,
    )


@torch.no_grad()
def rank_generated(
    decoder: CodeDecoder,
    batches: Iterable[SequenceBatch],
    *,
    ranks: Ranks,
    k: int | None = None,
    num_beams: int | None = None,
    mask_seen: SeenItems | None = None,
    progress: Callable[[int], None] | None = None,
) -> RankedTargets:
    """Rank the held-out item of every user within the list of ``num_beams`` items that `beam_search` finds for them.

    Collective: every rank calls it with the same arguments and its own ``batches``, equally many on each (empty ones at
    the end). A user's list is made on the rank that has the user, and only the outcome is gathered, so it does not
    depend on the number of ranks, nor on which users share a batch, as far as the decoder's numbers do not.

    The items of a list count as in `rank_targets`. A held-out item outside of it counts as below all of the list, and
    `RankedTargets.list_length` says that nothing is known beyond; with at least as many beams as items it is None,
    since the list is then the ranking of the whole catalogue.

    Args:
        decoder: gives the probabilities.
        batches: evaluation batches: ``labels`` ``[B]`` holds the held-out item of each user.
        ranks: this rank among the others.
        k: also return the best ``k`` items of each user.
        num_beams: prefixes that the search keeps, and items of the list; None: ``decoder.num_beams``.
        mask_seen: the items that may not be generated; the held-out item always may, seen or not.
        progress: called after each batch with the number of users ranked so far, on every rank.

    Raises:
        ValueError: there are no users, a user comes twice, a held-out item is outside the catalogue, a log-probability
            is NaN or infinite upwards, a size is below 1, or ``k`` is above ``num_beams``. Raised on every rank.
    """
    num_beams = decoder.num_beams if num_beams is None else num_beams
    for name, value in (("k", k), ("num_beams", num_beams)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} was asked; it is at least 1")
    if k is not None and k > num_beams:
        raise ValueError(
            f"the best k={k} items of each user were asked, but the search keeps num_beams={num_beams}; "
            "raise num_beams or lower k"
        )
    num_items = len(decoder.semantic_ids.codes)
    trie = CodeTrie.of(decoder.semantic_ids, decoder.device)
    finished: list[RankedTargets] = []
    num_ranked = 0
    for batch in batches:
        batch = batch.to(decoder.device)
        seen = None if mask_seen is None else SeenLeaves(trie, *left_out(mask_seen, batch.user_ids, batch.labels))
        beams = beam_search(decoder, trie, batch, num_beams=num_beams, seen=seen)
        found = _gathered(_found(batch, decoder.history_lengths(batch), beams, num_beams, k), ranks)
        check_targets(found.numbers[:, 1], num_items)
        _check_scores(found)
        finished.append(_ranked(found, wants_lists=k is not None))
        num_ranked += len(found.numbers)
        if progress is not None:
            progress(num_ranked)
    ranked = in_order_of_users(finished)
    return dataclasses.replace(ranked, list_length=None if num_beams >= num_items else num_beams)


class _Found(NamedTuple):
    """Users' columns as int64, and their lists."""

    numbers: torch.Tensor  # int64 [B, 6]: user, target, greater, equal, history length, broken
    ids_BK: torch.Tensor  # int64
    scores_BK: torch.Tensor  # float32


def _found(batch: SequenceBatch, history_lengths: torch.Tensor, beams: Beams, num_beams: int, k: int | None) -> _Found:
    """Where the held-out items of this rank's users stand in their lists."""
    num_users = len(batch.labels)
    items_BK, scores_BK = beams.items[:num_users], beams.scores[:num_users]
    is_target_BK = items_BK == batch.labels.unsqueeze(1)
    own_B1 = scores_BK.masked_fill(~is_target_BK, -torch.inf).amax(1, keepdim=True)
    listed_B = is_target_BK.any(1)
    greater_B = torch.where(listed_B, (scores_BK > own_B1).sum(1), num_beams)
    equal_B = torch.where(listed_B, (scores_BK == own_B1).sum(1) - 1, 0)
    broken_B = scores_BK.isnan().any(1).long()
    numbers = torch.stack(
        [batch.user_ids, batch.labels, greater_B, equal_B, history_lengths[:num_users], broken_B], dim=1
    )
    width = k or 0
    missing = (0, max(width - items_BK.shape[1], 0))
    pad = torch.nn.functional.pad
    return _Found(
        numbers,
        pad(items_BK[:, :width], missing, value=-1),
        pad(scores_BK[:, :width], missing, value=-torch.inf),
    )


def _gathered(mine: _Found, ranks: Ranks) -> _Found:
    """The users of all ranks, on every rank, in order of the ranks."""
    if ranks.num_ranks == 1:
        return mine
    counts = rows_of_ranks(mine.numbers, ranks)
    return _Found(*(gather_rows(part.contiguous(), counts) for part in mine))


def _check_scores(found: _Found) -> None:
    broken = found.numbers[found.numbers[:, 5] != 0, 0]
    if len(broken):
        raise ValueError(
            f"the log-probabilities for {len(broken)} users are NaN or +inf (user {int(broken[0])} is one), so nothing "
            "can be ranked; evaluate an earlier checkpoint and look for the step at which the loss left its course"
        )


def _ranked(found: _Found, *, wants_lists: bool) -> RankedTargets:
    columns: list[np.ndarray] = list(found.numbers.T.cpu().numpy())
    return RankedTargets(
        user_ids=columns[0],
        targets=columns[1],
        num_greater=columns[2],
        num_equal=columns[3],
        history_lengths=columns[4],
        topk_ids=found.ids_BK.cpu().numpy() if wants_lists else None,
        topk_scores=found.scores_BK.cpu().numpy() if wants_lists else None,
    )
