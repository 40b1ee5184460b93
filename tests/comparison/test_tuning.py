"""The order of a comparison, with runs that are functions of their rates."""

import dataclasses
import math

import numpy as np
import pytest

from muonrec.comparison.results import RunResult
from muonrec.comparison.tuning import Asked, carry_out, final_runs, tune
from tests.comparison.made_up import made_up_design

BEST = {"lr": 1e-3, "dense": 1e-3, "rest": 1e-3, "tables": 0.4}


def executor(log, value_of=None, broken=()):
    def distance(ask, best=BEST):
        return -sum(abs(rate / best[name] - 1) for name, rate in ask.rates.items())

    def execute(asked):
        log.extend(asked)
        results = []
        for ask in asked:
            is_broken = (ask.arm, ask.trial) in broken
            valid = {} if is_broken else {"ndcg@10": (value_of or distance)(ask)}
            results.append(RunResult("run", **vars(ask), status="failed" if is_broken else "done", valid=valid))
        return results

    return execute


def rates_of(design, execute, **asked):
    return tune(design, execute, **{"budget": 1.0, "max_extensions": 0, **asked}).rates


def towards(best):
    return lambda ask: -sum(abs(rate / best[name] - 1) for name, rate in ask.rates.items())


def counted(log):
    return {arm: sum(ask.arm == arm for ask in log) for arm in ("one-rate", "control", "muon")}


def points(log, arm):
    return {(ask.trial, *ask.rates.values()) for ask in log if ask.arm == arm}


def test_every_arm_gets_the_same_trials_numbered_in_order_and_its_best_rates():
    design, log = made_up_design(trials=4), []
    design = dataclasses.replace(design, tuning_seeds=(7,))
    rates = rates_of(design, executor(log))
    assert counted(log) == {"one-rate": 4, "control": 4, "muon": 4}
    assert [ask.trial for ask in log if ask.arm == "muon"] == [0, 1, 2, 3]
    assert {(ask.stage, ask.budget, ask.seed) for ask in log} == {("tune", 1.0, 7)}
    assert rates["one-rate"] == {"lr": 1e-3}  # four points are the whole grid
    # Control and Muon have grids of the same lengths and values told alike: the same points.
    assert [a.rates for a in log if a.arm == "muon"] == [a.rates for a in log if a.arm == "control"]


def test_several_seeds_decide_between_the_leaders():
    design, log = dataclasses.replace(made_up_design(trials=4), tuning_seeds=(0, 8, 9), leaders=2), []

    def value_of(ask):
        lucky = {3e-4: 0.5, 1e-3: 0.4, 3e-3: 0.3, 1e-2: 0.1} if ask.seed == 0 else {3e-4: 0.1, 1e-3: 0.2, 3e-3: 0.9}
        return lucky.get(ask.rates["lr"], 0.0) if "lr" in ask.rates else towards(BEST)(ask)

    rates = rates_of(design, executor(log, value_of))
    assert rates["one-rate"] == {"lr": 1e-3}  # neither the luckiest, nor what no leader is
    repeated = [(ask.rates["lr"], ask.seed) for ask in log if ask.arm == "one-rate" and ask.seed]
    assert sorted(repeated) == [(3e-4, 8), (3e-4, 9), (1e-3, 8), (1e-3, 9)]
    assert counted(log)["control"] == counted(log)["one-rate"] == 8


def test_what_leads_in_an_arm_is_tried_by_every_arm_like_it_and_all_have_equal_trials():
    design, log = dataclasses.replace(made_up_design(trials=6), tuning_seeds=(0, 8), leaders=1), []
    best = {"control": {**BEST, "dense": 3e-4}, "muon": {**BEST, "dense": 1e-2}, "one-rate": BEST}
    rates_of(design, executor(log, lambda ask: towards(best[ask.arm])(ask)))
    for arm, other in (("control", "muon"), ("muon", "control")):
        led = next(ask.rates for ask in log if ask.arm == other and ask.seed == 8)
        assert led in [ask.rates for ask in log if ask.arm == arm and ask.seed == 0]
    assert len(points(log, "control")) == len(points(log, "muon"))
    assert len(points(log, "one-rate")) == 4  # its whole grid
    # No run is asked twice, and the number of a trial is a point.
    assert len({(ask.arm, ask.trial, ask.seed) for ask in log}) == len(log)
    for arm in ("control", "muon"):
        assert len({trial for trial, *_ in points(log, arm)}) == len(points(log, arm))


def test_a_best_at_an_end_of_a_grid_is_extended_for_every_arm_alike():
    best = {**BEST, "tables": 3.0}  # beyond the grid's 0.8, and its first extension
    design, log = dataclasses.replace(made_up_design(trials=30), tuning_seeds=(0, 8), leaders=2), []
    many = {"lr": tuple(1e-3 * 1.1**place for place in range(-20, 21))}
    one_rate = dataclasses.replace(design.arms[0], grids=many)
    design = dataclasses.replace(design, arms=(one_rate, *design.arms[1:]))
    rates = rates_of(design, executor(log, towards(best)), max_extensions=2)
    first = [ask for ask in log if ask.seed == 0]
    own = counted(first)
    assert own["one-rate"] == own["control"] == own["muon"] > 30
    for name in ("control", "muon"):
        assert rates[name]["tables"] == 3.2
        assert [ask.rates["tables"] for ask in first if ask.arm == name].count(1.6) == 1
        assert 8 in [ask.seed for ask in log if ask.arm == name and ask.rates == rates[name]]

    log.clear()
    rates_of(design, executor(log, towards(best)))
    assert max(ask.rates.get("tables", 0) for ask in log) == 0.8


def test_a_grid_ends_before_rates_that_cannot_be_run():
    design, log = made_up_design(trials=30), []

    def check(asked):
        if asked.rates.get("tables", 0) > 1:
            raise ValueError("tables above 1")

    rates = rates_of(design, executor(log, towards({**BEST, "tables": 3.0})), max_extensions=2, check=check)
    assert rates["muon"]["tables"] == 0.8
    assert max(ask.rates.get("tables", 0) for ask in log) == 0.8


def test_a_value_that_is_no_number_is_not_the_best():
    design = made_up_design(trials=4)
    log = []
    rates = rates_of(
        design,
        executor(log, lambda ask: float("nan") if ask.trial == 0 else towards(BEST)(ask)),
    )
    assert all(rates[ask.arm] != ask.rates for ask in log if ask.trial == 0)


def test_a_leader_that_fails_with_another_seed_is_not_the_best():
    design, log = dataclasses.replace(made_up_design(trials=4), tuning_seeds=(0, 8), leaders=2), []

    def value_of(ask):
        return float("nan") if ask.seed == 8 and ask.rates.get("lr") == 1e-3 else towards(BEST)(ask)

    assert rates_of(design, executor(log))["one-rate"] == {"lr": 1e-3}
    log.clear()
    assert rates_of(design, executor(log, value_of))["one-rate"] == {"lr": 3e-4}
    # Another point takes its place among those that are run with every seed.
    assert len({ask.rates["lr"] for ask in log if ask.arm == "one-rate" and ask.seed == 8}) == 3


def test_an_arm_without_a_finished_trial_has_no_rates_and_a_budget_with_failures_no_final_runs():
    design, log = made_up_design(trials=2, seeds=(1, 2), budgets=(1.0, 0.5)), []
    broken = {("muon", number) for number in range(20)}
    assert set(rates_of(design, executor([], broken=broken), max_extensions=1)) == {"one-rate", "control"}
    carry_out(design, executor(log, broken=broken), max_extensions=1)
    assert not any(ask.stage == "final" for ask in log)
    carry_out(design, executor(log), max_extensions=1)
    finals = [ask for ask in log if ask.stage == "final"]
    assert [(ask.budget, ask.seed, ask.arm, ask.trial) for ask in finals] == [
        (budget, seed, arm.name, None) for budget in (1.0, 0.5) for seed in (1, 2) for arm in design.arms
    ]
    rates = {"lr": 1e-3}
    assert final_runs(design, 0.5, {"one-rate": rates}) == [
        Asked("one-rate", "final", 0.5, seed, None, rates) for seed in (1, 2)
    ]


@pytest.mark.parametrize("salt", range(12))
def test_in_any_landscape_no_arm_wins_at_a_point_that_its_twin_was_not_asked(salt):
    design = dataclasses.replace(made_up_design(trials=8), tuning_seeds=(0, 8, 9), leaders=2)
    places = {"dense": 1e-3, "rest": 1e-3, "tables": 0.3, "lr": 2e-3}

    def value_of(ask):
        key = [salt, len(ask.arm), ask.seed, *(round(1e6 * rate) for rate in ask.rates.values())]
        distance = sum(math.log(rate / places[name]) ** 2 for name, rate in ask.rates.items())
        return float(-distance + np.random.default_rng(key).normal(0, 2.0))

    log = []
    tuning = tune(design, executor(log, value_of), budget=1.0, max_extensions=2)
    tried = {arm: [ask.rates for ask in log if ask.arm == arm and ask.seed == 0] for arm in ("control", "muon")}
    assert tuning.rates["muon"] in tried["control"] and tuning.rates["control"] in tried["muon"]
    assert len(tried["muon"]) == len(tried["control"])
    repeated = {arm: sum(ask.arm == arm and ask.seed > 0 for ask in log) for arm in ("control", "muon")}
    assert repeated["muon"] == repeated["control"] >= 4
    assert len({(ask.arm, ask.seed, *ask.rates.values()) for ask in log}) == len(log)


def test_every_budget_is_tuned_by_itself_and_does_not_depend_on_the_others():
    design = dataclasses.replace(made_up_design(trials=5, budgets=(1.0, 0.5)), tuning_seeds=(0, 8), leaders=2)

    def value_of(ask):  # half the steps want twice the rate
        return towards({name: rate / ask.budget for name, rate in BEST.items()})(ask)

    log, alone = [], []
    carry_out(design, executor(log, value_of), max_extensions=1)
    assert [ask.budget for ask in log] == sorted((ask.budget for ask in log), reverse=True)
    chosen = {(ask.budget, ask.arm): ask.rates for ask in log if ask.stage == "final"}
    assert chosen[1.0, "one-rate"] == {"lr": 1e-3}
    assert chosen[0.5, "one-rate"] == {"lr": 3e-3}
    carry_out(dataclasses.replace(design, budgets=(0.5,)), executor(alone, value_of), max_extensions=1)
    assert alone == [ask for ask in log if ask.budget == 0.5]


def test_lower_may_be_better():
    design = dataclasses.replace(made_up_design(trials=4), higher_is_better=False, tuning_seeds=(0, 8), leaders=2)
    rates = rates_of(design, executor([]))
    assert rates["one-rate"] == {"lr": 1e-2}  # the worst of the other test
