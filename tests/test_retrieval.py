"""Ranking against a plain twin in exact arithmetic, and bit-identical over ranks, chunks and blocks."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from muonrec.batch import CANDIDATES, HISTORY, TARGETS, SequenceBatch
from muonrec.mesh import Ranks
from muonrec.retrieval import PopularityEncoder, RankedTargets, _snap, rank_by_popularity, rank_targets
from tests.distributed.ranks import run_on_ranks

NUM_USERS, NUM_ITEMS, WIDTH, BATCH_SIZE = 37, 53, 8, 5
ALONE = Ranks(rank=0, num_ranks=1, device=torch.device("cpu"))


class TableEncoder:
    """Rows of two tables in memory; counts its calls, since every rank must make equally many."""

    def __init__(self, users_UD: torch.Tensor, items_CD: torch.Tensor) -> None:
        self.users_UD, self.items_CD = users_UD, items_CD
        self.num_items, self.device, self.num_lookups = len(items_CD), torch.device("cpu"), 0

    def user_vectors(self, batch: SequenceBatch) -> torch.Tensor:
        return self.users_UD[batch.user_ids]

    def item_vectors(self, item_ids: torch.Tensor) -> torch.Tensor:
        self.num_lookups += 1
        return self.items_CD[item_ids]


def made_up_encoder() -> TableEncoder:
    generator = torch.Generator().manual_seed(4)
    users = torch.randn(NUM_USERS, WIDTH, generator=generator)
    items = torch.randn(NUM_ITEMS, WIDTH, generator=generator)
    items[40:52] = items[3]  # ties, in different chunks
    items[7:10] = 0.0
    return TableEncoder(users, items)


def made_up_targets() -> np.ndarray:
    targets = np.random.default_rng(0).integers(0, NUM_ITEMS, NUM_USERS)
    targets[::6] = 3
    targets[1::6] = 45
    return targets


def made_up_seen(user_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items from ``3 u`` on, ``u % 7`` of them; user 6 has seen its target and most of the catalogue."""
    lists = [[(3 * u + j) % NUM_ITEMS for j in range(u % 7)] for u in user_ids.tolist()]
    lists = [list(range(50)) if u == 6 else items for u, items in zip(user_ids.tolist(), lists, strict=True)]
    return np.array([item for items in lists for item in items], dtype=np.int64), np.array(
        [len(items) for items in lists]
    )


def batch_of(user_ids: np.ndarray) -> SequenceBatch:
    user_ids = torch.as_tensor(user_ids)
    history_lengths = user_ids % 4 + 1
    rows = max(len(user_ids), 1)  # an empty batch has one empty row, as the loader's has
    lengths = torch.zeros(3, rows, dtype=torch.int64)
    lengths[0, : len(user_ids)] = history_lengths
    features = KeyedJaggedTensor(
        keys=[HISTORY, TARGETS, CANDIDATES],
        values=torch.zeros(int(history_lengths.sum()), dtype=torch.int64),
        lengths=lengths.flatten(),
        stride=rows,
    )
    fields = {field.name for field in dataclasses.fields(SequenceBatch)}
    more = {"log_q": torch.empty(0), "groups": []}  # what training alone needs
    return SequenceBatch(
        features=features,
        labels=torch.as_tensor(made_up_targets())[user_ids],
        user_ids=user_ids,
        **{name: value for name, value in more.items() if name in fields},
    )


def batches_of(ranks: Ranks) -> list[SequenceBatch]:
    users = np.random.default_rng(1).permutation(NUM_USERS)
    num_rounds = -(-NUM_USERS // (BATCH_SIZE * ranks.num_ranks))
    firsts = [(round_ * ranks.num_ranks + ranks.rank) * BATCH_SIZE for round_ in range(num_rounds)]
    return [batch_of(users[first : first + BATCH_SIZE]) for first in firsts]


def plain_twin(encoder: TableEncoder, k: int, seen=None) -> RankedTargets:
    """One user and one item at a time, in fractions."""
    users, items = _snap(encoder.users_UD).tolist(), _snap(encoder.items_CD).tolist()
    users, items = ([[Fraction(x) for x in row] for row in table] for table in (users, items))
    targets = made_up_targets()
    columns = {"num_greater": [], "num_equal": [], "topk_ids": [], "topk_scores": []}
    for user, target in enumerate(targets.tolist()):
        left_out = set() if seen is None else set(seen(np.array([user]))[0].tolist()) - {target}
        scores = {
            item: sum(x * y for x, y in zip(users[user], row, strict=True))
            for item, row in enumerate(items)
            if item not in left_out
        }
        columns["num_greater"].append(sum(score > scores[target] for score in scores.values()))
        columns["num_equal"].append(sum(score == scores[target] for score in scores.values()) - 1)
        keys = {item: ((item + 1) * 0x9E3779B97F4A7C15) % 2**62 for item in scores}
        best = sorted(scores, key=lambda item: (-scores[item], keys[item]))[:k]
        columns["topk_ids"].append(best + [-1] * (k - len(best)))
        columns["topk_scores"].append([float(scores[item]) for item in best] + [-np.inf] * (k - len(best)))
    columns = {name: np.array(values) for name, values in columns.items()}
    columns["topk_scores"] = columns["topk_scores"].astype(np.float32)
    user_ids = np.arange(NUM_USERS)
    return RankedTargets(user_ids=user_ids, targets=targets, history_lengths=user_ids % 4 + 1, **columns)


def assert_same(found: RankedTargets, expected: RankedTargets) -> None:
    for field in dataclasses.fields(RankedTargets):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert (one is None) == (other is None), field.name
        if one is not None:
            np.testing.assert_array_equal(one, other, err_msg=field.name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("item_chunk", "user_block", "k", "tile"), [(8192, 2048, 6, 128), (7, 1, 6, 3), (10, 11, 3, 4), (1, 20, 60, 3)]
)
def test_rank_targets_equals_the_plain_twin(monkeypatch, item_chunk, user_block, k, tile, masked):
    monkeypatch.setattr("muonrec.retrieval._CPU_TILE", tile)
    seen = made_up_seen if masked else None
    ranked = rank_targets(
        made_up_encoder(),
        batches_of(ALONE),
        ranks=ALONE,
        k=k,
        item_chunk=item_chunk,
        user_block=user_block,
        mask_seen=seen,
    )
    assert ranked.num_equal.max() >= 12 - 1
    assert_same(ranked, plain_twin(made_up_encoder(), k, seen))


def ranked_here(item_chunk: int, user_block: int, k: int | None, masked: bool) -> tuple[RankedTargets, int]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    encoder = made_up_encoder()
    seen = made_up_seen if masked else None
    ranked = rank_targets(
        encoder,
        batches_of(ranks),
        ranks=ranks,
        k=k,
        item_chunk=item_chunk,
        user_block=user_block,
        mask_seen=seen,
    )
    return ranked, encoder.num_lookups


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_ranks_gives_the_bits_of_one(num_ranks):
    for item_chunk, user_block, k, masked in [(7, 11, 6, True), (8192, 2048, 60, True), (10, 1, None, False)]:
        seen = made_up_seen if masked else None
        alone = rank_targets(made_up_encoder(), batches_of(ALONE), ranks=ALONE, k=k, mask_seen=seen)
        results = run_on_ranks(num_ranks, ranked_here, item_chunk, user_block, k, masked)
        for ranked, _ in results:
            assert_same(ranked, alone)
        assert len({num_lookups for _, num_lookups in results}) == 1


def test_snapped_inner_products_do_not_depend_on_the_order_of_the_sum():
    generator = torch.Generator().manual_seed(0)
    for width in (1, 3, 64, 128, 1000):
        # components of very different size: where float64 sums would round
        users = torch.randn(20, width, generator=generator) * 10 ** torch.empty(20, width).uniform_(-6, 3)
        items = torch.randn(30, width, generator=generator) * 10 ** torch.empty(30, width).uniform_(-6, 3)
        order = torch.randperm(width, generator=generator)
        scores = _snap(users) @ _snap(items).T
        assert torch.equal(scores, _snap(users)[:, order] @ _snap(items)[:, order].T)
        assert torch.equal(scores[:, 3:5], _snap(users) @ _snap(items)[3:5].T)
        assert torch.equal(scores[2, 3], (_snap(users[2:3]) * _snap(items[3:4])).flip(1).cumsum(1)[0, -1])


def test_snap_moves_a_row_by_less_than_float32_resolves():
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 1e-30
    moved = (_snap(rows) - rows.double()).abs().amax(1) / rows.double().abs().amax(1)
    assert moved.max() <= 2.0**-23
    assert torch.equal(_snap(torch.zeros(2, 3)), torch.zeros(2, 3, dtype=torch.float64))
    counts = torch.arange(2**24 - 50, 2**24).float().unsqueeze(1)
    assert torch.equal(_snap(counts), counts.double())


def test_popularity_ranks_by_training_count_with_ties():
    counts = np.array([5] * 10 + [9] * 4 + [0] * (NUM_ITEMS - 14))
    ranked = rank_targets(PopularityEncoder(counts), batches_of(ALONE), ranks=ALONE, k=6, item_chunk=8)
    held_out = counts[ranked.targets]
    np.testing.assert_array_equal(ranked.num_greater, [(counts > count).sum() for count in held_out])
    np.testing.assert_array_equal(ranked.num_equal, [(counts == count).sum() - 1 for count in held_out])
    assert (ranked.topk_ids == ranked.topk_ids[0]).all()
    assert sorted(ranked.topk_ids[0, :4]) == [10, 11, 12, 13]


def test_progress_ends_at_the_number_of_users():
    seen_progress = []
    rank_targets(made_up_encoder(), batches_of(ALONE), ranks=ALONE, user_block=10, progress=seen_progress.append)
    assert seen_progress == [10, 20, 30, 37]


def refused_here(broken: str) -> str:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    encoder = made_up_encoder()
    if broken == "item":
        encoder.items_CD[50] = float("nan")
    else:
        encoder.users_UD[36, 2] = float("inf")
    with pytest.raises(ValueError) as error:
        rank_targets(encoder, batches_of(ranks), ranks=ranks, item_chunk=7)
    return str(error.value)


def test_vectors_that_are_not_finite_are_refused_on_every_rank():
    for message in run_on_ranks(2, refused_here, "item"):
        assert message.startswith("1 of 53 item vectors are not finite")
    for message in run_on_ranks(2, refused_here, "user"):
        assert message.startswith("the vectors of 1 users are not finite (user 36 is one)")


def test_a_user_who_comes_twice_is_refused():
    batches = [batch_of(np.array([1, 2])), batch_of(np.array([2]))]
    with pytest.raises(ValueError, match="user 2 came more than once"):
        rank_targets(made_up_encoder(), batches, ranks=ALONE)


def test_nobody_to_rank_is_refused():
    with pytest.raises(ValueError, match="no batch held a user"):
        rank_targets(made_up_encoder(), [batch_of(np.array([], dtype=np.int64))], ranks=ALONE)


def test_a_held_out_item_outside_the_catalogue_is_refused():
    batch = batch_of(np.array([1]))
    batch.labels[0] = NUM_ITEMS
    with pytest.raises(ValueError, match="held-out item 53 is outside the 53 items"):
        rank_targets(made_up_encoder(), [batch], ranks=ALONE)


@pytest.mark.parametrize("k", [None, 6, NUM_ITEMS + 4])
def test_ranking_by_popularity_at_once_equals_walking_the_users(k: int | None) -> None:
    counts = np.random.default_rng(3).integers(0, 6, NUM_ITEMS)  # few values: many ties, also at the cut
    walked = rank_targets(PopularityEncoder(counts), batches_of(ALONE), ranks=ALONE, k=k, item_chunk=8)
    model = rank_targets(made_up_encoder(), batches_of(ALONE), ranks=ALONE, k=k)
    at_once = rank_by_popularity(model, counts)
    for field in dataclasses.fields(RankedTargets):
        np.testing.assert_array_equal(getattr(at_once, field.name), getattr(walked, field.name), err_msg=field.name)
