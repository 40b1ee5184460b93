"""The reports of made-up comparisons: whole, with parts missing, and over several."""

import dataclasses
import math

import numpy as np
import pytest

from muonrec.comparison.aggregate import aggregated
from muonrec.comparison.aggregate_report import write_aggregate_report
from muonrec.comparison.answer import answer
from muonrec.comparison.figures import _draw_groups
from muonrec.comparison.forest import share_tick
from muonrec.comparison.looks import looks
from muonrec.comparison.numbers import Group
from muonrec.comparison.rates_figure import _spaced, rate_panels
from muonrec.comparison.report import _fingerprints, write_comparison_report
from muonrec.comparison.results import Arm, Comparison, Design, RunResult
from muonrec.comparison.validation_figure import common_curves, target_value
from muonrec.comparison.verdict import shown
from muonrec.metrics import Interval
from pipeline.compare import print_answer
from tests.comparison.made_up import made_up_comparison, made_up_design
from tests.test_report import text_of

HOSTILE = "_<b>&$\\frac{muon"


def renamed(comparison, name, to):
    arms = tuple(dataclasses.replace(arm, name=to) if arm.name == name else arm for arm in comparison.design.arms)
    runs = tuple(dataclasses.replace(run, arm=to) if run.arm == name else run for run in comparison.runs)
    return Comparison(dataclasses.replace(comparison.design, arms=arms), runs, comparison.targets)


@pytest.fixture(scope="module")
def whole():
    """Three arms, one with a name that no markup and no formula may take in, and a run that failed."""
    comparison = renamed(made_up_comparison(num_users=200, budgets=(1.0,), seeds=(1, 2)), "muon", HOSTILE)
    failed = RunResult("f", HOSTILE, "final", 1.0, 3, None, {}, status="failed", fault="no memory")
    comparison = dataclasses.replace(comparison, runs=(*comparison.runs, failed))
    return comparison, answer(comparison, num_resamples=50)


@pytest.fixture(scope="module")
def page(whole, tmp_path_factory):
    return write_comparison_report(*whole, tmp_path_factory.mktemp("report"))


def test_the_page_holds_every_section_and_the_figures_lie_beside_it(whole, page):
    text, source = text_of(page), page.read_text()
    for title in ("How good", "How soon", "At what cost", "At which learning rates", "Who is served", "Protocol"):
        assert title in text
    names = ["groups-1", "results", "savings", "sensitivity-1", "spectra-1", "validation"]
    figures = sorted((page.parent / "figures").glob("*.png"))
    assert [path.stem for path in figures] == names
    assert min(path.stat().st_size for path in figures) > 20_000
    assert source.count("<svg") == len(names)
    assert "http" not in source.replace("http://www.w3.org", "") and "<script" not in source

    found = whole[1].arms[1.0]["one-rate"]
    assert whole[1].verdict.split(".")[0] in text
    assert all(flag in text for flag in whole[1].flags)
    assert f"{found.test['mrr'].mean:.4f} ± {found.test['mrr'].sd:.4f}" in text
    difference = found.test["ndcg@10"].difference
    assert f"−{-100 * difference.mean:.1f} % (−{-100 * difference.low:.1f} to −{-100 * difference.high:.1f})" in text
    assert "> 2,000" in text and "2 of 2 seeds never" in text  # one-rate is censored
    assert "36,000" in text and "18.0 %" in text and "0.78 GiB" in text
    assert "All runs of a seed started alike" in text and "initial state i1 i2" in text
    assert "dense_optimizer.lr, adamw.lr, tables.item.lr" in text
    assert "dense_optimizer tables.*.optimizer tables.item.optimizer" in text
    assert "failed: no memory" in text


def test_a_hostile_name_is_escaped_in_tables_and_figures(page):
    source = page.read_text()
    assert "<b>" not in source
    assert "_&lt;b&gt;&amp;$\\frac{muon" in source


def test_the_same_comparison_gives_the_same_bytes_in_any_place_and_old_figures_go(tmp_path):
    comparison = made_up_comparison(num_users=20, evaluations=4, seeds=(1,), budgets=(1.0,), trials=2)
    trials = dataclasses.replace(comparison, runs=tuple(run for run in comparison.runs if run.stage == "tune"))
    old = tmp_path / "a" / "figures" / "results.png"
    old.parent.mkdir(parents=True)
    old.touch()
    (old.parent / "groups-0.7.png").touch()  # of a budget that is asked for no more
    (old.parent / "own.png").touch()  # not ours
    pages = [write_comparison_report(trials, answer(trials), tmp_path / place) for place in "ab"]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert "No final run has finished yet" in text_of(pages[0])
    assert sorted(path.stem for path in old.parent.iterdir()) == ["own", "sensitivity-1"]


def test_what_a_callable_yields_is_reported_without_groups_and_spectra(tmp_path):
    arms = (Arm("adam", grids={"lr": (0.1, 1.0)}), Arm("muon", grids={"lr": (0.1, 1.0)}))
    design = Design("dlrm", arms, "adam", metric="log_loss", higher_is_better=False, trials=2, seeds=(0,))
    runs = []
    for arm, loss in (("adam", 0.5), ("muon", 0.45)):
        runs += [
            RunResult(f"{arm}0", arm, "tune", 1.0, 0, 0, {"lr": 0.1}, valid={"log_loss": loss}),
            RunResult(f"{arm}1", arm, "tune", 1.0, 0, 1, {"lr": 1.0}, status="diverged"),
            RunResult(
                f"{arm}2",
                arm,
                "final",
                1.0,
                0,
                None,
                {"lr": 0.1},
                valid={"log_loss": loss},
                test={"log_loss": loss + 0.01},
                curve_step=(10, 20, 30),
                curve_seconds=(1.0, 2.0, 3.0),
                curve_value=(0.9, 0.7, loss),
                num_steps=30,
                best_step=30,
            ),
        ]
    comparison = Comparison(design, tuple(runs))
    path = write_comparison_report(comparison, answer(comparison), tmp_path)
    text = text_of(path)
    assert "test Log loss" in text and "0.4600" in text and "Who is served" not in text
    assert "at the edge" in text
    assert sorted(one.stem for one in (tmp_path / "figures").iterdir()) == [
        "results",
        "savings",
        "sensitivity-1",
        "validation",
    ]
    assert target_value(comparison, 1.0) == 0.7  # the lowest median of three


def test_several_comparisons_are_drawn_below_each_other_with_their_mean(whole, tmp_path):
    other = renamed(made_up_comparison(num_users=150, evaluations=20, budgets=(1.0,), seeds=(1, 2)), "muon", HOSTILE)
    other = dataclasses.replace(other, design=dataclasses.replace(other.design, name="other <i>"))
    found = [whole, (other, answer(other, num_resamples=50))]
    path = write_aggregate_report(found, aggregated(found), tmp_path)
    text = text_of(path)
    assert "2 comparisons" in text and "other <i>" in text and "<i>" not in path.read_text()
    difference = whole[1].arms[1.0][HOSTILE].test["ndcg@10"].difference
    assert f"{100 * difference.mean:+.1f} %" in text
    assert "never reach 99 %" in text and "4 of 4" in text and "≤ −" in text
    assert (tmp_path / "figures" / "aggregate.png").stat().st_size > 20_000
    assert "all of the steps, 2 seeds" in text and "to its own best" in text


@pytest.mark.parametrize(
    "share, text", [(0, "0"), (-0.0, "0"), (0.015, "+1.5 %"), (0.03, "+3 %"), (-0.0025, "−0.25 %")]
)
def test_an_axis_of_shares_has_as_many_digits_as_it_takes(share, text):
    assert share_tick(share, 0) == text


def test_the_chosen_rates_keep_their_labels_where_there_is_no_room_for_all():
    ticks = [0.0001, 0.0002, 0.001, 0.002, 0.01]
    assert _spaced(ticks, ticks, share=0.2) == ["1e-4", "", "0.001", "", "0.01"]
    assert _spaced(ticks, [0.002, *ticks], share=0.2) == ["1e-4", "", "", "0.002", "0.01"]


def test_every_cell_of_the_printed_table_stands_under_its_heading(whole, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_answer("made-up", whole[1])
    lines = [
        [cell.strip() for cell in line.split("┃" if "┃" in line else "│")]
        for line in capsys.readouterr().out.splitlines()
    ]
    headings, *rows = [line[1:-1] for line in lines if len(line) > 2]
    table = {row[0]: dict(zip(headings, row, strict=True)) for row in rows}
    arm = whole[1].arms[1.0]["one-rate"]
    value = arm.test["ndcg@10"]
    assert list(table) == ["one-rate", "control", HOSTILE]
    assert table["one-rate"] == {
        "arm": "one-rate",
        "seeds": "2",
        "test NDCG@10": f"{value.mean:.4f} ± {value.sd:.4f}",
        "to the control": shown(value.difference),
        "steps to 99 %": "> 2,000",
        "events/s": "36,000",
        "optimizer": "3%",
        "memory": "800 MiB",
    }
    assert table["control"]["to the control"] == ""


def test_every_arm_has_a_look_of_its_own():
    design = made_up_design()
    arms = tuple(dataclasses.replace(design.arms[1], name=name) for name in ["control", *map(str, range(17))])
    found = looks(dataclasses.replace(design, arms=arms))
    assert len(set(found.values())) == len(found) == 18
    assert found["control"].dash == "-" != found["16"].dash


def test_muon_looks_the_same_with_and_without_an_arm_that_differs_in_more():
    arms = (Arm("one-rate", also_differs=("tables.*.optimizer",)), Arm("control"), Arm("muon"))
    with_it, without = (looks(Design("d", which, "control")) for which in (arms, arms[1:]))
    assert {name: with_it[name] for name in without} == without


def test_one_rate_for_all_appears_in_the_panel_of_each(whole):
    panels = rate_panels(made_up_design())
    assert list(panels) == ["dense", "rest", "tables"]
    assert panels["tables"] == {"one-rate": "lr", "control": "tables", "muon": "tables"}
    alone = Design("d", (Arm("a", grids={"lr": (1.0,)}), Arm("b", grids={"lr": (1.0,), "decay": (0.1,)})), "a")
    assert rate_panels(alone) == {"lr": {"a": "lr", "b": "lr"}, "decay": {"b": "decay"}}


def test_curves_meet_where_all_seeds_have_one():
    long = RunResult(
        *("a", "a", "final", 1.0, 1, None, {}),
        curve_step=(10, 20, 30),
        curve_seconds=(1.0, 2.0, 3.0),
        curve_value=(1.0, 2.0, 3.0),
    )
    short = RunResult(
        *("b", "a", "final", 1.0, 2, None, {}),
        curve_step=(5, 25),
        curve_seconds=(1.0, 5.0),
        curve_value=(0.0, 4.0),
    )
    steps, seconds, values = common_curves([long, short])
    np.testing.assert_array_equal(steps, [10, 20, 25])
    np.testing.assert_allclose(seconds, [1.5, 3, 3.75])
    np.testing.assert_allclose(values, [[1, 2, 2.5], [1, 3, 4]])


def test_a_gain_over_next_to_nothing_is_drawn_at_the_edge(whole):
    comparison, found = whole
    arms = found.arms[1.0]
    first, *others = arms[HOSTILE].groups["popularity"]
    metric = dataclasses.replace(first.metric, difference=Interval(2.6, -1.0, math.inf))
    groups = {**arms[HOSTILE].groups, "popularity": [dataclasses.replace(first, metric=metric), *others]}
    arms = {**arms, HOSTILE: dataclasses.replace(arms[HOSTILE], groups=groups)}
    relative = _draw_groups(comparison, dataclasses.replace(found, arms={1.0: arms}), 1.0).axes[2]
    assert relative.get_ylim()[1] == 1.0
    drawn = [(line.get_marker(), list(line.get_ydata())) for line in relative.lines]
    assert ("^", [1.0]) in drawn and ("None", [-1.0, 1.0]) in drawn


def test_parts_without_targets_are_not_drawn(whole):
    comparison, found = whole
    arms = {
        name: dataclasses.replace(arm, groups={"length": [*arm.groups["length"], Group("> 99 events", 0, 0, None)]})
        for name, arm in found.arms[1.0].items()
    }
    axes = _draw_groups(comparison, dataclasses.replace(found, arms={1.0: arms}), 1.0).axes
    labels = [text.get_text() for text in axes[-1].get_xticklabels()]
    assert labels and not any("99" in label for label in labels)


def test_runs_that_started_unlike_are_named(whole):
    runs = list(whole[0].runs)
    at = next(i for i, run in enumerate(runs) if run.arm == "control" and run.stage == "final")
    runs[at] = dataclasses.replace(runs[at], fingerprints={**runs[at].fingerprints, "epoch_order": "x"})
    found = _fingerprints(dataclasses.replace(whole[0], runs=tuple(runs)))
    assert found["seeds"] == [1, 2] and not found["are_equal"]
    assert dict(found["rows"])["epoch order"] == [
        {"o1": f"one-rate, {HOSTILE}", "x": "control"},
        {"o2": f"one-rate, control, {HOSTILE}"},
    ]
