"""The answer against loops, and the words against the numbers."""

import dataclasses
import math

import numpy as np
import pytest

from muonrec.comparison.aggregate import aggregated
from muonrec.comparison.answer import answer, flags, pairs_of, reached, resample
from muonrec.comparison.bootstrap import Resampled, t_interval
from muonrec.comparison.results import Comparison, Design, RunResult
from muonrec.metrics import paired_bootstrap_difference
from tests.comparison.made_up import made_up_comparison, made_up_design


@pytest.fixture(scope="module")
def comparison():
    return made_up_comparison(num_users=300, evaluations=20)


@pytest.fixture(scope="module")
def found(comparison):
    return answer(comparison, num_resamples=400)


def test_the_interval_is_that_of_a_loop_over_resampled_seeds_and_users(comparison):
    pairs = pairs_of(comparison, "muon", 1.0)
    users = np.arange(300) // 2  # every user has two targets
    resampled = Resampled([run for pair in pairs for run in pair], ["ndcg@10"], users, {}, num_resamples=4000)
    interval = resampled.difference(pairs, "ndcg@10")

    values = np.array([[run.per_target("ndcg@10") for run in pair] for pair in pairs])  # [seeds, 2, targets]
    generator, ratios = np.random.default_rng(5), []
    for _ in range(4000):
        sums = np.zeros(2)
        chosen = generator.integers(150, size=150)
        for seed in generator.integers(3, size=2):  # one less than there are
            for side in range(2):
                sums[side] += values[seed, side].reshape(150, 2)[chosen].sum()
        ratios.append(sums[0] / sums[1] - 1)
    assert interval.mean == pytest.approx(values[:, 0].mean() / values[:, 1].mean() - 1, rel=1e-12)
    # The quantiles of 4000 draws scatter by about a thirtieth of the interval's width.
    width = interval.high - interval.low
    np.testing.assert_allclose([interval.low, interval.high], np.quantile(ratios, [0.025, 0.975]), atol=0.08 * width)


def test_with_one_seed_it_is_the_paired_bootstrap_over_users(comparison):
    ((arm, control), *_) = pairs_of(comparison, "muon", 1.0)
    ours = Resampled([arm, control], ["ndcg@10"], None, {}, num_resamples=4000).difference([(arm, control)], "ndcg@10")
    theirs = paired_bootstrap_difference(
        control.per_target("ndcg@10"), arm.per_target("ndcg@10"), num_resamples=4000, seed=3
    )
    assert ours.mean == pytest.approx(theirs.mean, rel=1e-12)
    np.testing.assert_allclose(ours, theirs, atol=0.1 * (theirs.high - theirs.low))


def test_without_values_by_target_it_is_students_interval_over_seeds():
    def run(arm, seed, value):
        return RunResult(f"{arm}{seed}", arm, "final", 1.0, seed, None, {}, test={"auc": value})

    pairs = [(run("muon", seed, 0.8 + 0.01 * seed), run("control", seed, 0.8)) for seed in (1, 2, 3)]
    resampled = Resampled([run for pair in pairs for run in pair], ["auc"], None, {})
    interval = resampled.difference(pairs, "auc")
    assert interval.mean == pytest.approx(0.025)
    assert interval == pytest.approx(t_interval([0.0125, 0.025, 0.0375]))
    drawn = resampled.differences(pairs, "auc")  # what an aggregate is made of
    assert (drawn.min(), drawn.max()) == (pytest.approx(0.0125), pytest.approx(0.0375))
    one = resampled.difference(pairs[:1], "auc")
    assert (one.mean, one.low, one.high) == (pytest.approx(0.0125), -math.inf, math.inf)
    assert resampled.difference([], "auc") is None


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


def test_every_number_of_an_arm_is_that_of_its_runs(comparison, found):
    muon, runs = found.arms[1.0]["muon"], comparison.finals("muon")
    controls = comparison.finals("control")
    assert list(found.arms) == [1.0, 0.5]
    assert list(found.arms[0.5]) == ["one-rate", "control", "muon"]
    values = [run.test["ndcg@10"] for run in runs]
    assert muon.test["ndcg@10"].values == pytest.approx(values)
    assert muon.test["ndcg@10"].sd == pytest.approx(np.std(values, ddof=1))
    relative = [run.valid["ndcg@10"] / other.valid["ndcg@10"] - 1 for run, other in zip(runs, controls, strict=True)]
    assert muon.valid.difference.mean == pytest.approx(np.mean(relative))
    run = runs[0]
    heights = [(a + b) / 2 for a, b in zip(run.curve_value, run.curve_value[1:])]
    assert muon.area.values[0] == pytest.approx(np.mean(heights))  # its evaluations are evenly spaced
    assert muon.rates == comparison.best_trial("muon").rates
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
    one = resample(comparison, 1.0).difference([(run, control)], "ndcg@10", "tail (<=5)")
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


def test_flags_name_what_a_reader_must_know(comparison):
    design, runs = comparison.design, list(comparison.runs)
    best = comparison.best_trial("muon")
    grids = {name: (rate / 2, rate, 2 * rate) for name, rate in best.rates.items()}
    arms = tuple(dataclasses.replace(arm, grids=grids if arm.name == "muon" else arm.grids) for arm in design.arms)
    at_end = {**grids, "dense": (best.rates["dense"] / 2, best.rates["dense"])}
    quiet = [flag for flag in flags(Comparison(dataclasses.replace(design, arms=arms), tuple(runs))) if "muon" in flag]
    assert quiet == []
    arms = tuple(dataclasses.replace(arm, grids=at_end if arm.name == "muon" else arm.grids) for arm in design.arms)
    bad = [
        dataclasses.replace(run, status="diverged") if (run.arm, run.trial) == ("control", 3)
        else dataclasses.replace(run, status="failed") if (run.arm, run.stage, run.seed) == ("muon", "final", 2)
        else dataclasses.replace(run, sources_hash="t" * 12) if run.arm == "one-rate"
        else run
        for run in runs
    ]  # fmt: skip
    said = flags(Comparison(dataclasses.replace(design, arms=arms), tuple(bad)))
    assert any(f"The best dense rate of muon, {best.rates['dense']:g}, is the upper end" in flag for flag in said)
    assert "1 of 6 trials of control diverged." in said
    assert "2 of 6 final runs of muon failed." in said
    assert "muon at budget 0.5 lacks seed 2." in said
    assert f"The runs are of 2 sources: {'s' * 12}, {'t' * 12}." in said


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


def test_an_aggregate_is_the_mean_over_comparisons_of_equal_weight():
    two = [made_up_comparison(lift=lift, num_users=200, evaluations=20) for lift in (0.02, 0.1)]
    answers = [answer(one, num_resamples=300).arms[1.0]["muon"] for one in two]
    (one_rate, muon) = aggregated(two, num_resamples=300)
    assert (one_rate.arm, muon.arm, muon.num_comparisons, muon.num_pairs) == ("one-rate", "muon", 2, 6)
    assert muon.metric.mean == pytest.approx(np.mean([one.test["ndcg@10"].difference.mean for one in answers]))
    assert muon.metric.low < muon.metric.mean < muon.metric.high
    for index in range(2):
        saved = [one.targets[index].steps_saved.mean for one in answers]
        assert muon.steps_saved[index].mean == pytest.approx(np.mean(saved))
    # Independent comparisons: the mean is surer than either.
    widths = [one.test["ndcg@10"].difference for one in answers]
    assert muon.metric.high - muon.metric.low < min(interval.high - interval.low for interval in widths)
    assert one_rate.num_censored == (6, 6)
