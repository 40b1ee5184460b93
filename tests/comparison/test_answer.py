"""The answer against loops, and the words against the numbers."""

import dataclasses
import math

import numpy as np
import pytest

from muonrec.comparison.aggregate import aggregated
from muonrec.comparison.aggregate_report import total_cells
from muonrec.comparison.answer import answer, flags, paired, pairs_of, reached
from muonrec.comparison.bootstrap import Paired, t_interval
from muonrec.comparison.points import best_of
from muonrec.comparison.results import Comparison, Design, RunResult
from muonrec.comparison.verdict import shown, verdict
from muonrec.metrics import Interval, paired_bootstrap_difference
from muonrec.page import percent
from tests.comparison.made_up import made_up_comparison, made_up_design


@pytest.fixture(scope="module")
def comparison():
    return made_up_comparison(num_users=300, evaluations=20)


@pytest.fixture(scope="module")
def found(comparison):
    return answer(comparison, num_resamples=400)


def test_the_interval_is_that_of_a_loop_over_users_and_students_over_seeds(comparison):
    pairs = pairs_of(comparison, "muon", 1.0)
    users = np.arange(300) // 2  # every user has two targets
    interval = Paired(pairs, ["ndcg@10"], users, {}, num_resamples=4000).difference("ndcg@10")

    values = np.array([[run.per_target("ndcg@10") for run in pair] for pair in pairs])  # [seeds, 2, targets]
    generator, ratios = np.random.default_rng(5), []
    for _ in range(4000):
        chosen = generator.integers(150, size=150)
        sums = [sum(values[seed, side].reshape(150, 2)[chosen].sum() for seed in range(3)) for side in range(2)]
        ratios.append(sums[0] / sums[1] - 1)
    ratio = values[:, 0].mean() / values[:, 1].mean()
    assert interval.mean == pytest.approx(ratio - 1, rel=1e-12)

    # What each seed and each user add to the ratio, and the share of its variance over users that all seeds have.
    added = (values[:, 0] - ratio * values[:, 1]).reshape(3, 150, 2).sum(axis=2) / values[:, 1].mean() / 300
    over_seeds = 4.303 * np.std(added.sum(axis=1), ddof=1) / math.sqrt(3)
    apart = [
        np.sum((added[seed] - added.mean(axis=0) - np.mean(added[seed] - added.mean(axis=0))) ** 2) for seed in range(3)
    ]
    share = 1 - sum(apart) / 2 / 3 / np.sum(added.mean(axis=0) ** 2)
    assert 0.1 < share < 0.9
    low, high = np.quantile(ratios, [0.025, 0.975])
    expected = [
        min(low, ratio - 1 - math.sqrt(share * (ratio - 1 - low) ** 2 + over_seeds**2)),
        max(high, ratio - 1 + math.sqrt(share * (high - ratio + 1) ** 2 + over_seeds**2)),
    ]
    # The quantiles of 4000 draws scatter by about a thirtieth of the interval's width.
    np.testing.assert_allclose([interval.low, interval.high], expected, atol=0.06 * (high - low))


def null_pairs(regime, num_seeds, generator):
    """Runs of two arms that are equal over all users and seeds: what differs is chance."""

    def values(arm):
        if regime == "seeds":  # 1 % from seed to seed, and so many users that they average out
            return level * (1 + 0.01 * generator.normal())
        if regime == "users":  # every seed serves the same users
            return hits[arm]
        return (generator.random(200) < level).astype(float)  # every run serves others, of few

    level = generator.random(200)
    hits = generator.random((2, 200)) < level
    return [
        tuple(
            RunResult(f"{arm}{seed}", f"{arm}", "final", 1.0, seed, None, {}, per_unit={"x": values(arm) * 1.0})
            for arm in range(2)
        )
        for seed in range(num_seeds)
    ]


@pytest.mark.parametrize("regime", ["seeds", "users", "seeds of few users"])
def test_equal_arms_are_told_apart_no_more_often_than_the_interval_says(regime):
    """Of 150 trials 7.5 are 5 %, give or take 2.7; a bootstrap over few seeds finds a difference in half of them."""
    for num_seeds in (2, 3, 5):
        generator = np.random.default_rng(17)
        found = 0
        for _ in range(150):
            pairs = null_pairs(regime, num_seeds, generator)
            interval = Paired(pairs, ["x"], None, {}, num_resamples=150).difference("x")
            found += not interval.contains_zero
        assert found <= 0.08 * 150, (num_seeds, found)


def test_five_seeds_are_not_absurdly_wide():
    generator = np.random.default_rng(3)
    for regime in ("seeds", "users", "seeds of few users"):
        intervals = [
            Paired(null_pairs(regime, 5, generator), ["x"], None, {}, num_resamples=150).difference("x")
            for _ in range(60)
        ]
        error = np.std([interval.mean for interval in intervals])
        reach = np.median([interval.high - interval.low for interval in intervals]) / 2
        assert 1.7 < reach / error < 3.3, regime  # 1.96 if the errors were known, 2.78 from five numbers


def test_with_one_seed_it_is_the_paired_bootstrap_over_users(comparison):
    ((arm, control), *_) = pairs_of(comparison, "muon", 1.0)
    ours = Paired([(arm, control)], ["ndcg@10"], None, {}, num_resamples=4000).difference("ndcg@10")
    theirs = paired_bootstrap_difference(
        control.per_target("ndcg@10"), arm.per_target("ndcg@10"), num_resamples=4000, seed=3
    )
    assert ours.mean == pytest.approx(theirs.mean, rel=1e-12)
    np.testing.assert_allclose(ours, theirs, atol=0.1 * (theirs.high - theirs.low))


def test_without_values_by_target_it_is_students_interval_over_seeds():
    def run(arm, seed, value):
        return RunResult(f"{arm}{seed}", arm, "final", 1.0, seed, None, {}, test={"auc": value})

    pairs = [(run("muon", seed, 0.8 + 0.01 * seed), run("control", seed, 0.8)) for seed in (1, 2, 3)]
    interval = Paired(pairs, ["auc"], None, {}).difference("auc")
    assert interval.mean == pytest.approx(0.025)
    assert interval == pytest.approx(t_interval([0.0125, 0.025, 0.0375]))
    one = Paired(pairs[:1], ["auc"], None, {}).difference("auc")
    assert (one.mean, one.low, one.high) == (pytest.approx(0.0125), -math.inf, math.inf)
    assert Paired([], ["auc"], None, {}).difference("auc") is None


def test_a_control_at_zero_has_no_relative_difference_and_the_verdict_says_so(comparison):
    def zeroed(run, seeds):
        if run.arm != "control" or run.seed not in seeds:
            return run
        greater = np.full_like(run.num_greater, 999) if run.num_greater is not None else None
        return dataclasses.replace(run, num_greater=greater, test={"ndcg@10": 0.0}, valid={"ndcg@10": 0.0})

    for seeds in ((1,), (1, 2, 3)):
        said = answer(dataclasses.replace(comparison, runs=tuple(zeroed(run, seeds) for run in comparison.runs)))
        muon = said.arms[1.0]["muon"]
        control = said.arms[1.0]["control"].test["ndcg@10"].mean
        if len(seeds) == 1:  # the mean over seeds is a divisor all the same
            assert muon.test["ndcg@10"].difference.mean == pytest.approx(muon.test["ndcg@10"].mean / control - 1)
        else:
            assert muon.test["ndcg@10"].difference is None and muon.valid.difference is None
            assert "there is no relative difference to 0." in said.verdict


def test_the_t_interval_is_students():
    # R: t.test(c(0.1, 0.2, 0.6))$conf.int
    interval = t_interval([0.1, 0.2, 0.6])
    assert interval.mean == pytest.approx(0.3)
    assert interval.low == pytest.approx(-0.3572, abs=1e-4)
    assert interval.high == pytest.approx(0.9572, abs=1e-4)
    assert t_interval([0.5]) == (0.5, -math.inf, math.inf)
    assert t_interval([]) is None


def test_a_target_is_reached_by_the_median_of_three_of_the_controls_best():
    def run(*values):
        steps = tuple(range(10, 10 * len(values) + 1, 10))
        return RunResult(
            "r", "a", "final", 1.0, 0, None, {}, curve_step=steps,
            curve_seconds=tuple(0.5 * step for step in steps), curve_value=values,
        )  # fmt: skip

    control = run(0.1, 0.2, 0.9, 0.3, 0.4, 0.4)  # one lucky evaluation; medians 0.2, 0.3, 0.4, 0.4
    arm = run(0.2, 0.397, 0.398, 0.399, 0.395, 0.41)
    design = made_up_design()
    assert dataclasses.astuple(reached(design, control, control, 1.0)) == (50, 25.0, False)
    for level in (0.9, 0.99, 1.0):
        values, best = arm.curve_value, 0.4
        loop = next(
            (i for i in range(2, 6) if sorted(values[i - 2 : i + 1])[1] >= level * best),
            None,
        )
        ours = reached(design, arm, control, level)
        assert ours.is_censored == (loop is None)
        assert ours.steps == (60 if loop is None else 10 * (loop + 1))
    falls = dataclasses.replace(design, higher_is_better=False)
    assert reached(falls, run(3.0, 2.0, 1.01, 1.005, 1.005), run(3.0, 2.0, 1.0, 1.0, 1.0), 0.99).steps == 40
    assert reached(design, run(0.1, 0.2), run(0.1, 0.2), 1.0) is None


def test_a_run_that_ends_early_counts_with_its_whole_budget(comparison):
    def cut(run):
        if (run.arm, run.stage, run.budget, run.seed) != ("muon", "final", 1.0, 1):
            return run
        kept = {name: getattr(run, name)[:3] for name in ("curve_step", "curve_seconds", "curve_value")}
        return dataclasses.replace(run, **kept)

    cut_short = dataclasses.replace(comparison, runs=tuple(cut(run) for run in comparison.runs))
    control, short = comparison.finals("control")[0], cut_short.finals("muon")[0]
    when = reached(comparison.design, short, control, 1.0)
    assert (short.curve_step[-1], short.num_steps) == (300, 2000)
    assert dataclasses.astuple(when) == (2000, pytest.approx(2000 * 0.06), True)
    muon = answer(cut_short, num_resamples=50).arms[1.0]["muon"]
    first, second, last = short.curve_value
    area = ((first + second) / 2 * 100 + (second + last) / 2 * 100 + last * 1700) / 1900
    assert muon.area.values[0] == pytest.approx(area)
    said = [flag for flag in flags(cut_short) if "ended early" in flag]
    assert len(said) == 1 and said[0].startswith(
        "1 final run of muon ended early, at step 300 of 2,000: a target never"
    )
    assert not any("ended early" in flag for flag in flags(comparison))


def test_every_number_of_an_arm_is_that_of_its_runs(comparison, found):
    muon, runs = found.arms[1.0]["muon"], comparison.finals("muon")
    controls = comparison.finals("control")
    assert list(found.arms) == [1.0, 0.5]
    assert list(found.arms[0.5]) == ["one-rate", "control", "muon"]
    values = [run.test["ndcg@10"] for run in runs]
    assert muon.test["ndcg@10"].values == pytest.approx(values)
    assert muon.test["ndcg@10"].sd == pytest.approx(np.std(values, ddof=1))
    means = [np.mean([run.valid["ndcg@10"] for run in own]) for own in (runs, controls)]
    assert muon.valid.both == pytest.approx(means)
    assert muon.valid.difference.mean == pytest.approx(means[0] / means[1] - 1)
    run = runs[0]
    heights = [(a + b) / 2 for a, b in zip(run.curve_value, run.curve_value[1:])]
    assert muon.area.values[0] == pytest.approx(np.mean(heights))  # its evaluations are evenly spaced
    assert muon.rates == runs[0].rates
    assert muon.steps_to_own_best == tuple(run.best_step for run in runs)
    assert muon.optimizer_share == pytest.approx(0.18)
    assert found.arms[1.0]["control"].test["ndcg@10"].difference is None
    assert found.arms[1.0]["control"].targets[1].steps_saved is None


def test_parts_of_the_targets_are_those_of_their_bounds(comparison, found):
    tail, middle, head = found.arms[1.0]["muon"].groups["popularity"]
    counts = comparison.targets["target_train_count"]
    assert (tail.label, middle.label, head.label) == ("tail (<=5)", "middle (6-20)", "head (>20)")
    assert [group.num_targets for group in (tail, middle, head)] == [
        int((counts <= 5).sum()),
        int(((counts > 5) & (counts <= 20)).sum()),
        int((counts > 20).sum()),
    ]
    run, control = comparison.finals("muon")[0], comparison.finals("control")[0]
    means = [other.per_target("ndcg@10")[counts <= 5].mean() for other in (run, control)]
    assert tail.metric.values[0] == pytest.approx(means[0])
    alone = dataclasses.replace(comparison, runs=(run, control))
    one = paired(alone, "muon", 1.0).difference("ndcg@10", "tail (<=5)")
    assert one.mean == pytest.approx(means[0] / means[1] - 1)
    assert [group.label for group in found.arms[1.0]["muon"].groups["length"]] == [
        "<=5 events", "6-10 events", "11-20 events", ">20 events",
    ]  # fmt: skip


def test_the_verdict_says_no_difference_shown_where_zero_lies_within(found):
    assert "muon reaches test NDCG@10" in found.verdict
    assert "one-rate (which also differs in tables.item.optimizer)" in found.verdict
    for lift, words in ((0.0, "no difference shown"), (0.15, "better"), (-0.15, "worse")):
        said = answer(made_up_comparison(lift=lift, num_users=300, evaluations=20), num_resamples=200)
        interval = said.arms[1.0]["muon"].test["ndcg@10"].difference
        assert interval.contains_zero is (lift == 0.0)
        sentence = next(part for part in said.verdict.split(". ") if part.startswith("muon reaches"))
        assert sentence.endswith(f": {words}"), sentence
    assert said.arms[1.0]["muon"].targets[0].num_censored == 3
    assert "never reaches 99 % of the best validation NDCG@10 of control within the budget" in said.verdict


def test_an_arm_that_learns_as_fast_takes_as_many_steps(comparison):
    controls = {(run.seed, run.budget): run for run in comparison.runs if run.arm == "control" and run.stage == "final"}

    def alike(run):
        if (run.arm, run.stage) != ("muon", "final"):
            return run
        control = controls[run.seed, run.budget]
        names = ("curve_step", "curve_seconds", "curve_value", "best_step")
        return dataclasses.replace(run, **{name: getattr(control, name) for name in names})

    said = answer(dataclasses.replace(comparison, runs=tuple(map(alike, comparison.runs))), num_resamples=20)
    assert "in as many steps (0 % to 0 %) and as many seconds of training (0 % to 0 %)" in said.verdict


def test_equal_arms_are_said_to_seem_slower_by_as_much_as_the_controls_own_seeds(comparison, found):
    design, runs = comparison.design, comparison.finals("control")
    for chance in found.arms[1.0]["control"].by_chance:
        savings, censored = [], 0
        for run in runs:
            for other in runs:
                if run is not other:
                    own = reached(design, run, other, chance.level)
                    savings.append(1 - own.steps / reached(design, other, other, chance.level).steps)
                    censored += own.is_censored
        assert (chance.num_pairs, chance.num_censored) == (6, censored)
        assert chance.steps_saved == pytest.approx(np.mean(savings))
    assert found.arms[1.0]["muon"].by_chance == ()
    chance = dataclasses.replace(found.arms[1.0]["control"].by_chance[0], num_censored=2)
    own = dict(found.arms[1.0])
    own["control"] = dataclasses.replace(own["control"], by_chance=(chance,))
    target = dataclasses.replace(own["muon"].targets[0], num_censored=3)
    own["muon"] = dataclasses.replace(own["muon"], targets=(target,))
    said = verdict(comparison, dataclasses.replace(found, arms={1.0: own}))
    assert "within the budget (2 of 6 pairs of control's own seeds never do)." in said


def test_a_validation_that_says_otherwise_than_the_test_is_told(comparison, found):
    assert "best validation is" not in found.verdict
    own = dict(found.arms[1.0])
    own["muon"] = dataclasses.replace(
        own["muon"], valid=dataclasses.replace(own["muon"].valid, difference=Interval(-0.02, -0.03, -0.01))
    )
    said = verdict(comparison, dataclasses.replace(found, arms={1.0: own}))
    assert "Its best validation is −2.0 % (95 % interval −3.0 % to −1.0 %): worse." in said


def test_flags_name_what_a_reader_must_know(comparison):
    unknown = dataclasses.replace(comparison, targets=None)
    assert any(flag.startswith("There is no targets.parquet") for flag in flags(unknown))
    assert not any(flag.startswith("There is no targets.parquet") for flag in flags(comparison))
    design, runs = comparison.design, list(comparison.runs)
    best = best_of(comparison, "muon", 1.0)
    grids = {name: (rate / 2, rate, 2 * rate) for name, rate in best.rates.items()}
    arms = tuple(dataclasses.replace(arm, grids=grids if arm.name == "muon" else arm.grids) for arm in design.arms)
    at_end = {**grids, "dense": (best.rates["dense"] / 2, best.rates["dense"])}
    quiet = [
        flag
        for flag in flags(Comparison(dataclasses.replace(design, arms=arms), tuple(runs)))
        if "muon" in flag and "unequal" not in flag
    ]
    assert quiet == []
    arms = tuple(dataclasses.replace(arm, grids=at_end if arm.name == "muon" else arm.grids) for arm in design.arms)
    bad = [
        dataclasses.replace(run, status="diverged") if (run.arm, run.trial) == ("control", 3)
        else dataclasses.replace(run, status="failed") if (run.arm, run.stage, run.seed) == ("muon", "final", 2)
        else dataclasses.replace(run, sources_hash="t" * 12) if run.arm == "one-rate"
        else dataclasses.replace(run, rates={**run.rates, "dense": min(run.rates["dense"], best.rates["dense"])})
        if run.arm == "muon"
        else run
        for run in runs
    ]  # fmt: skip
    said = flags(Comparison(dataclasses.replace(design, arms=arms), tuple(bad)))
    assert any(
        f"The best dense rate of muon at budget 1, {best.rates['dense']:g}, is the upper end" in flag for flag in said
    )
    assert "2 of 12 tuning runs of control diverged." in said
    assert "2 of 6 final runs of muon failed." in said
    assert "muon at budget 1 and 0.5 lacks seed 2." in said
    for what in ("trials", "final runs"):
        assert f"The {what} are of 2 sources: {'s' * 12}; {'t' * 12}." in said


def test_seconds_are_compared_where_both_runs_were_on_one_machine(comparison):
    def moved(run):
        return dataclasses.replace(run, machine="fast" if run.arm == "muon" and run.seed > 1 else "slow")

    said = answer(dataclasses.replace(comparison, runs=tuple(moved(run) for run in comparison.runs)), num_resamples=20)
    target = said.arms[1.0]["muon"].targets[0]
    (run, control), *_ = pairs_of(comparison, "muon", 1.0)
    own, other = (reached(comparison.design, one, control, 0.99) for one in (run, control))
    assert target.seconds_saved == (pytest.approx(1 - own.seconds / other.seconds), -math.inf, math.inf)
    assert math.isfinite(target.steps_saved.low)
    assert "The final runs are of 2 machines, and seconds compared where both are of one: fast; slow." in said.flags


def test_what_is_not_there_yet_is_said():
    design = made_up_design()
    assert "nothing can be said" in answer(Comparison(design, ())).verdict
    only = [run for run in made_up_comparison(num_users=20, evaluations=3).runs if run.arm == "muon"]
    assert "control, has no finished run" in answer(Comparison(design, tuple(only))).verdict
    # Runs of a callable: one number per run, no targets, no curves.
    runs = [
        RunResult(f"{arm}{seed}", arm, "final", 1.0, seed, None, {}, test={"auc": 0.7 + 0.1 * (arm == "muon")})
        for arm in ("control", "muon")
        for seed in (1, 2)
    ]
    said = answer(Comparison(Design("own", design.arms[1:], "control", metric="auc", seeds=(1, 2)), tuple(runs)))
    assert said.arms[1.0]["muon"].test["auc"].difference.mean == pytest.approx(1 / 7)
    assert said.arms[1.0]["muon"].groups == {}
    assert "muon reaches test AUC 0.8000, +14.3 %" in said.verdict


def lose(comparison, arm, seeds, status="diverged"):
    """The comparison after final runs of an arm were lost."""
    runs = [
        dataclasses.replace(run, status=status, test={}, num_greater=None, num_equal=None)
        if (run.arm, run.stage) == (arm, "final") and run.seed in seeds
        else run
        for run in comparison.runs
    ]
    return dataclasses.replace(comparison, runs=tuple(runs))


def test_the_verdict_compares_the_seeds_that_both_have_and_names_the_lost(comparison):
    lost = lose(lose(lose(comparison, "muon", [1]), "control", [3], "failed"), "one-rate", [1, 2, 3])
    said = answer(lost, num_resamples=100)
    (run,) = [run for run in lost.finals("muon") if run.seed == 2]
    (control,) = [run for run in lost.finals("control") if run.seed == 2]
    own, other = run.test["ndcg@10"], control.test["ndcg@10"]
    assert (
        f"muon reaches test NDCG@10 {own:.4f} and control {other:.4f} over the one seed that both have" in said.verdict
    )
    assert said.arms[1.0]["muon"].test["ndcg@10"].difference.mean == pytest.approx(own / other - 1)
    assert "(one seed: over users alone, so it says nothing of another seed)." in said.verdict
    assert "(mean of 2 seeds). Of control, 1 of 3 seeds failed." in said.verdict
    assert "Of muon, 1 of 3 seeds diverged." in said.verdict
    assert "one-rate has no finished final run (3 of 3 seeds diverged), so nothing can be said of it." in said.verdict
    assert "muon at budget 1 and 0.5 is held against control over 1 seed, which says nothing of another." in said.flags
    two = flags(lose(comparison, "muon", [1]))
    assert "muon at budget 1 and 0.5 is held against control over 2 seeds: so few make wide intervals." in two
    assert (
        "control, has no finished run (3 of 3 seeds failed)"
        in answer(lose(comparison, "control", [1, 2, 3], "failed")).verdict
    )


def aggregate_of(*comparisons):
    return aggregated([(one, answer(one, num_resamples=50)) for one in comparisons])


@pytest.fixture(scope="module")
def two():
    both = [
        made_up_comparison(lift=lift, num_users=200 + 10 * i, evaluations=20, budgets=(1.0,))
        for i, lift in enumerate((0.02, 0.1))
    ]
    return [
        dataclasses.replace(one, design=dataclasses.replace(one.design, name=name)) for one, name in zip(both, "ab")
    ]


def test_an_aggregate_is_the_mean_of_the_comparisons_own_numbers(two):
    answers = [answer(one, num_resamples=50).arms[1.0]["muon"] for one in two]
    (one_rate, muon) = aggregate_of(*two).arms
    assert (one_rate.arm, muon.arm, muon.comparisons, muon.num_pairs) == ("one-rate", "muon", ("a", "b"), 6)
    own = [one.test["ndcg@10"].difference for one in answers]
    assert muon.better.mean == pytest.approx(np.mean([interval.mean for interval in own]))
    # Independent errors, of which the mean has half: surer than the less sure one, and no surer than that says.
    assert muon.better.low == pytest.approx(muon.better.mean - np.hypot(*(one.mean - one.low for one in own)) / 2)
    assert muon.better.high == pytest.approx(muon.better.mean + np.hypot(*(one.high - one.mean for one in own)) / 2)
    for index in range(2):
        saved = [one.targets[index].steps_saved for one in answers]
        reach = np.hypot(*(one.high - one.mean for one in saved)) / 2
        assert muon.steps_saved[index] == pytest.approx(
            (np.mean([one.mean for one in saved]), *np.mean([one.mean for one in saved]) + [-reach, reach])
        )
    controls = [answer(one, num_resamples=50).arms[1.0]["control"] for one in two]
    by_chance = [[chance.steps_saved for chance in control.by_chance] for control in controls]
    assert muon.by_chance == one_rate.by_chance == pytest.approx(np.mean(by_chance, axis=0))
    assert total_cells(aggregate_of(*two))[1]["fewer steps to 99 %"].endswith(
        f", by chance {percent(muon.by_chance[0])}"
    )
    own_best = [one.steps_to_own_best_saved for one in answers]
    assert muon.own_best_saved.mean == pytest.approx(np.mean([interval.mean for interval in own_best]))
    assert total_cells(aggregate_of(*two))[1]["fewer steps to own best"] == shown(muon.own_best_saved)
    assert one_rate.num_censored == (6, 6)
    assert total_cells(aggregate_of(*two))[0]["fewer steps to 99 %"].startswith("≤ ")


def test_an_aggregate_says_what_it_does_not_know_and_refuses_what_has_no_mean(two):
    a, b = two
    with pytest.raises(ValueError, match="a and again have runs of one-rate in common; give each comparison once"):
        aggregate_of(a, dataclasses.replace(a, design=dataclasses.replace(a.design, name="again")))
    with pytest.raises(ValueError, match=r"unlike metrics have no mean: .*a by ndcg@10"):
        aggregated(
            [
                (one, answer(a, num_resamples=5))
                for one in (a, dataclasses.replace(b, design=dataclasses.replace(b.design, metric="mrr")))
            ]
        )
    with pytest.raises(ValueError, match="over no comparisons"):
        aggregated([])

    # One seed has no interval over seeds, and a comparison without runs counts nowhere.
    alone = lose(b, "muon", [2, 3])
    found = aggregate_of(a, alone, dataclasses.replace(b, runs=(), design=dataclasses.replace(b.design, name="c")))
    muon = next(arm for arm in found.arms if arm.arm == "muon")
    assert muon.comparisons == ("a", "b") and muon.num_pairs == 4
    assert muon.steps_saved[0].low == -math.inf and math.isfinite(muon.better.low)
    assert "c is left out: it has no finished final runs at its largest budget." in found.flags
    assert any(
        flag.startswith("b has one seed of muon, so that the mean steps have no interval") for flag in found.flags
    )

    def with_data(one, data):
        return dataclasses.replace(one, design=dataclasses.replace(one.design, facts={"fingerprint": data}))

    assert "a and b are ranked on the same targets" in aggregate_of(with_data(a, "x"), with_data(b, "x")).flags[0]
    assert not any("same targets" in flag for flag in aggregate_of(with_data(a, "x"), with_data(b, "y")).flags)

    half = dataclasses.replace(
        b,
        design=dataclasses.replace(b.design, budgets=(0.5,)),
        runs=tuple(dataclasses.replace(run, budget=0.5) for run in b.runs if run.budget == 1.0),
    )
    found = aggregate_of(a, half)
    assert found.arms[1].comparisons == ("a", "b")
    assert "b is over 50 % of the steps of its experiment." in found.flags

    nowhere = aggregate_of(a, lose(b, "muon", [1, 2, 3]))
    assert any(
        flag.startswith("b is left out of the means of muon: at its largest budget it has no seed")
        for flag in nowhere.flags
    )
    assert nowhere.arms[1].comparisons == ("a",)
    elsewhere = aggregate_of(a, lose(b, "one-rate", [1, 2, 3]))
    assert [arm.arm for arm in elsewhere.arms] == ["muon", "one-rate"]  # in the most comparisons first

    arms = [
        dataclasses.replace(arm, overrides={**arm.overrides, "dense_optimizer.ns_steps": 6}) for arm in b.design.arms
    ]
    other = dataclasses.replace(b, design=dataclasses.replace(b.design, arms=tuple(arms)))
    (flag,) = [flag for flag in aggregate_of(a, other).flags if flag.startswith("muon is not the same")]
    assert flag == "muon is not the same everywhere: dense_optimizer.ns_steps is None in a, 6 in b."


def test_in_an_aggregate_more_is_better_whichever_way_the_metric_goes():
    def of(name, losses):
        runs = [
            RunResult(f"{name}{arm}{seed}", arm, "final", 1.0, seed, None, {}, test={"log_loss": loss + 0.001 * seed})
            for arm, loss in losses.items()
            for seed in (1, 2, 3)
        ]
        design = Design(name, made_up_design().arms[1:], "control", "log_loss", higher_is_better=False, seeds=(1, 2, 3))
        return Comparison(design, tuple(runs))

    found = aggregate_of(of("a", {"control": 0.5, "muon": 0.45}), of("b", {"control": 0.4, "muon": 0.38}))
    (muon,) = found.arms
    assert muon.better.mean == pytest.approx(((1 - 0.452 / 0.502) + (1 - 0.382 / 0.402)) / 2)
    assert muon.better.low < muon.better.mean < muon.better.high
    (cells,) = total_cells(found)
    assert cells["test Log loss less"].startswith("+7.5 %") and cells["fewer steps to 99 %"] == "–"
    assert any("a is left out of the mean steps of muon" in flag for flag in found.flags)


def test_unequal_trials_are_flagged_and_a_grid_that_was_searched_whole_says_so():
    comparison = made_up_comparison(trials=6, num_users=40)
    rates = comparison.design.arm("one-rate").grids["lr"]
    runs = [
        dataclasses.replace(run, rates={"lr": rates[run.trial]})
        if run.trial is not None and run.arm == "one-rate"
        else run
        for run in comparison.runs
        if not (run.arm == "one-rate" and run.trial is not None and run.trial >= len(rates))
    ]
    flags = dataclasses.replace(comparison, runs=tuple(runs)).answer().flags
    said = "The arms had unequal numbers of trials at budget 1: one-rate 4 (its whole grid), control 6, muon 6."
    assert said in flags
