"""Full ranking: every user against every item of a sharded table, in bounded memory, the same digits on any ranks."""

# B = users of a batch, U = users of a block, C = items of a chunk, D = width, K = places of a list, R = ranks

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist

from muonrec.batch import HISTORY, SequenceBatch
from muonrec.mesh import Ranks

# Ids of the items to leave out: user ids [U] -> (values int64 [sum of lengths], lengths int64 [U]).
SeenItems = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

# Users scored against a chunk at once on a CPU: few enough for the scores to stay in its cache until they are counted.
_CPU_TILE = 128


class Encoder(Protocol):
    """What is ranked: a user's score of an item is the inner product of two vectors.

    Both calls are collective where the model is sharded: every rank makes them equally often, and an empty batch or an
    empty id tensor is a valid argument.
    """

    num_items: int
    device: torch.device

    def user_vectors(self, batch: SequenceBatch) -> torch.Tensor:
        """float32 ``[B, D]`` of an evaluation batch on ``device``."""
        ...

    def item_vectors(self, item_ids: torch.Tensor) -> torch.Tensor:
        """float32 ``[C, D]`` of int64 ``item_ids`` ``[C]`` on ``device``."""
        ...


class PopularityEncoder:
    """Scores an item by its number of training events, for every user alike: the row every table is read against.

    Args:
        item_train_counts: ``[num_items]``; exact below 2^24 events of one item.
        device: of the vectors.
    """

    def __init__(self, item_train_counts: np.ndarray, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.num_items = len(item_train_counts)
        self._counts = torch.as_tensor(np.asarray(item_train_counts, dtype=np.float32), device=self.device)

    def user_vectors(self, batch: SequenceBatch) -> torch.Tensor:
        return torch.ones(batch.user_ids.numel(), 1, device=self.device)

    def item_vectors(self, item_ids: torch.Tensor) -> torch.Tensor:
        return self._counts[item_ids].unsqueeze(1)


@dataclasses.dataclass(frozen=True)
class RankedTargets:
    """Where each user's held-out item stands, in order of ``user_ids``; the same on every rank.

    Args:
        user_ids: int64 ``[N]``, increasing.
        targets: int64 ``[N]``, the held-out items.
        num_greater: int64 ``[N]``, items that score strictly higher than the held-out one.
        num_equal: int64 ``[N]``, other items with exactly its score.
        history_lengths: int64 ``[N]``, events of the history the encoder was given.
        topk_ids: int64 ``[N, K]``, best first, -1 where a user has fewer candidates; None unless asked.
        topk_scores: float32 ``[N, K]``, ``-inf`` where the id is -1; None unless asked.
        list_length: places of the list that the held-out items were looked for in: one that is not in it has at least
            so many that count as greater, and nothing is known of a longer list; None: the whole catalogue.
    """

    user_ids: np.ndarray
    targets: np.ndarray
    num_greater: np.ndarray
    num_equal: np.ndarray
    history_lengths: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_scores: np.ndarray | None = None
    list_length: int | None = None


def rank_by_popularity(ranked: RankedTargets, item_train_counts: np.ndarray) -> RankedTargets:
    """Rank the same users' held-out items by `PopularityEncoder`, without walking the users: all share one order.

    Equal to `rank_targets` with that encoder where nothing is left out.

    Args:
        ranked: says which users and items, and how many of the best.
        item_train_counts: int ``[num_items]``.
    """
    counts = np.asarray(item_train_counts)
    ascending, own_N = np.sort(counts), counts[ranked.targets]
    first_N, end_N = (np.searchsorted(ascending, own_N, side=side) for side in ("left", "right"))
    topk_ids = topk_scores = None
    if ranked.topk_ids is not None:
        k = ranked.topk_ids.shape[1]
        best = np.lexsort((tie_key(torch.arange(len(counts))).numpy(), -counts))[:k]
        missing = (0, k - len(best))
        ids_K = np.pad(best, missing, constant_values=-1)
        scores_K = np.pad(counts[best].astype(np.float32), missing, constant_values=-np.inf)
        topk_ids, topk_scores = (np.broadcast_to(row, (len(own_N), k)) for row in (ids_K, scores_K))
    return dataclasses.replace(
        ranked,
        num_greater=len(counts) - end_N,
        num_equal=end_N - first_N - 1,  # the held-out item equals itself
        topk_ids=topk_ids,
        topk_scores=topk_scores,
        list_length=None,
    )


@torch.no_grad()
def rank_targets(
    encoder: Encoder,
    batches: Iterable[SequenceBatch],
    *,
    ranks: Ranks,
    k: int | None = None,
    item_chunk: int = 8192,
    user_block: int = 2048,
    mask_seen: SeenItems | None = None,
    progress: Callable[[int], None] | None = None,
) -> RankedTargets:
    """Rank the held-out item of every user among all items.

    Collective: every rank calls it with the same arguments and its own ``batches``, equally many on each (empty ones at
    the end). A block of users is gathered on every rank; the items are walked in chunks, chunk j scored by rank
    ``j % num_ranks``; the counts are summed. The result is bit for bit the same for every number of ranks, chunk and
    block, provided that the encoder's vectors are: see `_snap`. Equal scores among the best ``k`` are put in the order
    of a hash of the item id (`tie_key`), so that no end of the catalogue is favoured.

    About this many bytes at the peak, on each rank, beside the encoder: ``U (12 D + 24 K) + 10 T C + 20 C D``, with
    ``U < user_block + num_ranks * B``, ``C = item_chunk`` and ``T = U``, on a CPU 128 at most; ``16 bytes`` per seen
    item of the block with ``mask_seen``; and ``40 + 12 K`` per user for the result. Each block reads the whole item
    table once, so a larger ``user_block`` means less communication.

    Args:
        encoder: gives the vectors.
        batches: evaluation batches: ``labels`` ``[B]`` holds the held-out item of each user.
        ranks: this rank among the others.
        k: also return the best ``k`` items of each user.
        item_chunk: items scored at once on a rank.
        user_block: users scored at once, rounded up to whole batches of all ranks.
        mask_seen: the items that count for nothing; the held-out item is never left out, seen or not. None: all items
            compete.
        progress: called after each block with the number of users ranked so far, on every rank.

    Raises:
        ValueError: there are no users, a user comes twice, a held-out item is outside the catalogue, a vector is not
            finite (a score that is no number would otherwise pass for the best of ranks), or a size is below 1. Raised
            on every rank.
    """
    for name, value in (("k", k), ("item_chunk", item_chunk), ("user_block", user_block)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} was asked; it is at least 1")
    finished: list[RankedTargets] = []
    waiting: list[_Users] = []
    num_waiting = num_ranked = 0

    def finish_block() -> None:
        nonlocal num_waiting, num_ranked
        users = _Users(*(torch.cat(parts) for parts in zip(*waiting, strict=True)))
        waiting.clear()
        finished.append(_rank_block(encoder, users, ranks, k, item_chunk, mask_seen))
        num_ranked += num_waiting
        num_waiting = 0
        if progress is not None:
            progress(num_ranked)

    for batch in batches:
        users = _gathered(_encoded(encoder, batch.to(encoder.device)), ranks)
        waiting.append(users)
        num_waiting += len(users.user_ids)
        if num_waiting >= user_block:
            finish_block()
    if num_waiting:
        finish_block()
    return in_order_of_users(finished)


class _Users(NamedTuple):
    vectors_UD: torch.Tensor  # float32
    user_ids: torch.Tensor
    targets: torch.Tensor
    history_lengths: torch.Tensor
    target_scores: torch.Tensor  # float64


def _encoded(encoder: Encoder, batch: SequenceBatch) -> _Users:
    """This rank's users and the score each gives its held-out item."""
    inside = (batch.labels >= 0) & (batch.labels < encoder.num_items)
    # An empty batch has one empty row where a KeyedJaggedTensor must not have none; the labels say how many are users.
    num_users = len(batch.labels)
    vectors_BD = encoder.user_vectors(batch)[:num_users]
    lengths_B = batch.features[HISTORY].lengths()[:num_users].long()
    targets_BD = encoder.item_vectors(torch.where(inside, batch.labels, 0))
    scores_B = (_snap(vectors_BD) * _snap(targets_BD)).sum(1)
    return _Users(vectors_BD.float(), batch.user_ids, batch.labels, lengths_B, scores_B)


def _gathered(mine: _Users, ranks: Ranks) -> _Users:
    """The users of all ranks, on every rank, in order of the ranks."""
    if ranks.num_ranks == 1:
        return mine
    sizes = rows_of_ranks(mine.user_ids, ranks)
    # Scores travel as their bits: one collective for everything that is eight bytes wide.
    numbers = torch.stack([*mine[1:4], mine.target_scores.view(torch.int64)], dim=1)
    numbers = gather_rows(numbers, sizes)
    user_ids, targets, lengths, bits = (column.contiguous() for column in numbers.unbind(1))
    return _Users(gather_rows(mine.vectors_UD, sizes), user_ids, targets, lengths, bits.view(torch.float64))


def rows_of_ranks(rows: torch.Tensor, ranks: Ranks) -> list[int]:
    """How many ``rows`` each rank has; collective."""
    sizes_R = torch.empty(ranks.num_ranks, dtype=torch.int64, device=rows.device)
    dist.all_gather_single(sizes_R, torch.tensor([len(rows)], device=rows.device))
    return sizes_R.tolist()


def gather_rows(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The ``rows`` of all ranks, of which rank r has ``sizes[r]``, on every rank in order of the ranks; collective."""
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(len(sizes) * max(sizes), *rows.shape[1:])
    dist.all_gather_single(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered.split(max(sizes) or 1), sizes, strict=False)])


def _rank_block(
    encoder: Encoder, users: _Users, ranks: Ranks, k: int | None, item_chunk: int, mask_seen: SeenItems | None
) -> RankedTargets:
    num_items, device = encoder.num_items, users.vectors_UD.device
    _check_users(users, num_items)
    num_users = len(users.user_ids)
    tile = _CPU_TILE if device.type == "cpu" else num_users
    tiles = [
        _Tile(_Users(*(part[row : row + tile] for part in users)), k, mask_seen) for row in range(0, num_users, tile)
    ]
    num_broken = torch.zeros(1, dtype=torch.int64, device=device)

    num_chunks = -(-num_items // item_chunk)
    for first_chunk in range(0, num_chunks, ranks.num_ranks):
        first = min((first_chunk + ranks.rank) * item_chunk, num_items)
        last = min(first + item_chunk, num_items)
        # Collective: also by a rank that has run out of chunks.
        items_CD = encoder.item_vectors(torch.arange(first, last, device=device))
        if first == last:
            continue
        num_broken += (~torch.isfinite(items_CD).all(1)).sum()
        snapped_CD = _snap(items_CD)
        for one in tiles:
            one.score(snapped_CD, first)

    counts = torch.cat([torch.cat([one.counts_2U for one in tiles], dim=1).flatten(), num_broken])
    best = None if k is None else _Best.of_users([one.best for one in tiles if one.best is not None])
    if ranks.num_ranks > 1:
        dist.all_reduce(counts)
        if best is not None:
            best = best.over_ranks(ranks)
    num_greater, num_equal = counts[:-1].view(2, num_users).cpu().numpy()
    broken = int(counts[-1])
    if broken:
        raise ValueError(
            f"{broken} of {num_items} item vectors are not finite, so no rank can be told; "
            "evaluate an earlier checkpoint and look for the step at which the loss left its course"
        )
    num_equal = num_equal - 1  # the held-out item equals itself
    assert (num_equal >= 0).all(), "a held-out item does not score what its own row scores"
    ids, scores = (None, None) if best is None else best.to_numpy()
    return RankedTargets(
        user_ids=users.user_ids.cpu().numpy(),
        targets=users.targets.cpu().numpy(),
        num_greater=num_greater,
        num_equal=num_equal,
        history_lengths=users.history_lengths.cpu().numpy(),
        topk_ids=ids,
        topk_scores=scores,
    )


def check_targets(targets: torch.Tensor, num_items: int) -> None:
    """Refuse held-out items outside the catalogue, by ValueError."""
    outside = targets[(targets < 0) | (targets >= num_items)]
    if len(outside):
        raise ValueError(
            f"held-out item {int(outside[0])} is outside the {num_items} items of the model; "
            "evaluate on the data set that the model was trained on"
        )


def _check_users(users: _Users, num_items: int) -> None:
    check_targets(users.targets, num_items)
    broken = users.user_ids[~torch.isfinite(users.vectors_UD).all(1)]
    if len(broken):
        raise ValueError(
            f"the vectors of {len(broken)} users are not finite (user {int(broken[0])} is one), so no rank can be "
            "told; evaluate an earlier checkpoint and look for the step at which the loss left its course"
        )


def _snap(vectors: torch.Tensor) -> torch.Tensor:
    """Round each row to a grid on which float64 inner products are exact, whatever the order of the sums.

    A float64 holds integers up to 2^53. With components of ``b`` bits, ``2 b + log2(D) <= 53`` leaves no sum of
    products anything to round. So scores do not depend on chunks, ranks or how a BLAS blocks, and equal rows tie
    exactly. A row moves by at most 2^-b of its largest component, b = 23 for D up to 128: what float32 resolves.

    Args:
        vectors: ``[rows, D]``, floating point; rows that are not finite come out as anything.

    Returns:
        float64 ``[rows, D]``.
    """
    bits = (53 - math.ceil(math.log2(max(vectors.shape[1], 1)))) // 2
    if vectors.numel() == 0:
        return vectors.double()
    exponent = torch.frexp(vectors.float().abs().amax(1, keepdim=True)).exponent.long() - bits
    # 2^exponent from its bits: torch.ldexp goes through float32, which has not the range.
    step = ((exponent.clamp(-1000, 1000) + 1023) << 52).view(torch.float64)
    return (vectors.double() / step).round_().mul_(step)


def left_out(mask_seen: SeenItems, user_ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ``user_ids`` and the items that each leaves out, int64 and equally long, on the device of the ids."""
    seen = mask_seen(user_ids.cpu().numpy())
    items, lengths = (torch.as_tensor(part, dtype=torch.int64, device=user_ids.device) for part in seen)
    rows = torch.arange(len(lengths), device=user_ids.device).repeat_interleave(lengths)
    other = items != targets[rows]  # the held-out item always competes
    return rows[other], items[other]


class _Tile:
    """Some users of a block, and what is known of them after the chunks so far."""

    def __init__(self, users: _Users, k: int | None, mask_seen: SeenItems | None) -> None:
        self._users_UD, self._scores_U1 = _snap(users.vectors_UD), users.target_scores.unsqueeze(1)
        self._seen = None if mask_seen is None else _Seen(mask_seen, users)
        num_users, device = len(users.user_ids), users.vectors_UD.device
        self.counts_2U = torch.zeros(2, num_users, dtype=torch.int64, device=device)  # of greater and of equal scores
        self.best = None if k is None else _Best.none(k, num_users, device)

    def score(self, items_CD: torch.Tensor, first: int) -> None:
        """Take in a chunk: the vectors, as `_snap` gives them, of the items from ``first`` on."""
        scores_UC = self._users_UD @ items_CD.T
        if self._seen is not None:
            self._seen.mask(scores_UC, first, first + len(items_CD))
        self.counts_2U[0] += (scores_UC > self._scores_U1).sum(1)
        self.counts_2U[1] += (scores_UC == self._scores_U1).sum(1)
        if self.best is not None:
            ids_C = torch.arange(first, first + len(items_CD), device=scores_UC.device)
            self.best = self.best.with_chunk(scores_UC, ids_C)


class _Seen:
    """The (user, item) pairs of a block that are left out, in order of the items."""

    def __init__(self, mask_seen: SeenItems, users: _Users) -> None:
        rows, items = left_out(mask_seen, users.user_ids, users.targets)
        self._items, order = items.sort()
        self._rows = rows[order]

    def mask(self, scores_UC: torch.Tensor, first: int, last: int) -> None:
        begin, end = torch.searchsorted(self._items, torch.tensor([first, last], device=self._items.device)).tolist()
        scores_UC[self._rows[begin:end], self._items[begin:end] - first] = -math.inf


class _Best(NamedTuple):
    """The best items of each user so far, at most K; ``-inf`` marks an item left out."""

    k: int
    scores: torch.Tensor  # float64 [U, <= K]
    ids: torch.Tensor  # int64 [U, <= K]

    @classmethod
    def none(cls, k: int, num_users: int, device: torch.device) -> _Best:
        empty = torch.empty(num_users, 0, dtype=torch.float64, device=device)
        return cls(k, empty, empty.long())

    @classmethod
    def of_users(cls, parts: Sequence[_Best]) -> _Best:
        """The parts, all after the same chunks, below each other."""
        return cls(parts[0].k, torch.cat([part.scores for part in parts]), torch.cat([part.ids for part in parts]))

    def with_chunk(self, scores_UC: torch.Tensor, ids_C: torch.Tensor) -> _Best:
        k = self.k
        if len(ids_C) <= k:
            return self._merged(scores_UC, ids_C.expand_as(scores_UC))
        scores_UK, columns_UK = scores_UC.topk(k + 1, dim=1)
        # Which of several equal scores topk keeps is its own affair: where the cut falls among equals, sort in full.
        cut = ((scores_UK[:, k - 1] == scores_UK[:, k]) & torch.isfinite(scores_UK[:, k])).nonzero()[:, 0]
        by_key_C = tie_key(ids_C).argsort()
        for rows in cut.split(64):
            order = scores_UC[rows][:, by_key_C].argsort(dim=1, descending=True, stable=True)[:, :k]
            columns_UK[rows, :k] = by_key_C[order]
            scores_UK[rows, :k] = scores_UC[rows].gather(1, by_key_C[order])
        return self._merged(scores_UK[:, :k], ids_C[columns_UK[:, :k]])

    def over_ranks(self, ranks: Ranks) -> _Best:
        parts = []
        for mine in self._padded():  # a rank may have had few items, or none
            everyone = mine.new_empty(ranks.num_ranks * len(mine), self.k)
            dist.all_gather_single(everyone, mine.contiguous())
            parts.append(torch.cat(everyone.split(len(mine)), dim=1))
        return _Best.none(self.k, len(self.scores), self.scores.device)._merged(*parts)

    def to_numpy(self) -> tuple[np.ndarray, np.ndarray]:
        scores, ids = self._padded()
        ids = torch.where(torch.isinf(scores), -1, ids)
        return ids.cpu().numpy(), scores.float().cpu().numpy()

    def _merged(self, scores: torch.Tensor, ids: torch.Tensor) -> _Best:
        scores, ids = torch.cat([self.scores, scores], 1), torch.cat([self.ids, ids], 1)
        by_key = tie_key(ids).argsort(dim=1)
        scores, ids = scores.gather(1, by_key), ids.gather(1, by_key)
        by_score = scores.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        return _Best(self.k, scores.gather(1, by_score), ids.gather(1, by_score))

    def _padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        missing = (0, self.k - self.scores.shape[1])
        pad = torch.nn.functional.pad
        return pad(self.scores, missing, value=-math.inf), pad(self.ids, missing, value=-1)


def tie_key(ids: torch.Tensor) -> torch.Tensor:
    """A number per item that says nothing about it: multiplication by 2^64 over the golden ratio (Knuth 1973, 6.4)."""
    return ((ids + 1) * -7046029254386353131) & (2**62 - 1)


def in_order_of_users(blocks: list[RankedTargets]) -> RankedTargets:
    """Blocks of users as one, in order of the users. Raises ValueError if there are none, or one comes twice."""
    if not any(len(block.user_ids) for block in blocks):
        raise ValueError("no batch held a user to rank; check the part that was asked and the data set's split")
    user_ids = np.concatenate([block.user_ids for block in blocks])
    order = np.argsort(user_ids, kind="stable")
    twice = user_ids[order][1:][np.diff(user_ids[order]) == 0]
    if len(twice):
        raise ValueError(
            f"user {twice[0]} came more than once; deal every user to one batch of one rank, as evaluation_batches does"
        )
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(RankedTargets):
        parts = [getattr(block, field.name) for block in blocks]
        columns[field.name] = None if parts[0] is None else np.concatenate(parts)[order]
    return RankedTargets(**columns)
