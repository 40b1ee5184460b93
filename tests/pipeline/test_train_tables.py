"""Settings of production tables through the train stage: written, trained, resumed and refused by their path."""

import pytest
import yaml

from muonrec import checkpoint
from muonrec.config import load_config
from pipeline.train_config import TrainConfig
from tests.distributed.ranks import run_on_ranks
from tests.pipeline.test_resuming import listening
from tests.pipeline.test_train import config_file, dataset, losses, refusal, train_from

__all__ = ["dataset"]  # a fixture

SHORT = {
    "tables": {
        "item": {
            "lr": 0.1,
            "sharding": ["row_wise"],
            "data_type": "fp16",
            "stochastic_rounding": False,
            "pooling_factor": 60.0,
        }
    },
    "comms": {"forward": "fp16", "backward": "fp16"},
    "num_steps": 8,
    "checkpoints": {"every_steps": 4, "keep": 2},
}


def test_float16_rows_and_comms_train_by_a_config_and_follow_float32(dataset, tmp_path):
    path = config_file(dataset, tmp_path, **SHORT)
    _, said, _ = run_on_ranks(2, listening, train_from, path)[0]
    assert "between ranks rows travel as fp16, their gradients as fp16" in said
    exact = ("tables.item.data_type=fp32", "comms.forward=fp32", "comms.backward=fp32", f"output={tmp_path / 'exact'}")
    _, said, _ = run_on_ranks(2, listening, train_from, path, *exact)[0]
    assert not any("travel" in line for line in said)
    for (_, loss), (_, expected) in zip(losses(tmp_path / "run"), losses(tmp_path / "exact"), strict=True):
        assert loss != expected
        assert abs(loss / expected - 1) < 2e-3  # rows have 11 bits
    folder = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert yaml.safe_load((folder / "resolved.yaml").read_text())["tables"]["item"]["data_type"] == "fp16"
    assert "row_wise  fused" in (tmp_path / "run" / "plan.txt").read_text()


def test_a_run_from_before_a_setting_existed_goes_on_at_its_default(dataset, tmp_path):
    path = config_file(dataset, tmp_path, num_steps=8, checkpoints={"every_steps": 4, "keep": 2})
    run_on_ranks(1, train_from, path, "num_steps=8")
    resolved = tmp_path / "run" / "resolved.yaml"
    tree = yaml.safe_load(resolved.read_text())
    del tree["comms"], tree["tables"]["item"]["data_type"]
    resolved.write_text(yaml.safe_dump(tree))
    assert run_on_ranks(1, refusal, path, "num_steps=8")[0] == "accepted"
    assert "whose comms differ" in run_on_ranks(1, refusal, path, "comms.forward=fp16")[0]
    # Where rows are and how the planner guesses may change: what is learned does not.
    assert run_on_ranks(1, refusal, path, "tables.item.pooling_factor=30")[0] == "accepted"


def test_a_wrong_sharding_or_data_type_is_refused_by_its_path(dataset, tmp_path):
    path = config_file(dataset, tmp_path)
    for override, message in (
        ("tables.item.sharding=rowwise", "tables.item.sharding: .*give one of auto, row_wise, table_wise"),
        ("tables.item.data_type=fp8", "tables.item.data_type: .* 'fp32', 'fp16' or 'bf16'"),
        ("comms.forward=fp8", "comms.forward: .* 'fp32', 'fp16', 'bf16' or 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(TrainConfig, path, [override])
