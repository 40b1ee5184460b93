"""Tests of the planner."""

import random

import pytest
import torch

from muonrec.optim.ownership import assign_owners, newton_schulz_cost, plan_hash, shard_range


def test_the_longest_goes_first_to_the_least_loaded():
    owners = assign_owners({"a": 3, "b": 9, "c": 5, "d": 4}, 2)
    # 9 to rank 0, 5 and then 4 to rank 1, and 3 to either at 9: the lower rank.
    assert owners == {"a": 0, "b": 0, "c": 1, "d": 1}


def test_owners_do_not_depend_on_the_order_of_the_names():
    costs = {f"layer{i}": i % 5 for i in range(40)}
    names = list(costs)
    random.Random(0).shuffle(names)
    assert assign_owners({name: costs[name] for name in names}, 7) == assign_owners(costs, 7)


def test_loads_are_within_four_thirds_of_even():
    generator = random.Random(0)
    costs = {f"layer{i}": generator.randint(1, 1000) for i in range(200)}
    owners = assign_owners(costs, 8)
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(8)]
    assert max(loads) <= 4 / 3 * sum(loads) / 8


def test_fewer_matrices_than_ranks_and_none_at_all():
    assert assign_owners({"a": 1, "b": 1}, 5) == {"a": 0, "b": 1}
    assert assign_owners({}, 5) == {}
    with pytest.raises(ValueError, match="dealt out to 0 ranks; use 1 or more"):
        assign_owners({"a": 1}, 0)


def test_cost_counts_the_multiplications_of_the_short_side():
    # Per step 2 * 4 * 4 * 6 twice and 2 * 4^3, for either orientation.
    assert newton_schulz_cost((4, 6), 5) == newton_schulz_cost((6, 4), 5) == 5 * (2 * 2 * 4 * 4 * 6 + 2 * 4**3)


def test_plan_hash_tells_plans_apart():
    rows = [["proj", [4, 4], 0], ["out", [4, 2], 1]]
    assert plan_hash(rows) == plan_hash(tuple(rows))
    assert plan_hash(rows) != plan_hash(rows[::-1])
    # Written down, so that a change of the format does not go unnoticed.
    assert plan_hash([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_shards_are_those_of_torch_chunk(size, num_ranks):
    chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(num_ranks)]
    found = [list(range(*shard_range(size, num_ranks, rank))) for rank in range(num_ranks)]
    assert found == chunks + [[]] * (num_ranks - len(chunks))
