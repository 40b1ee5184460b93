"""Tests of the plain twin, foremost that it is torch's Muon."""

import copy

import pytest
import torch
from torch import nn

from muonrec.optim import Muon, Split

SHAPES = [(16, 16), (8, 32), (32, 8), (1, 7), (7, 1), (33, 20)]


def _tensors(shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _train(make_optimizer, shapes=SHAPES, num_steps=5, dtype=torch.float32):
    params = [nn.Parameter(tensor) for tensor in _tensors(shapes, dtype=dtype)]
    optimizer = make_optimizer(params)
    for step in range(num_steps):
        for param, grad in zip(params, _tensors(shapes, seed=step + 1, dtype=dtype), strict=True):
            param.grad = grad
        optimizer.step()
    return params, [optimizer.state[param]["momentum_buffer"] for param in params]


@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_equals_torch_to_the_bit(adjust_lr_fn, nesterov, weight_decay):
    settings = {"lr": 0.02, "adjust_lr_fn": adjust_lr_fn, "nesterov": nesterov, "weight_decay": weight_decay}
    expected_params, expected_buffers = _train(lambda params: torch.optim.Muon(params, **settings))
    params, buffers = _train(lambda params: Muon(params, **settings))
    for found, expected in zip(params + buffers, expected_params + expected_buffers, strict=True):
        assert torch.equal(found, expected)


def test_muon_equals_torch_for_other_hyper_parameters():
    settings = {"momentum": 0.5, "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 1e-2}
    expected, _ = _train(lambda params: torch.optim.Muon(params, **settings))
    found, _ = _train(lambda params: Muon(params, **settings))
    assert all(map(torch.equal, found, expected))


def test_muon_equals_torch_for_bfloat16_parameters():
    expected, _ = _train(torch.optim.Muon, dtype=torch.bfloat16)
    found, _ = _train(Muon, dtype=torch.bfloat16)
    assert all(map(torch.equal, found, expected))


def test_defaults_are_those_of_torch():
    ours, theirs = (make([nn.Parameter(torch.ones(2, 2))]).defaults for make in (Muon, torch.optim.Muon))
    assert {key: ours[key] for key in theirs} == theirs
    assert set(ours) - set(theirs) == {"ns_dtype", "ns_gram", "normuon_beta2", "cautious_weight_decay"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_not_normalized_and_gradients_are_not_written_to(dtype, nesterov):
    # torch 2.13 divides the momentum by its norm here, for bfloat16 without Nesterov.
    param = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    param.grad = torch.full_like(param, 100.0)
    optimizer = Muon([param], momentum=0.5, nesterov=nesterov, ns_dtype=dtype)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.full_like(param, 50.0))
    assert torch.equal(param.grad, torch.full_like(param, 100.0))


def test_a_split_matrix_trains_as_its_blocks():
    split = Split(0, (4, 12, 8))
    whole, _ = _train(lambda params: Muon([("qkv", params[0])], splits={"qkv": split}), [(24, 6)])
    params = [nn.Parameter(block.clone()) for block in _tensors([(24, 6)])[0].split(split.sizes)]
    optimizer = Muon(params)
    for step in range(5):
        for param, grad in zip(params, _tensors([(24, 6)], seed=step + 1)[0].split(split.sizes), strict=True):
            param.grad = grad
        optimizer.step()
    assert torch.equal(whole[0], torch.cat([param.detach() for param in params]))


def test_a_kernel_trains_as_its_matrix():
    kernel, kernel_buffer = _train(Muon, [(6, 4, 3)])
    matrix, matrix_buffer = _train(Muon, [(6, 12)])
    assert torch.equal(kernel[0].flatten(1), matrix[0])
    assert torch.equal(kernel_buffer[0].flatten(1), matrix_buffer[0])


def test_a_missing_gradient_skips_the_parameter():
    params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))]
    params[0].grad = torch.eye(2)
    Muon(params).step()
    assert not torch.equal(params[0], torch.ones(2, 2))
    assert torch.equal(params[1], torch.ones(2, 2))


def test_state_exists_from_construction():
    param = nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([("proj", param)])
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.zeros(2, 3))
    assert optimizer.named_state()["proj"]["momentum_buffer"] is optimizer.state[param]["momentum_buffer"]
    assert torch.equal(param, torch.ones(2, 3))


def test_training_resumes_from_the_state_dict_of_torch():
    expected = [nn.Parameter(tensor) for tensor in _tensors(SHAPES)]
    theirs = torch.optim.Muon(expected, lr=0.5)
    for step in range(4):
        if step == 2:
            found = [nn.Parameter(param.detach().clone()) for param in expected]
            ours = Muon(found)
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for i, grad in enumerate(_tensors(SHAPES, seed=step)):
            expected[i].grad = grad
            if step >= 2:
                found[i].grad = grad
        theirs.step()
        if step >= 2:
            ours.step()
    assert all(map(torch.equal, found, expected))


def test_state_dict_is_loadable_without_pickled_classes(tmp_path):
    optimizer = Muon([("qkv", nn.Parameter(torch.ones(6, 3)))], splits={"qkv": Split(0, (3, 3))})
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))


def test_a_step_returns_what_its_closure_returns():
    assert Muon([nn.Parameter(torch.ones(2, 2))]).step(lambda: 3.0) == 3.0


def test_groups_have_their_own_rates_and_splits():
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(4, 2))
    groups = [{"params": [("a", a)], "lr": 0.0}, {"params": [("b", b)], "splits": {"b": Split(0, (2, 2))}}]
    optimizer = Muon(groups, lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.5]
    assert optimizer.splits == {"b": Split(0, (2, 2))}
    assert "splits" in groups[1] and "splits" not in optimizer.param_groups[1]


def test_a_group_added_later_has_state():
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))])
    late = nn.Parameter(torch.ones(3, 3))
    optimizer.add_param_group({"params": [late]})
    assert optimizer.state[late]["momentum_buffer"].shape == (3, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; use 0 or more"),
        ({"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\)"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; use 0 or more"),
        ({"momentum": 1.5}, "momentum is 1.5; use 0 to 1"),
        ({"adjust_lr_fn": "rms"}, "adjust_lr_fn is 'rms'; use one of"),
        ({"ns_dtype": torch.float16}, "ns_dtype is torch.float16; use one of"),
        ({"ns_steps": 0}, "ns_steps is 0; use 1 to 99"),
        ({"splits": {"pro": Split(0, (2,))}}, "names 'pro', which Muon does not hold; close names are proj"),
        ({"splits": {"proj": Split(0, (3,))}}, r"the split of 'proj' has sizes \(3,\), together 3"),
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Muon([("proj", nn.Parameter(torch.ones(2, 2)))], **settings)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([("bias", nn.Parameter(torch.ones(2)))], r"was given 'bias' of shape \(2,\), which is not a matrix"),
        ([("ids", torch.ones(2, 2, dtype=torch.int64))], "was given 'ids' of torch.int64; it needs real floating"),
        ([("a", nn.Parameter(torch.ones(2, 2))), ("a", nn.Parameter(torch.ones(2, 2)))], "two parameters .* 'a'"),
    ],
)
def test_parameters_that_cannot_be_trained_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        Muon(params)
