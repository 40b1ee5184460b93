"""What a comparison writes is what it reads."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muonrec.comparison.results import (
    RESULTS,
    Comparison,
    RunResult,
    read_comparison,
    write_results,
    write_targets,
)
from muonrec.metrics import ndcg_at
from tests.comparison.made_up import made_up_comparison


def test_a_comparison_is_read_as_it_was_written(tmp_path):
    written = made_up_comparison(num_users=20, evaluations=4)
    failed = RunResult("f", "muon", "final", 1.0, 9, None, {}, status="failed", fault="no memory")
    values = RunResult("v", "muon", "final", 1.0, 8, None, {"lr": 0.1}, per_unit={"log_loss": np.array([0.5, 0.25])})
    written = Comparison(written.design, (*written.runs, failed, values), written.targets)
    write_results(tmp_path, written.design, written.runs)
    write_targets(tmp_path, written.targets)

    read = read_comparison(tmp_path)

    assert read.design == written.design
    for ours, theirs in zip(written.runs, read.runs, strict=True):
        for field in dataclasses.fields(RunResult):
            one, other = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name == "spectra":
                assert [s.name for s in one] == [s.name for s in other]
                continue
            np.testing.assert_equal(other, one, err_msg=field.name)
    np.testing.assert_equal(read.targets, written.targets)
    assert not list(tmp_path.glob(".*"))


def test_metrics_per_target_follow_from_the_counts():
    run = made_up_comparison(num_users=30).finals("muon")[0]
    np.testing.assert_array_equal(run.per_target("ndcg@10"), ndcg_at(10, run.num_greater, run.num_equal))
    assert run.per_target("mrr").shape == (30,)
    assert RunResult("t", "muon", "tune", 1.0, 0, 0, {}).per_target("mrr") is None


def test_runs_are_found_by_arm_and_stage():
    comparison = made_up_comparison(num_users=10)
    assert [run.trial for run in comparison.trials("control", 1.0)] == list(range(6))
    assert {run.budget for run in comparison.trials("control", 0.5)} == {0.5}
    assert [run.seed for run in comparison.finals("muon", 0.5)] == [1, 2, 3]
    with pytest.raises(ValueError, match="there is no arm 'sgd'; the arms are one-rate, control, muon"):
        comparison.design.arm("sgd")


def test_what_is_no_comparison_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no results\.parquet"):
        read_comparison(tmp_path)
    pq.write_table(pa.table({"a": [1]}), tmp_path / RESULTS)
    with pytest.raises(ValueError, match="does not say what was compared"):
        read_comparison(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    for name in ("targets.parquet", "results.parquet"):
        comparison = made_up_comparison(num_users=5, evaluations=3)
        write_results(tmp_path, comparison.design, comparison.runs)
        write_targets(tmp_path, comparison.targets)
        whole = (tmp_path / name).read_bytes()
        for damaged in (b"hello", whole[:-20], whole[:20] + b"x" * (len(whole) // 2) + whole[len(whole) // 2 + 20 :]):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                read_comparison(tmp_path)
