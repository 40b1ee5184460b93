"""The order of a comparison, with runs that are functions of their rates."""

import dataclasses

from muonrec.comparison.results import RunResult
from muonrec.comparison.tuning import final_runs, tune
from tests.comparison.made_up import made_up_design

BEST = {"lr": 1e-3, "dense": 1e-3, "rest": 1e-3, "tables": 0.4}


def executor(log, best=BEST, broken=()):
    def execute(design, asked):
        log.extend(asked)
        results = []
        for ask in asked:
            value = -sum(abs(rate / best[name] - 1) for name, rate in ask.rates.items())
            is_broken = (ask.arm, ask.trial) in broken
            results.append(
                RunResult(
                    "run",
                    **vars(ask),
                    status="failed" if is_broken else "done",
                    valid={} if is_broken else {"ndcg@10": value},
                )
            )
        return results

    return execute


def counted(log):
    return {arm: sum(ask.arm == arm for ask in log) for arm in ("one-rate", "control", "muon")}


def test_every_arm_gets_the_same_trials_numbered_in_order_and_its_best_rates():
    design, log = made_up_design(trials=4), []
    tuned, rates = tune(design, executor(log), seed=7, max_extensions=0)
    assert counted(log) == {"one-rate": 4, "control": 4, "muon": 4}
    assert tuned == design
    assert [ask.trial for ask in log if ask.arm == "muon"] == [0, 1, 2, 3]
    assert {(ask.stage, ask.budget, ask.seed) for ask in log} == {("tune", 1.0, 7)}
    assert rates["one-rate"] == {"lr": 1e-3}  # four points are the whole grid
    # Control and Muon have grids of the same lengths and values told alike: the same points.
    assert [a.rates for a in log if a.arm == "muon"] == [a.rates for a in log if a.arm == "control"]


def test_a_best_at_an_end_of_a_grid_is_extended_for_every_arm_alike():
    best = {**BEST, "tables": 3.0}  # beyond the grid's 0.8, and its first extension
    design, log = made_up_design(trials=30), []
    many = {"lr": tuple(1e-3 * 1.1**place for place in range(-20, 21))}
    one_rate = dataclasses.replace(design.arms[0], grids=many)
    design = dataclasses.replace(design, arms=(one_rate, *design.arms[1:]))
    tuned, rates = tune(design, executor(log, best), seed=0, max_extensions=2)
    own = counted(log)
    assert own["one-rate"] == own["control"] == own["muon"] > 30
    for name in ("control", "muon"):
        assert tuned.arm(name).grids["tables"][:6] == (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
        assert rates[name]["tables"] == 3.2
        assert [ask.rates["tables"] for ask in log if ask.arm == name].count(1.6) == 1
    assert "tables" not in tuned.arm("one-rate").grids

    unextended, _ = tune(design, executor([], best), seed=0, max_extensions=0)
    assert unextended == design


def test_a_grid_ends_before_rates_that_cannot_be_run():
    design, log = made_up_design(trials=30), []

    def check(asked):
        if asked.rates.get("tables", 0) > 1:
            raise ValueError("tables above 1")

    tuned, rates = tune(design, executor(log, {**BEST, "tables": 3.0}), seed=0, max_extensions=2, check=check)
    assert tuned == design
    assert rates["muon"]["tables"] == 0.8
    assert max(ask.rates.get("tables", 0) for ask in log) == 0.8


def test_a_value_that_is_no_number_is_not_the_best():
    design = made_up_design(trials=4)

    def execute(design, asked):
        found = executor([])(design, asked)
        return [dataclasses.replace(run, valid={"ndcg@10": float("nan")}) if run.trial == 0 else run for run in found]

    _, rates = tune(design, execute, seed=0, max_extensions=0)
    first = []
    tune(design, executor(first), seed=0, max_extensions=0)
    assert all(rates[ask.arm] != ask.rates for ask in first if ask.trial == 0)


def test_failed_trials_count_as_worst_and_an_arm_without_any_other_gets_no_final_runs():
    design = made_up_design(trials=2, seeds=(1, 2), budgets=(1.0, 0.5))
    broken = {("muon", number) for number in range(20)}
    _, rates = tune(design, executor([], broken=broken), seed=0, max_extensions=1)
    assert set(rates) == {"one-rate", "control"}
    finals = final_runs(design, rates)
    assert [(ask.budget, ask.seed, ask.arm) for ask in finals] == [
        (budget, seed, arm) for budget in (1.0, 0.5) for seed in (1, 2) for arm in ("one-rate", "control")
    ]
    assert all(ask.rates == rates[ask.arm] and ask.trial is None for ask in finals)


def test_lower_may_be_better():
    design = dataclasses.replace(made_up_design(trials=4), higher_is_better=False)
    _, rates = tune(design, executor([]), seed=0, max_extensions=0)
    assert rates["one-rate"] == {"lr": 1e-2}  # the worst of the other test
