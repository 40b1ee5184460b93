"""Metrics against the places they average over, one by one."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from muonrec import metrics


def brute_force_place_means(scores: list[float], target: int, gain) -> float:
    """Mean of ``gain(place)`` over all orders of the items in which no item precedes a better-scored one."""
    gains = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            gains.append(gain(order.index(target) + 1))
    return sum(gains) / len(gains)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_metrics_equal_the_mean_over_all_orders_of_the_tied(k):
    generator = np.random.default_rng(3)
    for _ in range(20):
        scores = generator.integers(0, 3, size=6).tolist()
        target = int(generator.integers(6))
        greater = np.array([sum(score > scores[target] for score in scores)])
        equal = np.array([sum(score == scores[target] for score in scores) - 1])

        recall = brute_force_place_means(scores, target, lambda place: float(place <= k))
        ndcg = brute_force_place_means(scores, target, lambda place: (place <= k) / math.log2(place + 1))
        mrr_k = brute_force_place_means(scores, target, lambda place: (place <= k) / place)
        mrr = brute_force_place_means(scores, target, lambda place: 1 / place)

        # float64 sums in another order: 1e-12 is far above their rounding and far below one place
        assert metrics.recall_at(k, greater, equal)[0] == pytest.approx(recall, abs=1e-12)
        assert metrics.ndcg_at(k, greater, equal)[0] == pytest.approx(ndcg, abs=1e-12)
        assert metrics.mrr_at(k, greater, equal)[0] == pytest.approx(mrr_k, abs=1e-12)
        assert metrics.mrr(greater, equal)[0] == pytest.approx(mrr, abs=1e-12)


def test_metrics_without_ties_are_the_textbook_values_exactly():
    greater = np.array([0, 1, 9, 10, 10_000_000])
    equal = np.zeros_like(greater)
    np.testing.assert_array_equal(metrics.recall_at(10, greater, equal), [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(metrics.ndcg_at(10, greater, equal), [1, 1 / np.log2(3), 1 / np.log2(11), 0, 0])
    np.testing.assert_array_equal(metrics.mrr_at(10, greater, equal), [1, 0.5, 0.1, 0, 0])
    np.testing.assert_array_equal(metrics.mrr(greater, equal), 1 / (greater + 1))


def test_mrr_of_many_ties_equals_the_sum_over_the_places():
    for greater, equal in [(0, 5), (250, 9), (100, 100_000), (300, 1), (0, 254), (0, 255), (256, 256)]:
        direct = (1.0 / np.arange(greater + 1, greater + equal + 2)).mean()
        assert metrics.mrr(np.array([greater]), np.array([equal]))[0] == pytest.approx(direct, rel=1e-11)


def test_all_items_tied_gives_the_chance_of_a_random_list():
    recall = metrics.recall_at(10, np.array([0]), np.array([199]))
    assert recall[0] == pytest.approx(10 / 200, rel=1e-15)


def test_ranking_metrics_are_the_means_of_every_metric_per_user():
    ranked = SimpleNamespace(num_greater=np.array([1, 30]), num_equal=np.array([0, 0]), list_length=None)
    found = metrics.ranking_metrics(ranked, k=[5, 10])
    assert set(found) == {"recall@5", "ndcg@5", "mrr@5", "recall@10", "ndcg@10", "mrr@10", "mrr"}
    assert found["recall@10"] == 0.5
    assert found["ndcg@10"] == metrics.ndcg_at(10, ranked.num_greater, ranked.num_equal).mean()
    with pytest.raises(ValueError, match="metrics of 0 users"):
        metrics.ranking_metrics(SimpleNamespace(num_greater=np.array([]), num_equal=np.array([])), k=[5])


def test_lists_claim_nothing_beyond_their_length():
    ranked = SimpleNamespace(num_greater=np.array([1, 10]), num_equal=np.array([0, 0]), list_length=10)
    found = metrics.ranking_metrics(ranked, k=[5, 10])
    assert "mrr" not in found and found["mrr@10"] == 0.25 and found["recall@10"] == 0.5
    with pytest.raises(ValueError, match="the first 20 places were asked, but the lists have 10"):
        metrics.ranking_metrics(ranked, k=[5, 20])


def test_counts_of_different_users_are_refused():
    with pytest.raises(ValueError, match="num_greater counts 2 users and num_equal 3"):
        metrics.ndcg_at(10, np.zeros(2, int), np.zeros(3, int))


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="negative"):
        metrics.recall_at(10, np.array([0]), np.array([-1]))


def test_a_list_of_no_places_is_refused():
    with pytest.raises(ValueError, match="list of 0 places"):
        metrics.recall_at(0, np.array([0]), np.array([0]))


def test_bootstrap_interval_has_the_width_of_the_normal_approximation():
    values = np.random.default_rng(0).binomial(1, 0.2, size=5000).astype(float)
    interval = metrics.bootstrap_interval(values, num_resamples=4000)
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.mean == values.mean()
    # 4000 resamples leave about 3 % of the half-width as noise at each end
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)


def test_bootstrap_by_counts_equals_the_bootstrap_by_users_in_distribution():
    generator = np.random.default_rng(5)
    values = generator.choice([0.0, 0.3, 0.5, 1.0], p=[0.7, 0.1, 0.1, 0.1], size=400)
    drawn = np.sort([values[generator.integers(0, 400, 400)].mean() for _ in range(4000)])
    interval = metrics.bootstrap_interval(values, num_resamples=4000, seed=1)
    spread = drawn.std()
    assert interval.low == pytest.approx(drawn[100], abs=0.15 * spread)
    assert interval.high == pytest.approx(drawn[3900], abs=0.15 * spread)


def test_bootstrap_is_a_function_of_the_seed_and_not_of_the_order_of_users():
    values = np.random.default_rng(1).random(300)
    first = metrics.bootstrap_interval(values, seed=7)
    assert first == pytest.approx(metrics.bootstrap_interval(values[::-1], seed=7), abs=1e-15)
    assert first[1:] != metrics.bootstrap_interval(values, seed=8)[1:]


def test_bootstrap_in_small_chunks_equals_the_bootstrap_at_once(monkeypatch):
    values = np.random.default_rng(1).random(50)
    at_once = metrics.bootstrap_interval(values, num_resamples=100)
    monkeypatch.setattr(metrics, "_BOOTSTRAP_BYTES", 7 * 8 * 50)
    # matrix products of another height may sum in another order
    assert metrics.bootstrap_interval(values, num_resamples=100) == pytest.approx(at_once, rel=1e-13)


def brute_force_means_of_resampled_users(values_NC: np.ndarray, users: np.ndarray, num_resamples: int) -> np.ndarray:
    """Draw users one by one, take all rows of each, and average the rows: the plain twin of the bootstrap by counts."""
    generator = np.random.default_rng(11)
    rows_of = [np.flatnonzero(users == user) for user in np.unique(users)]
    means = []
    for _ in range(num_resamples):
        drawn = generator.integers(0, len(rows_of), len(rows_of))
        means.append(values_NC[np.concatenate([rows_of[user] for user in drawn])].mean(axis=0))
    return np.array(means)


def several_values_per_user() -> tuple[np.ndarray, np.ndarray]:
    """Users of 1 to 9 values who hit or miss nearly always: [N] values, [N] users, in no order."""
    generator = np.random.default_rng(5)
    users = np.repeat(np.arange(150) * 7 + 3, generator.integers(1, 10, 150))
    taste = generator.choice([0.05, 0.9], p=[0.7, 0.3], size=2000)
    order = generator.permutation(len(users))
    return generator.binomial(1, taste[users]).astype(float)[order], users[order]


def test_bootstrap_draws_users_with_all_their_values():
    values, users = several_values_per_user()
    drawn = np.sort(brute_force_means_of_resampled_users(values[:, None], users, 4000)[:, 0])
    interval = metrics.bootstrap_interval(values, users, num_resamples=4000, seed=1)
    assert interval.mean == values.mean()
    spread = drawn.std()
    # as above: 4000 resamples on each side leave about 5 % of the spread as noise at each end
    assert interval.low == pytest.approx(drawn[100], abs=0.2 * spread)
    assert interval.high == pytest.approx(drawn[3900], abs=0.2 * spread)
    alone = metrics.bootstrap_interval(values, num_resamples=4000, seed=1)
    assert interval.high - interval.low > 1.5 * (alone.high - alone.low), "values of one user are alike"


def test_values_of_a_user_each_are_resampled_as_if_no_users_were_named():
    values = np.random.default_rng(1).random(300)
    users = np.random.default_rng(2).permutation(300)
    assert metrics.bootstrap_interval(values, users) == metrics.bootstrap_interval(values)
    arm = values + 0.1 * np.random.default_rng(3).random(300)
    assert metrics.paired_bootstrap_difference(values, arm, users) == metrics.paired_bootstrap_difference(values, arm)


def test_a_sample_repeated_for_its_user_tells_nothing_new():
    values = np.random.default_rng(1).random(200)
    users = np.tile(np.arange(200), 5)
    repeated = metrics.bootstrap_interval(np.tile(values, 5), users)
    assert repeated == pytest.approx(metrics.bootstrap_interval(values), rel=1e-12)


def test_paired_difference_draws_users_with_all_their_values():
    control, users = several_values_per_user()
    # better for every value of a tenth of the users, worse for every value of another
    arm = np.clip(control + 0.5 * (users % 10 == 0) - 0.3 * (users % 10 == 1), 0, None)
    drawn = brute_force_means_of_resampled_users(np.stack([control, arm], axis=1), users, 4000)
    relative = np.sort(drawn[:, 1] / drawn[:, 0] - 1)
    found = metrics.paired_bootstrap_difference(control, arm, users, num_resamples=4000)
    assert found.mean == pytest.approx(arm.mean() / control.mean() - 1)
    assert found.low == pytest.approx(relative[100], abs=0.2 * relative.std())
    assert found.high == pytest.approx(relative[3900], abs=0.2 * relative.std())
    alone = metrics.paired_bootstrap_difference(control, arm, num_resamples=4000)
    assert found.high - found.low > 1.5 * (alone.high - alone.low)


def test_breakdown_counts_users_and_values_and_draws_users():
    values, users = several_values_per_user()
    group = (users % 2).astype(int)
    rows = metrics.breakdown({"ndcg@10": values}, group, ["even", "odd"], users)
    for index, row in enumerate(rows):
        members = group == index
        assert (row["num_users"], row["num_targets"]) == (len(set(users[members])), members.sum())
        assert row["ndcg@10"] == metrics.bootstrap_interval(values[members], users[members])._asdict()


def test_values_and_users_of_different_number_are_refused():
    with pytest.raises(ValueError, match="3 values of 2 users were given; pass the user of each value"):
        metrics.bootstrap_interval(np.ones(3), np.arange(2))


def test_bootstrap_of_nobody_or_of_nan_is_refused():
    with pytest.raises(ValueError, match="0 users"):
        metrics.bootstrap_interval(np.array([]))
    with pytest.raises(ValueError, match="not finite"):
        metrics.bootstrap_interval(np.array([0.0, np.nan]))


def test_paired_difference_of_a_run_with_itself_is_zero_without_width():
    values = np.random.default_rng(0).random(100)
    assert metrics.paired_bootstrap_difference(values, values) == (0.0, 0.0, 0.0)


def test_paired_difference_sees_what_unpaired_intervals_do_not():
    generator = np.random.default_rng(2)
    control = generator.binomial(1, 0.2, size=2000).astype(float)
    arm = np.where(generator.random(2000) < 0.01, 1.0, control)  # never worse, better for about 16 users
    difference = metrics.paired_bootstrap_difference(control, arm)
    assert difference.mean == pytest.approx(arm.mean() / control.mean() - 1)
    assert 0 < difference.low < difference.mean < difference.high
    assert not difference.contains_zero
    assert metrics.bootstrap_interval(arm).low < metrics.bootstrap_interval(control).high


def test_paired_difference_survives_resamples_in_which_the_control_hits_nobody():
    control = np.array([1.0, 0.0, 0.0])
    arm = np.array([0.0, 1.0, 0.0])
    difference = metrics.paired_bootstrap_difference(control, arm)
    assert (difference.low, difference.high) == (-1.0, math.inf)


def test_paired_difference_of_other_users_is_refused():
    with pytest.raises(ValueError, match="same users"):
        metrics.paired_bootstrap_difference(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match=r"control's mean is 0\.0"):
        metrics.paired_bootstrap_difference(np.zeros(3), np.ones(3))


def test_groups_between_labels_every_value():
    group, labels = metrics.groups_between(np.array([0, 5, 6, 20, 21]), (5, 20))
    assert labels == ["<=5", "6-20", ">20"]
    assert group.tolist() == [0, 0, 1, 1, 2]
    with pytest.raises(ValueError, match="increasing order"):
        metrics.groups_between(np.array([1]), (20, 5))


def test_breakdown_means_weigh_up_to_the_whole():
    generator = np.random.default_rng(0)
    values, group = generator.random(200), generator.integers(0, 2, 200)
    rows = metrics.breakdown({"ndcg@10": values}, group, ["tail", "head", "nobody"])
    assert [row["group"] for row in rows] == ["tail", "head", "nobody"]
    assert rows[2] == {"group": "nobody", "num_users": 0, "num_targets": 0}
    whole = sum(row["num_users"] * row["ndcg@10"]["mean"] for row in rows[:2]) / 200
    assert whole == pytest.approx(values.mean())


def test_coverage_counts_each_item_once_and_missing_items_never():
    assert metrics.coverage(np.array([[0, 1], [1, -1]]), 8) == 2 / 8
