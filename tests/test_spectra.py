"""Spectra are those of the matrices that a step started from and ended at, and recording them moves no number."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from muonrec.config import parse_config
from muonrec.data.synthetic import SyntheticSource
from muonrec.mesh import Ranks
from muonrec.optim import Split
from muonrec.spectra import SPECTRA, SpectraLog, read_spectra, singular_values, stable_rank
from pipeline.data import DataConfig, build_dataset
from pipeline.train import TrainConfig, train
from tests.distributed.ranks import run_on_ranks


def with_spectrum(*values, size=4):
    """A square matrix of these singular values, between random rotations."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    return left[:, : len(values)] * torch.tensor(values) @ right[: len(values)]


def test_stable_rank_is_the_squared_ratio_of_two_norms():
    matrix = with_spectrum(4.0, 2.0, 2.0, 1.0)
    values = singular_values(matrix)
    torch.testing.assert_close(values, torch.tensor([4.0, 2.0, 2.0, 1.0]), atol=1e-5, rtol=1e-5)  # rounding of float32
    assert stable_rank(values) == pytest.approx(25 / 16, rel=1e-5)
    norms = torch.linalg.matrix_norm(matrix) / torch.linalg.matrix_norm(matrix, ord=2)
    assert stable_rank(values) == pytest.approx(float(norms) ** 2, rel=1e-5)
    assert stable_rank(singular_values(torch.eye(6)[:, :3])) == pytest.approx(3.0)
    assert stable_rank(torch.zeros(3)) == 0.0
    assert singular_values(torch.tensor([[torch.inf, 1.0]])).isnan().all()


def test_the_update_is_what_the_step_added_in_each_block(tmp_path):
    fused = nn.Parameter(torch.cat([with_spectrum(1.0, 1.0, 1.0, 1.0), with_spectrum(3.0)]))
    kernel = nn.Parameter(torch.ones(2, 3, 5))
    log = SpectraLog(tmp_path, {"qk": (fused, Split(0, (4, 4))), "conv": (kernel, None)}, is_first=True, start_step=0)
    log.before_step()
    with torch.no_grad():
        fused[:4] += with_spectrum(0.5)
    log.after_step(7)

    found = {(s.name, s.what): s for s in read_spectra(tmp_path)}
    assert list(found) == [(n, what) for n in ("qk[0]", "qk[1]", "conv") for what in ("weight", "update")]
    assert {s.step for s in found.values()} == {7}
    assert found["qk[0]", "update"].singular_values == pytest.approx((0.5, 0, 0, 0), abs=1e-6)
    assert found["qk[1]", "update"].stable_rank == 0.0
    assert found["qk[1]", "weight"].stable_rank == pytest.approx(1.0)
    assert len(found["conv", "weight"].singular_values) == 2
    assert fused.grad is None and fused.requires_grad


def test_a_resumed_run_has_each_step_once(tmp_path):
    matrices = {f"blocks.{i}.weight": (torch.eye(2), None) for i in range(30)}
    log = SpectraLog(tmp_path, matrices, is_first=True, start_step=0)
    for step in (10, 20):
        log.after_step(step)
    again = SpectraLog(tmp_path, matrices, is_first=True, start_step=10)
    again.after_step(20)
    spectra = read_spectra(tmp_path)
    assert [(s.step, s.what) for s in spectra] == [(10, "weight")] * 12 + [(20, "weight")] * 12
    assert [s.name for s in spectra[:3]] == ["blocks.0.weight", "blocks.2.weight", "blocks.5.weight"]
    SpectraLog(tmp_path, matrices, is_first=True, start_step=0)
    assert read_spectra(tmp_path) == () and not list(tmp_path.iterdir())


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
            "validation": {"every_steps": 2, "max_users": 20},
        }
        train(parse_config(TrainConfig, {**tree, **change}, source="the test"), ranks)


def test_recording_spectra_changes_no_number_and_shards_give_those_of_the_whole(tmp_path):
    source = SyntheticSource(format="synthetic", num_users=60, num_items=40)
    build_dataset(DataConfig(source=source, output=tmp_path / "data"))
    changes = {
        "off": {},
        "muon": {"spectra": True},
        "fsdp2": {"spectra": True, "dense_sharding": "fsdp2"},
        "adamw": {"spectra": True, "dense_optimizer": "adamw"},
    }
    run_on_ranks(2, train_each, tmp_path / "data", tmp_path, changes)

    off, on = (losses_of(tmp_path / name) for name in ("off", "muon"))
    assert on == off and len(off) == 6
    assert not (tmp_path / "off" / SPECTRA).exists()
    muon, sharded, adamw = (read_spectra(tmp_path / name) for name in ("muon", "fsdp2", "adamw"))
    assert [(s.step, s.name, s.what) for s in muon] == [(s.step, s.name, s.what) for s in sharded]
    assert [s.name for s in muon] == [s.name for s in adamw] and {s.step for s in muon} == {2, 4}
    for one, other in zip(muon, sharded, strict=True):  # sums in another order, over four steps of a bf16 iteration
        np.testing.assert_allclose(one.singular_values, other.singular_values, rtol=1e-2, atol=1e-4)
    # Muon's mechanism: what it adds has nearly equal singular values.
    ranks = [np.mean([s.stable_rank for s in spectra if s.what == "update"]) for spectra in (muon, adamw)]
    assert ranks[0] > 1.5 * ranks[1], ranks


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line.get("loss_nats"), line.get("valid_ndcg@10"))
        for line in lines
        if "loss_nats" in line or "valid_ndcg@10" in line
    ]
