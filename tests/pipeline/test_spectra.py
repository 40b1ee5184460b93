"""The spectra of a tower with a known step, and of a run, whose numbers they must not move."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from muonrec.config import parse_config
from muonrec.data.synthetic import SyntheticSource
from muonrec.mesh import Ranks
from muonrec.runs import SPECTRA
from pipeline.data import DataConfig, build_dataset
from pipeline.spectra import Spectra
from pipeline.train import train
from pipeline.train_config import TrainConfig
from tests.distributed.ranks import run_on_ranks


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_weights_and_updates_are_told_apart_and_fused_blocks_split(tmp_path):
    model = nn.Sequential()
    model.add_module("linear", nn.Linear(4, 3))
    model.add_module("gru", nn.GRU(4, 4))
    spectra = Spectra(tmp_path, model, (), every_steps=2, enabled=True)
    for step in (1, 2):
        with spectra.around(step), torch.no_grad():
            weight = model.linear.weight
            weight.copy_(torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0]))[:3])
            weight.add_(torch.eye(4)[:3], alpha=0.5 * step)
    lines = read(tmp_path / SPECTRA)

    assert {line["step"] for line in lines} == {2}
    weight, update = (line for line in lines if line["name"] == "linear.weight")
    assert weight["singular_values"] == [3.0, 2.0, 2.0]
    assert weight["stable_rank"] == pytest.approx(17 / 9)
    # The second step found diag(2.5, 1.5, 1.5) and left diag(3, 2, 2).
    assert update["what"] == "update"
    assert update["singular_values"] == [0.5, 0.5, 0.5]
    assert update["stable_rank"] == pytest.approx(3.0)
    gates = [line["name"] for line in lines if line["what"] == "weight" and line["name"].startswith("gru")]
    assert gates == [f"gru.weight_{part}_l0[{gate}]" for part in ("ih", "hh") for gate in range(3)]
    assert all(line["stable_rank"] == 0.0 for line in lines if line["what"] == "update" and "gru" in line["name"])


def test_a_matrix_that_left_the_finite_numbers_is_passed_over(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with Spectra(tmp_path, model, (), every_steps=1, enabled=True).around(1), torch.no_grad():
        model[0].weight.fill_(torch.inf)
    assert {line["name"] for line in read(tmp_path / SPECTRA)} == {"1.weight"}


def train_each(data, folder, changes):
    """Train a run for each change, in a folder of its name."""
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.device("cpu"))
    for name, change in changes.items():
        tree = {
            "output": str(folder / name),
            "data": {"source": {"format": "synthetic", "num_users": 60, "num_items": 40}, "output": str(data)},
            "model": {"name": "sasrec", "embedding_dim": 8, "max_length": 10, "dropout": 0.1},
            "loss": {"name": "sampled_softmax", "num_negatives": 8},
            "tables": {"item": {"lr": 0.1, "sharding": "row_wise"}},
            "batch_size": 32,
            "num_steps": 4,
            "log_every_steps": 1,
            "tensorboard": False,
            "validation": {"every_steps": 4, "max_users": 20},
        }
        train(parse_config(TrainConfig, {**tree, **change}, source="the test"), ranks)


def test_recording_moves_no_number_and_shards_give_the_spectra_of_the_whole(tmp_path):
    source = SyntheticSource(format="synthetic", num_users=60, num_items=40)
    build_dataset(DataConfig(source=source, output=tmp_path / "data"))
    changes = {
        "off": {},
        "muon": {"spectra_every_steps": 2},
        "fsdp2": {"spectra_every_steps": 2, "dense_sharding": "fsdp2"},
        "adamw": {"spectra_every_steps": 2, "dense_optimizer": "adamw"},
    }
    run_on_ranks(2, train_each, tmp_path / "data", tmp_path, changes)

    off, on = (
        [
            (line["step"], line.get("loss_nats"), line.get("valid_ndcg@10"))
            for line in read(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("off", "muon")
    )
    assert on == off and len(off) >= 5
    assert not (tmp_path / "off" / SPECTRA).exists()
    muon, sharded, adamw = (read(tmp_path / name / SPECTRA) for name in ("muon", "fsdp2", "adamw"))
    keys = [[(line["step"], line["name"], line["what"]) for line in lines] for lines in (muon, sharded, adamw)]
    assert keys[0] == keys[1] == keys[2] and {step for step, _, _ in keys[0]} == {2, 4}
    for one, other in zip(muon, sharded, strict=True):  # sums in another order, through an iteration in bf16
        np.testing.assert_allclose(one["singular_values"], other["singular_values"], rtol=1e-2, atol=1e-4)
    # Muon's mechanism: what it adds has nearly equal singular values.
    ranks = [np.mean([line["stable_rank"] for line in lines if line["what"] == "update"]) for lines in (muon, adamw)]
    assert ranks[0] > 1.5 * ranks[1], ranks
