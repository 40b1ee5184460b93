"""The generator: its law sums to one, equals brute force, and looks as stated."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from muonrec.data.events import EVENT_SCHEMA
from muonrec.data.synthetic import (
    CHUNK_USERS,
    SyntheticLog,
    SyntheticSource,
    _expected_metrics,
    best_possible,
    read_synthetic,
)


def tiny(**settings: object) -> SyntheticSource:
    defaults = {"num_users": 8, "num_items": 5, "num_clusters": 2, "taste_persistence": 0.7, "num_successors": 2}
    return SyntheticSource(format="synthetic", **{**defaults, **settings})


def probability_by_brute_force(log: SyntheticLog, items: list[int]) -> float:
    """``P(items)`` summed over every path of tastes and every kind of event, from the stated law alone."""
    source, clusters = log.source, range(log.source.num_clusters)
    total = 0.0
    for path in itertools.product(clusters, repeat=len(items)):
        probability = 1.0
        for place, (cluster, item) in enumerate(zip(path, items, strict=True)):
            if place == 0:
                probability /= len(clusters)
            else:
                stays = source.taste_persistence if cluster == path[place - 1] else 0.0
                probability *= stays + (1 - source.taste_persistence) / len(clusters)
            transition, taste, popular = log.shares(first=place == 0)
            members = [other for other in range(source.num_items) if log.cluster_M[other] == cluster]
            emitted = popular * log.popularity_M[item]
            if item in members:
                emitted += taste * log.popularity_M[item] / sum(log.popularity_M[other] for other in members)
            if place:
                before_last = items[place - 2] if place > 1 else -1
                (successors,) = log.successors(np.array([items[place - 1]]), np.array([before_last])).tolist()
                weights = [source.successor_decay**rank for rank in range(source.num_successors)]
                emitted += transition * sum(
                    weight / sum(weights)
                    for weight, successor in zip(weights, successors, strict=True)
                    if successor == item
                )
            probability *= emitted
        total += probability
    return total


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shares", [(0.4, 0.5), (0.3, 0.7), (0.0, 0.0)])
def test_prediction_equals_brute_force_over_all_latent_paths(order: int, shares: tuple[float, float]) -> None:
    log = SyntheticLog(tiny(transition_order=order, transition_probability=shares[0], taste_probability=shares[1]))
    histories = [[0], [3, 1], [4, 4, 2], [1, 0, 3, 2]]
    for history in histories:
        joint = np.array([probability_by_brute_force(log, [*history, item]) for item in range(5)])
        if joint.sum() == 0:  # without popular items some histories cannot happen
            continue
        predicted = log.predict(np.array([history]), np.array([len(history)]))[0]
        # float64, sums of a few dozen products
        np.testing.assert_allclose(predicted, joint / joint.sum(), rtol=1e-10, atol=1e-14)


def test_prediction_of_users_with_different_lengths_equals_one_at_a_time() -> None:
    log = SyntheticLog(tiny(num_users=50, num_items=30, num_clusters=4))
    items, _, lengths = log.chunk(0)
    together = log.predict(items, lengths - 1)
    np.testing.assert_allclose(together.sum(axis=1), 1, rtol=1e-12, atol=0)
    for user in range(0, 50, 7):
        alone = log.predict(items[user : user + 1, : lengths[user]], lengths[user : user + 1] - 1)
        np.testing.assert_allclose(together[user], alone[0], rtol=1e-12, atol=1e-15)


def test_sampled_next_items_follow_the_prediction() -> None:
    # Calibration: over users, the predicted probability of what came equals that of a draw from the prediction itself.
    log = SyntheticLog(SyntheticSource(format="synthetic", num_users=4000, num_items=50, num_clusters=5))
    items, _, lengths = log.chunk(0)
    predicted = log.predict(items, lengths - 1)
    came = predicted[np.arange(4000), items[np.arange(4000), lengths - 1]]
    expected, variance = (predicted**2).sum(axis=1), (predicted**3).sum(axis=1) - (predicted**2).sum(axis=1) ** 2
    # Four standard errors: fails once in 16,000 seeds, and the seed is fixed.
    assert abs(came.mean() - expected.mean()) < 4 * np.sqrt(variance.sum()) / 4000


def test_log_is_seeded_streamed_and_of_the_event_schema() -> None:
    source = SyntheticSource(format="synthetic", num_users=CHUNK_USERS + 100, num_items=100)
    batches = list(read_synthetic(source))
    assert len(batches) == 2
    table = pa.Table.from_batches(batches)
    assert table.schema == EVENT_SCHEMA
    assert table.equals(read_synthetic(source).read_all())
    assert not table.equals(read_synthetic(source.model_copy(update={"seed": 1})).read_all())
    assert table.column("source_row").to_pylist() == list(range(len(table)))
    assert len(table.column("user_id").unique()) == CHUNK_USERS + 100


def test_users_of_a_chunk_do_not_depend_on_later_chunks() -> None:
    small, large = (SyntheticLog(tiny(num_users=CHUNK_USERS + extra)).chunk(0) for extra in (0, 500))
    for one, other in zip(small, large, strict=True):
        np.testing.assert_array_equal(one, other)


def test_events_have_the_stated_mean_and_strictly_ascending_times() -> None:
    _, times, lengths = SyntheticLog(SyntheticSource(format="synthetic")).chunk(0)
    assert lengths.min() == 5
    assert abs(lengths.mean() - 20) < 1
    assert (np.diff(times, axis=1) > 0).all()


def test_item_ids_do_not_follow_popularity() -> None:
    table = read_synthetic(SyntheticSource(format="synthetic", num_users=8000)).read_all()
    numbers = np.array([int(name[1:]) for name in table.column("item_id").to_pylist()])
    counts = np.bincount(numbers, minlength=1000)
    assert abs(np.corrcoef(np.arange(1000), counts)[0, 1]) < 0.1
    top = np.sort(counts)[::-1]
    assert top[:10].sum() > 4 * top[500:510].sum(), "popularity has a long tail"


def test_defaults_leave_much_to_learn() -> None:
    source = SyntheticSource(format="synthetic")
    best = best_possible(source)
    assert best.num_users == 3000
    assert 0.25 < best.ndcg_at_10 < 0.4
    log = SyntheticLog(source)
    items, _, lengths = log.chunk(0)
    counts = np.bincount(items[np.arange(items.shape[1]) < lengths[:, None] - 1], minlength=1000)
    popular, _ = _expected_metrics(
        np.broadcast_to(counts, (3000, 1000)), items[np.arange(3000), lengths - 1], 1 / np.log2(np.arange(10) + 2)
    )
    assert popular.mean() < 0.05


def test_best_possible_evaluates_at_most_the_stated_users() -> None:
    assert best_possible(tiny(num_users=CHUNK_USERS + 10), max_users=CHUNK_USERS + 3).num_users == CHUNK_USERS + 3
    assert best_possible(tiny(), max_users=5).num_users == 5


def test_tied_scores_count_as_their_expectation_over_orders() -> None:
    gains = 1 / np.log2(np.arange(10) + 2)
    scores = np.zeros((1, 20))
    scores[0, 3] = 1.0
    ndcg, recall = _expected_metrics(scores, np.array([5]), gains)
    assert ndcg[0] == pytest.approx(gains[1:].sum() / 19)
    assert recall[0] == pytest.approx(9 / 19)
    ndcg, recall = _expected_metrics(scores, np.array([3]), gains)
    assert (ndcg[0], recall[0]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transition_probability": 0.6, "taste_probability": 0.6}, "exceed 1; the rest is the share of popular items"),
        ({"num_clusters": 6}, "num_clusters 6 exceeds num_items 5; every cluster needs an item"),
        ({"events_per_user": 4.0}, "events_per_user 4 is below min_events_per_user 5; raise it"),
    ],
)
def test_impossible_parameters_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
