"""Tests of what Muon knows beyond torch's, in the plain twin and in DistributedMuon on one rank, which must agree."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from muonrec.optim import DistributedMuon, Muon, Split

SHAPES = {
    "square": (8, 8),
    "square_too": (8, 8),
    "near": (7, 8),
    "wide": (6, 16),
    "tall": (16, 6),
    "row": (1, 8),
    "column": (8, 1),
    "kernel": (4, 3, 2, 2),
    "qkv": (15, 6),
    "heads": (12, 5),
    "uvqk": (6, 14),
}
SPLITS = {
    "qkv": Split(0, (4, 6, 5)),
    "heads": Split.heads(4, (12, 5)),
    "uvqk": Split(1, (2, 3, 4, 5), transposed=True),
}
# What float32 rounds, amplified by the iteration (485 for Jordan's coefficients, 970 for Polar Express on the
# smallest singular values), times a rate of 0.1 and five steps.
CLOSE = {"atol": 1e-4, "rtol": 0}


def _tensor(name, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * list(SHAPES).index(name) + step + 1)
    return torch.randn(SHAPES[name], generator=generator).to(dtype)


def _train(optimizer_class, num_steps=5, dtype=torch.float32, lr=0.1, **options):
    """Parameters and state by name."""
    params = {name: nn.Parameter(_tensor(name, -1, dtype)) for name in SHAPES}
    params["kernel"] = nn.Parameter(params["kernel"].detach().to(memory_format=torch.channels_last))
    optimizer = optimizer_class(params.items(), lr=lr, splits=SPLITS, **options)
    for step in range(num_steps):
        for name, param in params.items():
            param.grad = _tensor(name, step, dtype)
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}, optimizer.named_state()


def _assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **tolerance, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("beta2", [None, 0.9])
@pytest.mark.parametrize("coefficients", ["jordan", "polar_express"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_distributed_muon_equals_muon_for_every_combination_of_options(nesterov, coefficients, beta2, cautious):
    for adjust_lr_fn, weight_decay in itertools.product((None, "match_rms_adamw", "spectral_unclamped"), (0.0, 0.3)):
        options = {
            "nesterov": nesterov,
            "ns_coefficients": coefficients,
            "normuon_beta2": beta2,
            "cautious_weight_decay": cautious,
            "adjust_lr_fn": adjust_lr_fn,
            "weight_decay": weight_decay,
            "ns_dtype": torch.float32,
            "ns_gram": weight_decay > 0,
        }
        expected_params, expected_state = _train(Muon, **options)
        params, state = _train(DistributedMuon, **options)
        _assert_close(params, expected_params, **CLOSE)
        for name in SHAPES:
            _assert_close(state[name], expected_state[name], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"normuon_beta2": 0.9, "cautious_weight_decay": True}])
def test_distributed_muon_equals_muon_in_bfloat16(dtype, options):
    expected, _ = _train(Muon, dtype=dtype, num_steps=1, lr=1.0, **options)
    found, _ = _train(DistributedMuon, dtype=dtype, num_steps=1, lr=1.0, **options)
    # Updates of up to 1, rounded at 2^-9, amplified in the smallest singular values.
    _assert_close(found, expected, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("optimizer_class", [Muon, DistributedMuon])
def test_two_runs_give_the_same_bits(optimizer_class):
    first, first_state = _train(optimizer_class, normuon_beta2=0.95, cautious_weight_decay=True)
    second, second_state = _train(optimizer_class, normuon_beta2=0.95, cautious_weight_decay=True)
    _assert_close(first, second, atol=0, rtol=0)
    for name in SHAPES:
        _assert_close(first_state[name], second_state[name], atol=0, rtol=0)


# NorMuon --------------------------------------------------------------------------------------------------------------


def _first_update(shape, split=None, **options):
    param = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    splits = {} if split is None else {"it": split}
    optimizer = Muon([("it", param)], lr=1.0, weight_decay=0.0, ns_dtype=torch.float64, splits=splits, **options)
    optimizer.step()
    return -param.detach(), optimizer.state[param]


def test_normuon_keeps_the_norm_and_evens_out_the_rows():
    plain, _ = _first_update((6, 9))
    found, state = _first_update((6, 9), normuon_beta2=0.95)
    torch.testing.assert_close(found.norm(), plain.norm(), atol=1e-9, rtol=0)
    # In the first step the running average is a twentieth of the mean square, so each row ends with the same norm.
    torch.testing.assert_close(found.norm(dim=1), found.norm(dim=1).mean().expand(6), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        state["second_momentum_buffer"], 0.05 * plain.square().mean(1, keepdim=True), atol=1e-12, rtol=0
    )
    # The direction of each row stays.
    torch.testing.assert_close(found / found.norm(dim=1, keepdim=True), plain / plain.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("split", "shape"),
    [
        (Split(0, (2, 4)), (6, 1)),
        (Split(1, (2, 3, 4)), (6, 3)),
        (Split(0, (2, 4), transposed=True), (2, 9)),
        (Split(1, (2, 3, 4), transposed=True), (1, 9)),
    ],
)
def test_normuon_normalizes_each_block_by_itself(split, shape):
    plain, _ = _first_update((6, 9), split)
    found, state = _first_update((6, 9), split, normuon_beta2=0.95)
    assert state["second_momentum_buffer"].shape == shape
    for block, plain_block in zip(
        found.split(split.sizes, split.dim), plain.split(split.sizes, split.dim), strict=True
    ):
        torch.testing.assert_close(block.norm(), plain_block.norm(), atol=1e-9, rtol=0)
        neurons = block.norm(dim=0 if split.transposed else 1)
        torch.testing.assert_close(neurons, neurons.mean().expand(len(neurons)), atol=1e-7, rtol=0)


@pytest.mark.parametrize("optimizer_class", [Muon, DistributedMuon])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normuon_goes_on_from_what_was_saved(optimizer_class, dtype):
    options = {"normuon_beta2": 0.9, "splits": SPLITS}
    params = {name: nn.Parameter(_tensor(name, -1, dtype)) for name in SHAPES}
    optimizer = optimizer_class(params.items(), **options)
    for step in range(4):
        if step == 2:
            copies = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
            resumed = optimizer_class(copies.items(), **options)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert all(
                state["second_momentum_buffer"].dtype == torch.float32 for state in resumed.named_state().values()
            )
        for name in SHAPES:
            params[name].grad = _tensor(name, step, dtype)
            if step >= 2:
                copies[name].grad = _tensor(name, step, dtype)
        optimizer.step()
        if step >= 2:
            resumed.step()
    _assert_close(
        {name: param.detach() for name, param in copies.items()},
        {name: param.detach() for name, param in params.items()},
        atol=0,
        rtol=0,
    )


def test_normuon_begins_from_a_state_of_plain_muon():
    param = nn.Parameter(torch.ones(3, 2))
    plain = torch.optim.Muon([param])
    param.grad = torch.eye(3, 2)
    plain.step()
    optimizer = Muon([param], normuon_beta2=0.95)
    optimizer.load_state_dict(plain.state_dict())
    assert torch.equal(optimizer.state[param]["second_momentum_buffer"], torch.zeros(3, 1))
    optimizer.step()


@pytest.mark.parametrize("optimizer_class", [Muon, DistributedMuon])
def test_a_zero_gradient_moves_nothing_and_a_nan_shows(optimizer_class):
    params = {name: nn.Parameter(_tensor(name, -1)) for name in SHAPES}
    before = {name: param.detach().clone() for name, param in params.items()}
    optimizer = optimizer_class(params.items(), weight_decay=0.0, normuon_beta2=0.95, splits=SPLITS)
    for name, param in params.items():
        param.grad = torch.zeros_like(param)
        if name == "square":
            param.grad[0, 0] = float("nan")
    optimizer.step()
    assert params["square"].isnan().all()
    for name in SHAPES:
        if name != "square":
            assert torch.equal(params[name], before[name]), name


# Weight decay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [Muon, DistributedMuon])
def test_cautious_decay_spares_what_the_update_moves_away_from_zero(optimizer_class):
    start = _tensor("wide", -1, torch.float64)
    moved = {}
    for weight_decay in (0.0, 0.5):
        param = nn.Parameter(start.clone())
        param.grad = _tensor("wide", 0, torch.float64)
        optimizer_class([("w", param)], lr=0.1, weight_decay=weight_decay, cautious_weight_decay=True).step()
        moved[weight_decay] = param.detach()
    update = start - moved[0.0]
    decay = moved[0.0] - moved[0.5]
    expected = torch.where(update * start >= 0, 0.1 * 0.5 * start, 0.0)
    torch.testing.assert_close(decay, expected, atol=1e-14, rtol=0)
    assert 0 < (expected == 0).sum() < expected.numel()


# Learning rates in tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [Muon, DistributedMuon])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("rate", [torch.tensor(0.03), torch.tensor([0.03])])
def test_a_rate_in_a_tensor_equals_a_float_up_to_rounding(rate, cautious, optimizer_class):
    expected, _ = _train(optimizer_class, lr=0.03, cautious_weight_decay=cautious)
    found, _ = _train(optimizer_class, lr=rate, cautious_weight_decay=cautious)
    # A rounding of float32 a product, for numbers of about 1.
    _assert_close(found, expected, atol=2e-6, rtol=0)


def test_a_rate_in_a_tensor_is_saved_as_a_float_and_loaded_into_the_tensor():
    param = nn.Parameter(torch.ones(2, 2))
    rate = torch.tensor(0.25)
    optimizer = Muon([param], lr=rate)
    saved = optimizer.state_dict()
    assert type(saved["param_groups"][0]["lr"]) is float and saved["param_groups"][0]["lr"] == 0.25
    assert optimizer.param_groups[0]["lr"] is rate
    saved["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.5


@pytest.mark.parametrize("optimizer_class", [Muon, DistributedMuon])
@pytest.mark.parametrize("options", [{}, {"normuon_beta2": 0.95, "cautious_weight_decay": True}])
def test_a_step_never_reads_from_the_device(optimizer_class, options):
    # Fake tensors have no values: .item(), .tolist() and indexing by a mask raise. (Those of CUDA need a CUDA build.)
    with FakeTensorMode(), torch.no_grad():
        params = [(name, nn.Parameter(torch.empty(shape))) for name, shape in SHAPES.items()]
        optimizer = optimizer_class(params, splits=SPLITS, **options)
        optimizer.param_groups[0]["lr"] = torch.empty(())
        for _, param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
        with pytest.raises(DataDependentOutputException):
            float(optimizer.param_groups[0]["lr"])


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normuon_beta2": 1.0}, r"normuon_beta2 is 1.0; use 0 to below 1 \(0.95 is NorMuon's\), or None for Muon"),
        ({"ns_coefficients": "polar"}, "ns_coefficients is 'polar'; use jordan or polar_express, or numbers"),
    ],
)
def test_senseless_options_are_refused(options, message):
    for optimizer_class in (Muon, DistributedMuon):
        with pytest.raises(ValueError, match=message):
            optimizer_class([("proj", nn.Parameter(torch.ones(2, 2)))], **options)


def test_an_option_that_does_not_exist_is_refused_by_name():
    with pytest.raises(TypeError, match="momentun"):
        DistributedMuon([("proj", nn.Parameter(torch.ones(2, 2)))], momentun=0.9)
