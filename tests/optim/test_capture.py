"""Tests of the step in a CUDA graph: equal to an eager one where there is a GPU, refused with a reason elsewhere."""

import pytest
import torch
from torch import nn

from muonrec.optim import DistributedMuon, Muon, Split
from muonrec.optim.capture import capture_step

SHAPES = {
    "square": (64, 64),
    "square_too": (64, 64),
    "near": (60, 64),
    "tall": (96, 16),
    "kernel": (8, 4, 3),
    "qkv": (48, 16),
}
SPLITS = {"qkv": Split(0, (16, 16, 16))}


def _tensor(name, step):
    generator = torch.Generator().manual_seed(1000 * list(SHAPES).index(name) + step + 1)
    return torch.randn(SHAPES[name], generator=generator)


def _build(device, optimizer_class=DistributedMuon, **options):
    params = {name: nn.Parameter(_tensor(name, -1).to(device)) for name in SHAPES}
    for param in params.values():
        param.grad = torch.zeros_like(param)
    rate = torch.tensor(0.1, device=device)
    return params, rate, optimizer_class(params.items(), **{"lr": rate, "splits": SPLITS, **options})


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer_class", [Muon, DistributedMuon])
@pytest.mark.parametrize("options", [{}, {"normuon_beta2": 0.95, "cautious_weight_decay": True, "ns_gram": True}])
def test_a_captured_step_equals_an_eager_one_to_the_bit(optimizer_class, options):
    eager_params, eager_rate, eager = _build("cuda", optimizer_class, **options)
    params, rate, optimizer = _build("cuda", optimizer_class, **options)
    replay = capture_step(optimizer)
    for name in SHAPES:
        assert torch.equal(params[name], eager_params[name]), name
    for step in range(5):
        for some_params, some_rate in ((eager_params, eager_rate), (params, rate)):
            some_rate.fill_(0.1 / (step + 1))
            for name, param in some_params.items():
                param.grad.copy_(_tensor(name, step))
        eager.step()
        replay()
    for name in SHAPES:
        assert torch.equal(params[name], eager_params[name]), name
        for key, value in eager.named_state()[name].items():
            assert torch.equal(optimizer.named_state()[name][key], value), (name, key)


def test_a_step_that_needs_the_host_is_not_captured():
    params, _, optimizer = _build("cpu")
    with pytest.raises(ValueError, match=r"captured over \['cpu'\]; move all to one CUDA device"):
        capture_step(optimizer)

    params["tall"].grad = None
    with pytest.raises(ValueError, match="'tall' has no gradient, and a captured step cannot skip it; run backward"):
        capture_step(optimizer)

    _, _, optimizer = _build("cpu", lr=0.1)
    with pytest.raises(
        ValueError, match=r"group 0 has lr=0.1, which a captured step would freeze; pass lr=torch.tensor"
    ):
        capture_step(optimizer)

    optimizer.num_ranks = 2
    with pytest.raises(ValueError, match="a step over 2 ranks was to be captured"):
        capture_step(optimizer)
