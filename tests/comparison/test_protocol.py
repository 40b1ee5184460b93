"""Two arms may differ in what the comparison names, and in nothing else."""

import dataclasses

import pytest

from muonrec.comparison.protocol import (
    check_fingerprints,
    check_seeds,
    check_settings,
    check_tuned,
    differences,
    matches,
)
from tests.comparison.made_up import made_up_comparison

CONTROL = {
    "dense_optimizer": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.98]},
    "tables": {"item": {"lr": 0.1, "optimizer": "rowwise_adagrad"}},
    "schedule": {"warmup_fraction": 0.05},
    "batch_size": 256,
}
MUON = {**CONTROL, "dense_optimizer": {"name": "muon", "lr": 1e-2, "momentum": 0.95}}


def test_patterns_name_settings_and_sections():
    assert matches("dense_optimizer.lr", "dense_optimizer")
    assert matches("tables.item.lr", "tables.*.lr")
    assert not matches("tables.item.lr", "tables.*.optimizer")
    assert not matches("dense_optimizer", "dense_optimizer.lr")
    assert not matches("dense_optimizers.lr", "dense_optimizer")


def test_what_one_arm_alone_tunes_must_be_named():
    check_tuned("muon", ["dense_optimizer.lr", "adamw.lr"], ["adamw.lr", "dense_optimizer.lr"], may_differ=[])
    check_tuned(
        "muon",
        ["dense_optimizer.lr", "dense_optimizer.momentum"],
        ["dense_optimizer.lr"],
        may_differ=["dense_optimizer"],
    )
    with pytest.raises(
        ValueError, match=r"model.dropout \(muon alone\), tables.\*.lr \(the control alone\); tune them for"
    ):
        check_tuned("muon", ["model.dropout"], ["tables.*.lr"], may_differ=["dense_optimizer"])


@pytest.mark.parametrize(
    ("seeds", "message"), [((1, 2, 1), "seeds=\\[1, 2, 1\\] holds a seed twice"), ((0, 1), "holds 0 of tuning_seeds")]
)
def test_seeds_that_are_no_news_are_refused(seeds, message):
    check_seeds((1, 2), (0, 9))
    with pytest.raises(ValueError, match=r"tuning_seeds=\[0, 0\] holds a seed twice"):
        check_seeds((1, 2), (0, 0))
    with pytest.raises(ValueError, match=message):
        check_seeds(seeds, (0, 9))


def test_every_leaf_that_differs_is_found():
    found = differences(CONTROL, {**MUON, "batch_size": 512})
    assert found == {
        "dense_optimizer.name": ("adamw", "muon"),
        "dense_optimizer.lr": (1e-3, 1e-2),
        "dense_optimizer.betas": ([0.9, 0.98], None),
        "dense_optimizer.momentum": (None, 0.95),
        "batch_size": (256, 512),
    }
    assert set(check_settings("muon", MUON, CONTROL, named=["dense_optimizer"])) == set(found) - {"batch_size"}


def test_a_difference_that_nobody_named_stops_with_its_name():
    arm = {**MUON, "schedule": {"warmup_fraction": 0.5}, "batch_size": 128}
    with pytest.raises(ValueError) as error:
        check_settings("muon", arm, CONTROL, named=["dense_optimizer", "batch_size"])
    assert "arm 'muon' differs from the control in schedule.warmup_fraction (0.05 and 0.5), and so" in str(error.value)
    assert "batch_size" not in str(error.value)


@pytest.mark.parametrize("name", ["initial_state", "first_batches", "epoch_order"])
def test_runs_that_did_not_start_alike_are_refused(name):
    comparison = made_up_comparison(num_users=5, evaluations=3)
    check_fingerprints(comparison.design, comparison.runs)
    bad = comparison.finals("muon")[1]
    bad = dataclasses.replace(bad, fingerprints={**bad.fingerprints, name: "other"})
    with pytest.raises(
        ValueError, match=rf"\(muon\) of seed 2 did not start alike: they differ in {name} \(.2 and other"
    ):
        check_fingerprints(comparison.design, [*comparison.runs, bad])
    arms = tuple(dataclasses.replace(arm, may_differ=(*arm.may_differ, name)) for arm in comparison.design.arms)
    check_fingerprints(dataclasses.replace(comparison.design, arms=arms), [*comparison.runs, bad])
