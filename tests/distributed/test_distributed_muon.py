"""DistributedMuon against its plain twin, over gloo ranks."""

import inspect

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from muonrec.optim import DistributedMuon, Muon
from tests.distributed.matrices import (
    CLOSE,
    SHAPES,
    SPLITS,
    assert_all_close,
    laid_out,
    local_of,
    tensor_of,
    train_plainly,
)
from tests.distributed.ranks import run_on_ranks

LAYOUTS = {
    "replicated": dict.fromkeys(SHAPES, None),
    "shard0": dict.fromkeys(SHAPES, 0),
    "shard1": dict.fromkeys(SHAPES, 1),
    "mixed": {name: (None, 0, 1)[i % 3] for i, name in enumerate(SHAPES)},
}


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _parameters(layout):
    return {name: nn.Parameter(laid_out(tensor_of(name, -1), shard_dim)) for name, shard_dim in layout.items()}


def _set_gradients(params, layout, step, missing=()):
    rank = dist.get_rank() if dist.is_initialized() else 0
    for name, param in params.items():
        param.grad = None if (name, rank) in missing else laid_out(tensor_of(name, step), layout[name])


def _train(layout, settings, missing=(), num_steps=5):
    """Parameters, and momentum by name where a rank has it, after some steps."""
    params = _parameters(layout)
    optimizer = DistributedMuon(params.items(), splits=SPLITS, **settings)
    for step in range(num_steps):
        _set_gradients(params, layout, step, missing)
        optimizer.step()
    buffers = {name: state["momentum_buffer"] for name, state in optimizer.named_state().items()}
    return (
        {name: _whole(param.detach()) for name, param in params.items()},
        {name: _whole(buffer) for name, buffer in buffers.items()},
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_distributed_muon_equals_muon_after_five_steps(layout, num_ranks):
    settings = {"ns_dtype": torch.float32}
    expected_params, expected_buffers = train_plainly(settings)
    results = run_on_ranks(num_ranks, _train, LAYOUTS[layout], settings)
    for params, buffers in results:
        assert set(params) == set(SHAPES)
        assert_all_close(params, expected_params, **CLOSE)
        assert_all_close(buffers, expected_buffers, **CLOSE)
        assert_all_close(params, results[0][0], atol=0, rtol=0)
    assert set().union(*(buffers for _, buffers in results)) == set(SHAPES)


@pytest.mark.parametrize(
    "settings",
    [
        {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
        {"adjust_lr_fn": "spectral_unclamped", "momentum": 0.5, "ns_steps": 3},
    ],
)
def test_settings_reach_every_layout(settings):
    settings = {**settings, "ns_dtype": torch.float32, "lr": 0.01}
    expected_params, expected_buffers = train_plainly(settings)
    for params, buffers in run_on_ranks(2, _train, LAYOUTS["mixed"], settings):
        # Ten times the learning rate of the other tests, and match_rms_adamw on top.
        assert_all_close(params, expected_params, atol=1e-5, rtol=1e-5)
        assert_all_close(buffers, expected_buffers, **CLOSE)


def test_in_bfloat16_replicas_stay_equal_to_the_bit_and_near_muon():
    expected, _ = train_plainly({})
    results = run_on_ranks(3, _train, LAYOUTS["mixed"], {})
    for params, _ in results:
        assert_all_close(params, results[0][0], atol=0, rtol=0)
        # Batched and single products round differently: 2^-8 of an entry of about 1, over 5 steps of 1e-3.
        assert_all_close(params, expected, atol=1e-4, rtol=0)


def _train_twice(layout):
    return _train(layout, {}), _train(layout, {})


def test_two_runs_are_equal_to_the_bit():
    for (params, buffers), (params_again, buffers_again) in run_on_ranks(2, _train_twice, LAYOUTS["mixed"]):
        assert_all_close(params, params_again, atol=0, rtol=0)
        assert_all_close(buffers, buffers_again, atol=0, rtol=0)


# Missing gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_missing_on_every_rank_skips_the_parameter(layout):
    settings = {"ns_dtype": torch.float32}
    missing = [(name, rank) for name in ("wide", "qkv", "row") for rank in range(2)]
    expected, _ = train_plainly(
        settings, lambda name, step: None if name in ("wide", "qkv", "row") else tensor_of(name, step)
    )
    for params, _ in run_on_ranks(2, _train, LAYOUTS[layout], settings, missing):
        assert_all_close(params, expected, **CLOSE)
        torch.testing.assert_close(params["wide"], tensor_of("wide", -1), atol=0, rtol=0)


@pytest.mark.parametrize("absent_rank", [0, 1, 2])
def test_a_replicated_gradient_missing_on_some_ranks_is_taken_from_another(absent_rank):
    # Every matrix loses its gradient on one rank, so in one of the three cases this is its owner.
    settings = {"ns_dtype": torch.float32}
    missing = [(name, absent_rank) for name in SHAPES]
    expected_params, expected_buffers = train_plainly(settings)
    for params, buffers in run_on_ranks(3, _train, LAYOUTS["replicated"], settings, missing):
        assert_all_close(params, expected_params, **CLOSE)
        assert_all_close(buffers, expected_buffers, **CLOSE)


def test_a_replicated_gradient_on_one_rank_alone_is_enough():
    settings = {"ns_dtype": torch.float32}
    missing = [(name, rank) for i, name in enumerate(SHAPES) for rank in range(3) if rank != i % 3]
    expected, _ = train_plainly(settings)
    for params, _ in run_on_ranks(3, _train, LAYOUTS["replicated"], settings, missing):
        assert_all_close(params, expected, **CLOSE)


@pytest.mark.parametrize(("layout", "dim"), [("shard0", 0), ("shard1", 1)])
def test_a_sharded_gradient_missing_on_one_rank_is_zero_there(layout, dim):
    def gradient_without_the_shard_of_rank_1(name, step):
        gradient = tensor_of(name, step)
        shards = gradient.chunk(2, dim)
        if len(shards) == 2:
            shards[1].zero_()
        return gradient

    settings = {"ns_dtype": torch.float32}
    missing = [(name, 1) for name in SHAPES]
    expected_params, expected_buffers = train_plainly(settings, gradient_without_the_shard_of_rank_1)
    for params, buffers in run_on_ranks(2, _train, LAYOUTS[layout], settings, missing):
        assert_all_close(params, expected_params, **CLOSE)
        assert_all_close(buffers, expected_buffers, **CLOSE)


def _train_with_a_bad_value(layout):
    params = _parameters(layout)
    optimizer = DistributedMuon(params.items(), splits=SPLITS, weight_decay=0.0)
    for name, param in params.items():
        gradient = torch.zeros(SHAPES[name])
        if name == "wide":
            gradient[0, 0] = float("nan")
        param.grad = laid_out(gradient, layout[name])
    optimizer.step()
    return {name: _whole(param.detach()) for name, param in params.items()}


@pytest.mark.parametrize("layout", ["replicated", "mixed"])
def test_a_nan_shows_in_its_own_matrix_and_a_zero_gradient_moves_nothing(layout):
    for params in run_on_ranks(2, _train_with_a_bad_value, LAYOUTS[layout]):
        assert params.pop("wide").isnan().all()
        assert_all_close(params, {name: tensor_of(name, -1) for name in SHAPES}, atol=0, rtol=0)


def _largest_change_of_gradients(layout, settings):
    params = _parameters(layout)
    optimizer = DistributedMuon(params.items(), splits=SPLITS, **settings)
    _set_gradients(params, layout, 0)
    before = {name: (param.grad, local_of(param.grad).clone()) for name, param in params.items()}
    optimizer.step()
    assert all(param.grad is before[name][0] for name, param in params.items())
    return sum((local_of(param.grad) - before[name][1]).abs().sum().item() for name, param in params.items())


@pytest.mark.parametrize("nesterov", [True, False])
def test_gradients_are_not_written_to(nesterov):
    settings = {"nesterov": nesterov, "ns_dtype": torch.float32}
    assert run_on_ranks(2, _largest_change_of_gradients, LAYOUTS["mixed"], settings) == [0.0, 0.0]


# Communication and memory ---------------------------------------------------------------------------------------------


def _collectives_of_one_step(layout, num_copies):
    params = {
        f"{name}{copy}": nn.Parameter(laid_out(tensor_of(name, -1), shard_dim))
        for name, shard_dim in layout.items()
        for copy in range(num_copies)
    }
    optimizer = DistributedMuon(params.items())
    for param in params.values():
        param.grad = torch.ones_like(param)
    calls = []
    originals = {name: getattr(dist, name) for name in dir(dist) if name.startswith(("all_", "reduce", "broadcast"))}

    def counted(name):
        return lambda *args, **kwargs: calls.append(name) or originals[name](*args, **kwargs)

    try:
        for name in originals:
            setattr(dist, name, counted(name))
        optimizer.step()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    # DTensor would talk below these names.
    with CommDebugMode() as debug_mode:
        optimizer.step()
    return calls, debug_mode.get_total_counts()


@pytest.mark.parametrize("num_copies", [1, 3])
@pytest.mark.parametrize(("layout", "num_exchanges"), [("replicated", 2), ("shard0", 4), ("mixed", 6)])
def test_the_number_of_collectives_does_not_grow_with_the_number_of_matrices(layout, num_exchanges, num_copies):
    for calls, num_seen_by_torch in run_on_ranks(2, _collectives_of_one_step, LAYOUTS[layout], num_copies):
        assert calls == ["all_reduce"] + ["all_to_all_single"] * num_exchanges
        assert num_seen_by_torch == 1 + num_exchanges


def _names_with_momentum(layout):
    optimizer = DistributedMuon(_parameters(layout).items())
    assert len(optimizer.state) == len(layout)
    return sorted(optimizer.named_state())


def test_replicated_momentum_lives_on_exactly_one_rank():
    held = run_on_ranks(3, _names_with_momentum, LAYOUTS["replicated"])
    assert sorted(name for names in held for name in names) == sorted(SHAPES)
    assert all(held)


def _bytes_sent(ns_dtype):
    params = _parameters({"square": 0, "wide": None})
    optimizer = DistributedMuon(params.items(), ns_dtype=ns_dtype)
    sizes = []
    original = dist.all_to_all_single

    def measured(output, input, *args, **kwargs):
        sizes.append(input.numel() * input.element_size())
        return original(output, input, *args, **kwargs)

    _set_gradients(params, {"square": 0, "wide": None}, 0)
    dist.all_to_all_single = measured
    try:
        optimizer.step()
    finally:
        dist.all_to_all_single = original
    return sum(sizes)


def test_what_travels_is_half_as_large_in_bfloat16():
    single, half = sum(run_on_ranks(2, _bytes_sent, torch.float32)), sum(run_on_ranks(2, _bytes_sent, torch.bfloat16))
    # Half of 8 x 8 to its owner and back, and 6 x 16 to the other of two ranks.
    assert (single, half) == (4 * (32 + 32 + 96), 2 * (32 + 32 + 96))


# Real wrappers --------------------------------------------------------------------------------------------------------


def _model():
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 7, bias=False), nn.ReLU(), nn.Linear(7, 5, bias=False))
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(generator=generator)
    return model


def _train_model(wrapper, num_steps=5):
    model = _model()
    if wrapper == "fsdp2":
        fully_shard(model[0])
        fully_shard(model)
    wrapped = DistributedDataParallel(model) if wrapper == "ddp" else model
    optimizer = (Muon if wrapper is None else DistributedMuon)(
        model.named_parameters(), lr=0.01, ns_dtype=torch.float32
    )
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if wrapper else (0, 1)
    for step in range(num_steps):
        x_BD = torch.randn(6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        wrapped(x_BD[rank::num_ranks]).square().mean().backward()
        optimizer.step()
    return {name: _whole(param.detach()) for name, param in model.named_parameters()}


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_wrapped_model_trains_as_on_one_device(wrapper, num_ranks):
    expected = _train_model(None)
    for params in run_on_ranks(num_ranks, _train_model, wrapper):
        # Here gradients follow from the parameters, which feeds differences back.
        assert_all_close(params, expected, atol=1e-5, rtol=1e-5)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def _train_and_save(layout, folder, num_steps):
    params = _parameters(layout)
    optimizer = DistributedMuon(params.items(), splits=SPLITS, ns_dtype=torch.float32)
    for step in range(num_steps):
        _set_gradients(params, layout, step)
        optimizer.step()
    dcp.save({"model": params, "optimizer": optimizer.named_state()}, checkpoint_id=folder)


def _load_and_train(layout, folder, first_step, num_steps):
    params = {name: nn.Parameter(torch.zeros_like(param)) for name, param in _parameters(layout).items()}
    optimizer = DistributedMuon(params.items(), splits=SPLITS, ns_dtype=torch.float32)
    dcp.load({"model": params, "optimizer": optimizer.named_state()}, checkpoint_id=folder)
    for step in range(first_step, num_steps):
        _set_gradients(params, layout, step)
        optimizer.step()
    return {name: _whole(param.detach()) for name, param in params.items()}


@pytest.mark.parametrize("layout", ["replicated", "shard0", "mixed"])
def test_saved_on_two_ranks_goes_on_with_three_and_with_one(layout, tmp_path):
    expected, _ = train_plainly({"ns_dtype": torch.float32})
    run_on_ranks(2, _train_and_save, LAYOUTS[layout], str(tmp_path), 3)
    for num_ranks in (3, 1):
        for params in run_on_ranks(num_ranks, _load_and_train, LAYOUTS[layout], str(tmp_path), 3, 5):
            assert_all_close(params, expected, **CLOSE)


def _round_trip_of_state_dict(layout):
    params = _parameters(layout)
    optimizer = DistributedMuon(params.items(), splits=SPLITS)
    _set_gradients(params, layout, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    other = DistributedMuon(params.items(), lr=0.5, splits=SPLITS)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 1e-3
    assert other.named_state().keys() == optimizer.named_state().keys()
    for name, state in other.named_state().items():
        expected = optimizer.named_state()[name]["momentum_buffer"]
        torch.testing.assert_close(local_of(state["momentum_buffer"]), local_of(expected), atol=0, rtol=0)

    # What another rank saved, where this one owns what that one did not.
    held = next(index for index, state in saved["state"].items() if state)
    saved["state"][held] = {}
    with pytest.raises(ValueError, match=r"holds no momentum of '\w+', which rank \d of 2 owns"):
        other.load_state_dict(saved)
    return True


@pytest.mark.parametrize("layout", ["replicated", "mixed"])
def test_state_dict_of_torch_makes_the_round_trip(layout):
    assert run_on_ranks(2, _round_trip_of_state_dict, LAYOUTS[layout]) == [True, True]


def _save_through_torch_state_dict(folder):
    model = _model()
    optimizer = DistributedMuon(model.named_parameters(), ns_dtype=torch.float32)
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder)
    return {name: state["momentum_buffer"] for name, state in optimizer.named_state().items()}


def _load_through_torch_state_dict(folder):
    model = _model()
    optimizer = DistributedMuon(model.named_parameters(), ns_dtype=torch.float32)
    state = get_optimizer_state_dict(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state)
    return {name: state["momentum_buffer"] for name, state in optimizer.named_state().items()}


def test_state_travels_through_torch_state_dict_to_another_number_of_ranks(tmp_path):
    # Three ranks and two matrices: one rank owns nothing, which must not make torch step it alone.
    saved = run_on_ranks(3, _save_through_torch_state_dict, str(tmp_path))
    loaded = run_on_ranks(2, _load_through_torch_state_dict, str(tmp_path))
    saved, loaded = ({name: b for buffers in ranks for name, b in buffers.items()} for ranks in (saved, loaded))
    assert set(saved) == set(loaded) == {"0.weight", "2.weight"}
    assert_all_close(loaded, saved, atol=0, rtol=0)


# Errors ---------------------------------------------------------------------------------------------------------------


def _message(params, **settings):
    with pytest.raises(ValueError) as error:
        DistributedMuon(params, **settings)
    return str(error.value)


def _messages_for_different_plans():
    rank = dist.get_rank()
    square = nn.Parameter(torch.zeros(4, 4))
    return [
        _message([("proj", nn.Parameter(torch.zeros(4, 4 + rank)))]),
        _message([("proj", square), *([("extra", nn.Parameter(torch.zeros(4, 4)))] * rank)]),
        _message([{"params": [("proj", square)], "lr": 0.25 + rank}]),
    ]


def test_ranks_with_different_parameters_or_settings_are_told_which():
    for shapes, names, settings in run_on_ranks(2, _messages_for_different_plans):
        assert "ranks 0 and 1 were given different parameters: they differ in proj" in shapes
        assert "[4, 4]" in shapes and "[4, 5]" in shapes
        assert "they differ in extra (absent and ['extra', [4, 4]" in names
        assert "'lr': '0.25'" in settings and "'lr': '1.25'" in settings


def _message_for_a_rate_on_rank_1():
    return _message([("proj", nn.Parameter(torch.ones(2, 2)))], lr=-1.0 if dist.get_rank() == 1 else 0.1)


def test_what_one_rank_refuses_is_said_on_every_rank():
    assert run_on_ranks(2, _message_for_a_rate_on_rank_1) == ["lr is -1.0; use 0 or more"] * 2


def test_the_signature_names_the_settings_of_muon():
    own, plain = (list(inspect.signature(optimizer).parameters) for optimizer in (DistributedMuon, Muon))
    assert own == [*plain, "process_group", "assume_all_gradients"]


def test_parameters_without_names_are_refused():
    message = _message([nn.Parameter(torch.zeros(4, 4))])
    assert "without names" in message and "pass model.named_parameters()" in message


def test_a_name_that_comes_twice_is_refused():
    assert "two parameters are called 'proj'" in _message([("proj", nn.Parameter(torch.ones(2, 2))) for _ in range(2)])


def test_a_bias_is_refused():
    assert "'bias' of shape (4,), which is not a matrix" in _message([("bias", nn.Parameter(torch.zeros(4)))])


def test_a_group_after_construction_is_refused():
    optimizer = DistributedMuon([("proj", nn.Parameter(torch.zeros(4, 4)))])
    with pytest.raises(ValueError, match="given a group after its owners were planned; construct it with all groups"):
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.zeros(4, 4)))]})


def test_without_torch_distributed_it_is_muon():
    expected, _ = train_plainly({"ns_dtype": torch.float32})
    params, buffers = _train(dict.fromkeys(SHAPES, None), {"ns_dtype": torch.float32})
    assert_all_close(params, expected, **CLOSE)
    assert set(buffers) == set(SHAPES)


def _messages_for_gradients():
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = DistributedMuon([("proj", param)])
    messages = []
    for gradient in (
        distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]),
        DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]),
    ):
        # Misplaced on rank 1 alone; the other must not be left waiting for it.
        param.grad = gradient if dist.get_rank() == 1 else None
        with pytest.raises(ValueError) as error:
            optimizer.step()
        messages.append(str(error.value))
    assert torch.equal(param.detach().to_local(), torch.ones(2, 4))
    return messages


def test_a_gradient_placed_otherwise_than_its_parameter_is_refused_on_every_rank():
    others, own = run_on_ranks(2, _messages_for_gradients)
    assert others == ["another rank refuses a gradient; its own error says which and why"] * 2
    for message, found in zip(own, ("Shard(dim=1)", "Partial(sum)"), strict=True):
        assert f"the gradient of 'proj' is placed as ({found},) but the parameter as (Shard(dim=0),)" in message


def _messages_for_placements():
    flat = init_device_mesh("cpu", (2,))
    placed = [
        DTensor.from_local(torch.ones(4, 4), flat, [Partial()]),
        distribute_tensor(torch.ones(4, 4, 4), flat, [Shard(2)]),
        # Sizes are those of the placement on rank 0 alone.
        DTensor.from_local(torch.ones(2 + dist.get_rank(), 4), flat, [Shard(0)], shape=(4, 4), stride=(4, 1)),
    ]
    return [_message([("proj", nn.Parameter(tensor, requires_grad=False))]) for tensor in placed]


def test_a_placement_that_is_not_supported_is_named():
    for partial, far, odd in run_on_ranks(2, _messages_for_placements):
        assert "'proj' is placed as (Partial(sum),) on a mesh of shape (2,); Partial(sum) is not supported" in partial
        assert "Shard(dim=2) is not supported, use Replicate(), Shard(0), Shard(1)" in far
        # Said on both ranks, since one that raised alone would leave the other waiting.
        assert "rank 1 holds 2 x 4 of it, but its local tensor is (3, 4)" in odd


def _message_for_another_group():
    groups = [dist.new_group([rank]) for rank in range(2)]
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    with pytest.raises(ValueError) as error:
        DistributedMuon([("proj", param)], process_group=groups[dist.get_rank()])
    return str(error.value)


def test_a_mesh_over_other_ranks_than_the_group_is_named():
    for rank, message in enumerate(run_on_ranks(2, _message_for_another_group)):
        assert f"on a mesh of shape (2,) over ranks [0, 1], but process_group is of ranks [{rank}]" in message
