"""Batches: a function of seed and step alone, whole epochs, for any number of ranks."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

from muonrec.batch import CANDIDATES, HISTORY, TARGETS
from muonrec.data.candidates import CandidateSampler
from muonrec.data.loader import (
    TrainingBatches,
    check_ids,
    evaluation_batches,
    evaluation_targets,
    length_groups,
    prefetched,
    seen_items,
)
from muonrec.data.shards import load_sequences
from muonrec.mesh import Ranks
from pipeline.data import DataConfig, build_dataset
from tests.made_up import made_up_sequences

SEQUENCES = made_up_sequences()


def ranks(rank=0, num_ranks=1):
    return Ranks(rank, num_ranks, torch.device("cpu"))


def loader(rank=0, num_ranks=1, *, kind="uniform", seed=0, batch_size=32, sequences=SEQUENCES, **settings):
    sampler = CandidateSampler(
        kind, num_items=sequences.num_items, count=8, item_counts=sequences.item_train_counts, seed=seed
    )
    settings = {"max_length": 20, "num_streams": 8, "needs_targets": True, **settings}
    return TrainingBatches(
        sequences, batch_size=batch_size, sampler=sampler, seed=seed, ranks=ranks(rank, num_ranks), **settings
    )


def rows(batch):
    """(user, history, labels) of each user of a batch, in a form that can be compared."""
    history = batch.features[HISTORY]
    ends = history.offsets().tolist()
    items, labels = history.values().tolist(), batch.labels.tolist()
    return {
        user: (items[a:b], labels[a:b]) for user, a, b in zip(batch.user_ids.tolist(), ends, ends[1:], strict=False)
    }


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_a_global_batch_does_not_depend_on_the_number_of_ranks(num_ranks):
    shares = [loader(rank, num_ranks) for rank in range(num_ranks)]
    alone = loader()
    for step in range(2 * alone.steps_per_epoch):
        together = {}
        for share in shares:
            mine = rows(share.share(step))
            assert not together.keys() & mine.keys()
            together |= mine
        assert together == rows(alone.share(step))


def test_ranks_end_an_epoch_together_whatever_the_shards_hold(tmp_path):
    # 61 users in 40 shards, two of them in some and one in others, and in 8 streams that 3 ranks share unequally.
    source = {"format": "synthetic", "num_users": 61, "num_items": 30}
    build_dataset(DataConfig.model_validate({"source": source, "output": tmp_path / "data", "num_shards": 40}))
    sequences = load_sequences(tmp_path / "data")
    shards = [loader(rank, 3, sequences=sequences, batch_size=24) for rank in range(3)]
    num_steps = 2 * shards[0].steps_per_epoch
    batches = [list(shard.iterate(0, num_steps)) for shard in shards]
    assert [len(mine) for mine in batches] == [num_steps] * 3
    assert len({sum(len(batch.user_ids) for batch in mine) for mine in batches}) > 1  # unequal rows
    visited = [user for mine in batches for batch in mine for user in batch.user_ids.tolist()]
    assert sorted(visited) == sorted(list(range(61)) * 2)
    for part in ("valid", "test"):
        rounds = [
            list(evaluation_batches(sequences, part, max_length=9, batch_size=7, ranks=ranks(rank, 3)))
            for rank in range(3)
        ]
        assert len({len(mine) for mine in rounds}) == 1
        assert sum(len(batch.user_ids) for mine in rounds for batch in mine) == 61


def test_an_epoch_visits_every_user_with_two_training_events_once():
    batches = loader()
    visited = [user for step in range(batches.steps_per_epoch) for user in rows(batches.share(step))]
    assert sorted(visited) == np.flatnonzero(SEQUENCES.num_train >= 2).tolist()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_an_epoch_of_prefixes_predicts_every_training_event_but_the_first_of_its_user_once(num_ranks):
    shares = [loader(rank, num_ranks, samples="prefixes", batch_size=64) for rank in range(num_ranks)]
    targets = []
    for step in range(shares[0].steps_per_epoch):
        for batch in (share.share(step) for share in shares):
            histories = batch.features[HISTORY].to_dense()
            assert torch.equal(batch.features[TARGETS].values(), batch.labels)
            assert batch.features[TARGETS].lengths().sum() == len(batch.user_ids)
            for user, history, label in zip(batch.user_ids.tolist(), histories, batch.labels.tolist(), strict=False):
                first, count = SEQUENCES.offsets[user], SEQUENCES.num_train[user]
                events = SEQUENCES.values[first : first + count].tolist()
                # An item may come twice, so the place is told by all that went before.
                places = [place for place in range(1, count) if events[max(place - 20, 0) : place] == history.tolist()]
                [place] = [place for place in places if events[place] == label]
                targets.append((user, place))
    every = [(user, place) for user, count in enumerate(SEQUENCES.num_train) for place in range(1, count)]
    assert sorted(targets) == every


def test_epochs_and_seeds_have_orders_of_their_own():
    first = loader()
    assert list(rows(first.share(0))) != list(rows(first.share(first.steps_per_epoch)))
    assert list(rows(first.share(0))) != list(rows(loader(seed=1).share(0)))


def test_iterating_from_a_later_step_continues_the_same_batches():
    whole = [rows(batch) for batch in loader().iterate(0, 30)]
    assert [rows(batch) for batch in loader().iterate(17, 30)] == whole[17:]


def test_labels_follow_the_history_and_never_leave_the_training_events():
    batches = loader()
    for step in range(batches.steps_per_epoch):
        for user, (items, labels) in rows(batches.share(step)).items():
            first, last = SEQUENCES.offsets[user], SEQUENCES.offsets[user] + SEQUENCES.num_train[user]
            train = SEQUENCES.values[first:last].tolist()
            assert labels == train[1:][-20:]
            assert items == train[:-1][-20:]


def test_shared_negatives_are_the_same_on_every_rank_and_new_every_step():
    two = [loader(rank, 2).share(3).features[CANDIDATES].values() for rank in range(2)]
    assert torch.equal(two[0], two[1])
    assert not torch.equal(two[0], loader(0, 2).share(4).features[CANDIDATES].values())


def test_negatives_of_a_target_stay_with_it_for_any_number_of_ranks():
    def negatives(batch):
        blocks = batch.features[CANDIDATES].values().reshape(-1, 8).split(batch.features[HISTORY].lengths().tolist())
        return {user: block.tolist() for user, block in zip(batch.user_ids.tolist(), blocks, strict=True)}

    # The draws belong to a stream's users in their order, whichever rank serves it.
    alone = negatives(loader(kind="per_target").share(2))
    assert (
        negatives(loader(0, 2, kind="per_target").share(2)) | negatives(loader(1, 2, kind="per_target").share(2))
        == alone
    )


def test_targets_are_looked_up_only_where_the_loss_needs_them():
    assert loader(needs_targets=False).share(0).features[TARGETS].values().numel() == 0
    batch = loader().share(0)
    assert torch.equal(batch.features[TARGETS].values(), batch.labels)


def test_log_q_is_the_share_of_the_training_events_for_in_batch_negatives():
    batch = loader(kind="in_batch").share(0)
    counts = np.maximum(SEQUENCES.item_train_counts, 1)
    expected = np.log(counts / counts.sum())[batch.labels.numpy()]
    np.testing.assert_allclose(batch.log_q.numpy(), expected, rtol=1e-6)  # rtol: float32


def test_popular_items_are_drawn_more_often():
    counts = np.array([1000, 10, 10, 10])
    draws = CandidateSampler("popularity", num_items=4, count=4000, item_counts=counts).shared(0)
    expected = 1000**0.75 / (1000**0.75 + 3 * 10**0.75)
    assert abs((draws == 0).mean() - expected) < 0.03


def test_mixed_negatives_are_half_uniform_and_half_by_popularity():
    counts = np.array([97, 1, 1, 1])
    sampler = CandidateSampler("mixed", num_items=4, count=4000, item_counts=counts)
    expected = np.array([0.5 * 0.97 + 0.125, *[0.5 * 0.01 + 0.125] * 3])
    np.testing.assert_allclose(np.exp(sampler.log_q(np.arange(4))), expected, rtol=1e-6)  # rtol: float32
    np.testing.assert_allclose(np.bincount(sampler.shared(0)) / 4000, expected, atol=0.03)


def test_a_rank_without_users_brings_an_empty_batch_of_stride_one():
    few = made_up_sequences(num_users=3)
    batch = loader(7, 8, sequences=few, batch_size=8).share(0)
    assert batch.user_ids.numel() == 0
    assert batch.features.stride() == 1
    assert batch.features[HISTORY].values().numel() == 0


def test_users_of_like_length_stand_together():
    lengths = np.array([40, 33, 21, 20, 12, 9, 8, 3, 1])
    groups = length_groups(lengths)
    assert groups == [(3, 94, 40), (2, 32, 20), (2, 17, 9), (2, 4, 3)]
    assert sum(users for users, _, _ in groups) == len(lengths)


def test_padding_computes_on_less_than_twice_the_long_events():
    lengths = np.sort(np.random.default_rng(0).integers(9, 200, 500))[::-1]
    padded = sum(users * longest for users, _, longest in length_groups(lengths))
    assert padded < 2 * lengths.sum()


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_rank_evaluates_as_many_batches_and_together_every_user_once(part, num_ranks):
    per_rank = [
        list(evaluation_batches(SEQUENCES, part, max_length=20, batch_size=30, ranks=ranks(rank, num_ranks)))
        for rank in range(num_ranks)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    users = [user for batches in per_rank for batch in batches for user in batch.user_ids.tolist()]
    assert sorted(users) == evaluation_targets(SEQUENCES, part).tolist()


def test_the_test_history_contains_the_validation_item_and_not_the_target():
    for batch in evaluation_batches(SEQUENCES, "test", max_length=20, batch_size=50, ranks=ranks()):
        ends = batch.features[HISTORY].offsets().tolist()
        items = batch.features[HISTORY].values().tolist()
        for i, user in enumerate(batch.user_ids.tolist()):
            sequence = SEQUENCES.values[SEQUENCES.offsets[user] : SEQUENCES.offsets[user + 1]].tolist()
            assert batch.labels[i] == sequence[-1]
            assert items[ends[i] : ends[i + 1]] == sequence[:-1][-20:]


def test_seen_items_are_the_whole_history():
    users = np.array([5, 2])
    values, lengths = seen_items(SEQUENCES, users, "valid")
    expected = [SEQUENCES.values[SEQUENCES.offsets[u] :][: SEQUENCES.num_train[u]] for u in users]
    assert values.tolist() == np.concatenate(expected).tolist()
    assert lengths.tolist() == [len(e) for e in expected]


@pytest.mark.parametrize("bad", [-1, 57])
def test_an_id_outside_the_table_names_table_feature_and_id(bad):
    with pytest.raises(ValueError, match=rf"feature 'history' holds id {bad}, but table 'item' has rows 0 to 56"):
        check_ids(np.array([3, bad]), table="item", feature="history", num_embeddings=57)


def test_an_id_outside_the_table_stops_the_batch_before_any_lookup():
    values = SEQUENCES.values.copy()
    values[:] = 60
    with pytest.raises(ValueError, match="holds id 60"):
        loader(sequences=dataclasses.replace(SEQUENCES, values=values)).share(0)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="batch_size 30 is not a multiple of num_streams 8; take batch_size 24"):
        loader(batch_size=30)
    with pytest.raises(ValueError, match="9 ranks cannot share 8 streams"):
        loader(0, 9)


def test_the_exception_of_the_background_thread_reaches_the_consumer():
    def broken():
        yield 1
        raise RuntimeError("shard 3 is gone")

    items = prefetched(broken, depth=2)
    assert next(items) == 1
    with pytest.raises(RuntimeError, match="shard 3 is gone"):
        next(items)


def test_closing_early_ends_the_background_thread():
    items = prefetched(lambda: iter(range(10**9)), depth=2)
    next(items)
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "muonrec-loader"]


def test_a_data_set_without_anything_to_learn_is_refused():
    empty = dataclasses.replace(SEQUENCES, num_train=np.ones_like(SEQUENCES.num_train))
    with pytest.raises(ValueError, match="no user has two training events"):
        loader(sequences=empty)


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_target_of_a_user_is_evaluated_once_with_the_history_before_it(part, num_ranks):
    lengths = np.diff(SEQUENCES.offsets)
    generator = np.random.default_rng(4)
    num_train = generator.integers(0, lengths - 1)
    num_valid = generator.integers(0, lengths - num_train + 1)
    several = dataclasses.replace(
        SEQUENCES, num_train=num_train, num_valid=num_valid, num_test=lengths - num_train - num_valid, all_targets=True
    )
    found = []
    for rank in range(num_ranks):
        for batch in evaluation_batches(several, part, max_length=20, batch_size=64, ranks=ranks(rank, num_ranks)):
            users, places = several.locate(batch.user_ids.numpy(), part)
            seen, seen_lengths = seen_items(several, batch.user_ids.numpy(), part)
            assert seen_lengths.tolist() == places.tolist() and len(seen) == places.sum()
            histories = batch.features[HISTORY].values().split(batch.features[HISTORY].lengths().tolist())
            for user, place, label, history in zip(users, places, batch.labels.tolist(), histories):
                sequence = SEQUENCES.values[SEQUENCES.offsets[user] :][: lengths[user]].tolist()
                assert label == sequence[place] and history.tolist() == sequence[:place][-20:]
                found.append((user, place))
    before = num_train + (num_valid if part == "test" else 0)
    held_out = num_valid if part == "valid" else lengths - num_train - num_valid
    expected = [
        (user, place)
        for user in range(len(lengths))
        for place in range(max(before[user], 1), before[user] + held_out[user])
    ]
    assert sorted(found) == expected


def test_times_travel_with_their_events():
    times = np.arange(len(SEQUENCES.values), dtype=np.int64) * 60 + 10**9
    timed = dataclasses.replace(SEQUENCES, timestamps_s=times)

    def shares(sequences):
        yield from loader(sequences=sequences).iterate(0, 3)
        yield from evaluation_batches(sequences, "test", max_length=9, batch_size=50, ranks=ranks())

    for batch, plain in zip(shares(timed), shares(SEQUENCES), strict=True):
        assert batch.timestamps_s.dtype == torch.int64
        places = (batch.timestamps_s.numpy() - 10**9) // 60
        assert SEQUENCES.values[places].tolist() == batch.features[HISTORY].values().tolist()
        assert plain.timestamps_s.numel() == 0 and torch.equal(plain.labels, batch.labels)
        assert torch.equal(batch.to(torch.device("cpu")).timestamps_s, batch.timestamps_s)
