"""What Muon knows beyond torch's, over gloo ranks: equal to the plain twin in every layout, and resharded by name."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muonrec.optim import DistributedMuon, Muon, Split
from tests.distributed.ranks import run_on_ranks

SHAPES = {
    "square": (8, 8),
    "wide": (6, 16),
    "tall": (16, 6),
    "few_rows": (1, 9),
    "kernel": (6, 4, 3),
    "qkv": (15, 6),
    "uvqk": (6, 14),
}
SPLITS = {"qkv": Split(0, (4, 6, 5)), "uvqk": Split(1, (2, 3, 4, 5), transposed=True)}
LAYOUTS = {
    "replicated": dict.fromkeys(SHAPES, None),
    "mixed": {name: (None, 0, 1)[i % 3] for i, name in enumerate(SHAPES)},
}
OPTIONS = {"lr": 0.1, "normuon_beta2": 0.9, "cautious_weight_decay": True, "ns_gram": True, "ns_dtype": torch.float32}
# As in tests/optim/test_muon_options.py.
CLOSE = {"atol": 1e-4, "rtol": 0}


def _tensor(name, step):
    generator = torch.Generator().manual_seed(1000 * list(SHAPES).index(name) + step + 1)
    return torch.randn(SHAPES[name], generator=generator)


def _laid_out(tensor, shard_dim):
    if shard_dim is None or not dist.is_initialized():
        return tensor.clone()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(tensor, mesh, [Shard(shard_dim)], src_data_rank=None)


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def _build(optimizer_class, layout, **options):
    params = {name: nn.Parameter(_laid_out(_tensor(name, -1), layout[name])) for name in SHAPES}
    return params, optimizer_class(params.items(), splits=SPLITS, **OPTIONS | options)


def _steps(params, optimizer, layout, steps):
    for step in steps:
        for name, param in params.items():
            param.grad = _laid_out(_tensor(name, step), layout[name])
        optimizer.step()


def _train(layout, rate=0.1):
    params, optimizer = _build(DistributedMuon, layout, lr=rate)
    _steps(params, optimizer, layout, range(5))
    state = {
        name: {key: _whole(value) for key, value in kept.items()} for name, kept in optimizer.named_state().items()
    }
    return {name: _whole(param.detach()) for name, param in params.items()}, state


def _train_plainly():
    params, optimizer = _build(Muon, LAYOUTS["replicated"])
    _steps(params, optimizer, LAYOUTS["replicated"], range(5))
    return {name: param.detach() for name, param in params.items()}, optimizer.named_state()


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_options_on_ranks_equal_the_plain_twin(layout, rate):
    expected, expected_state = _train_plainly()
    results = run_on_ranks(2, _train, LAYOUTS[layout], rate)
    for params, state in results:
        for name in SHAPES:
            torch.testing.assert_close(params[name], expected[name], **CLOSE)
            for key, value in state.get(name, {}).items():
                torch.testing.assert_close(value, expected_state[name][key], **CLOSE)
    # The running averages of neurons are with the owner alone.
    holders = [name for _, state in results for name, kept in state.items() if "second_momentum_buffer" in kept]
    assert sorted(holders) == sorted(SHAPES)


def _train_and_save(layout, folder):
    params, optimizer = _build(DistributedMuon, layout)
    _steps(params, optimizer, layout, range(3))
    dcp.save({"model": params, "optimizer": optimizer.named_state()}, checkpoint_id=folder)


def _load_and_train(layout, folder):
    params, optimizer = _build(DistributedMuon, layout)
    with torch.no_grad():
        for param in params.values():
            param.zero_()
    dcp.load({"model": params, "optimizer": optimizer.named_state()}, checkpoint_id=folder)
    _steps(params, optimizer, layout, range(3, 5))
    return {name: _whole(param.detach()) for name, param in params.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_normuon_saved_on_two_ranks_goes_on_with_three_and_with_one(layout, tmp_path):
    expected, _ = _train_plainly()
    run_on_ranks(2, _train_and_save, LAYOUTS[layout], str(tmp_path))
    for num_ranks in (3, 1):
        for params in run_on_ranks(num_ranks, _load_and_train, LAYOUTS[layout], str(tmp_path)):
            for name in SHAPES:
                torch.testing.assert_close(params[name], expected[name], **CLOSE)
