"""The search for rates: seeded, within its grids, never twice, and extended alike."""

import pytest

from muonrec.comparison.search import Search, beyond, edges, extended

GRIDS = {"dense": (1e-3, 1e-2, 1e-1), "tables": (0.1, 0.2, 0.4, 0.8)}


def height(point):
    return -abs(point["dense"] - 1e-2) - abs(point["tables"] - 0.4)


def searched(grids, *, trials, seed, value=height):
    search, points = Search(grids, trials=trials, seed=seed), []
    while asked := search.ask():
        points += asked
        search.tell([value(point) for point in asked])
    return search, points


def test_the_same_seed_and_values_give_the_same_points_and_none_twice():
    _, points = searched(GRIDS, trials=10, seed=3)
    assert points == searched(GRIDS, trials=10, seed=3)[1]
    assert points != searched(GRIDS, trials=10, seed=4)[1]
    assert len({tuple(point.values()) for point in points}) == 10
    assert all(value in GRIDS[name] for point in points for name, value in point.items())


def test_arms_start_at_the_same_places_of_their_own_grids():
    other = {name: tuple(10 * value for value in values) for name, values in GRIDS.items()}
    _, ours = searched(GRIDS, trials=8, seed=0)
    _, theirs = searched(other, trials=8, seed=0, value=lambda point: point["dense"])
    places = [
        [[grids[name].index(value) for name, value in point.items()] for point in points[:4]]
        for grids, points in ((GRIDS, ours), (other, theirs))
    ]
    assert places[0] == places[1]


def test_a_grid_is_tried_whole_before_trials_run_out_and_values_may_be_missing():
    search, points = searched(GRIDS, trials=40, seed=0, value=lambda point: None)
    assert len(points) == 12 == len({tuple(point.values()) for point in points})
    assert search.ask_further(1) == []


def test_later_trials_follow_what_was_told():
    many = {"dense": tuple(1.0 + step for step in range(40)), "tables": tuple(1.0 + step for step in range(40))}
    _, points = searched(
        many, trials=24, seed=1, value=lambda point: -abs(point["dense"] - 30) - abs(point["tables"] - 9)
    )
    distance = [abs(point["dense"] - 30) + abs(point["tables"] - 9) for point in points]
    assert sum(distance[12:]) < 0.7 * sum(distance[:12])


def test_edges_and_the_value_beyond_them():
    assert edges({"dense": 1e-2, "tables": 0.8}, GRIDS) == [("tables", 1)]
    assert edges({"dense": 1e-3, "tables": 0.2}, GRIDS) == [("dense", -1)]
    assert edges({"dense": 1e-3}, {"dense": (1e-3,)}) == []  # was not searched
    assert beyond((0.1, 0.2), 1) == 0.4
    assert beyond((3e-4, 1e-3), -1) == 9e-5
    assert extended(GRIDS, ("tables", 1))["tables"] == (0.1, 0.2, 0.4, 0.8, 1.6)
    assert extended(GRIDS, ("dense", -1))["dense"][0] == 1e-4


def test_a_grid_that_is_no_grid_is_refused():
    with pytest.raises(ValueError, match=r"grid dense is \[0.1, 0.01\]; give positive rates in increasing order"):
        Search({"dense": (0.1, 0.01)}, trials=2, seed=0)
