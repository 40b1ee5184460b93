"""The spectra of a tower with a known step."""

import json

import pytest
import torch
from torch import nn

from pipeline.spectra import SPECTRA, Spectra


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
    lines = [json.loads(line) for line in (tmp_path / SPECTRA).read_text().splitlines()]

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
