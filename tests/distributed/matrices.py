"""Parameters and gradients that every rank and the test itself make alike, and what plain Muon does to them."""

import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muonrec.optim import Muon, Split

# The iteration amplifies what rounding leaves in small singular values by at most 3.4445^5 = 485; times the learning
# rate of 1e-3 and the rounding of float32 at 6e-8 this is 3e-8 a step.
CLOSE = {"atol": 1e-6, "rtol": 1e-6}

SHAPES = {
    "square": (8, 8),
    "square_too": (8, 8),
    "wide": (6, 16),
    "tall": (16, 6),
    "uneven": (7, 5),
    "fewer_rows_than_ranks": (2, 9),
    "fewer_columns_than_ranks": (9, 2),
    "row": (1, 8),
    "column": (8, 1),
    "kernel_1d": (6, 4, 3),
    "kernel_2d": (4, 3, 3, 2),
    "qkv": (15, 6),
    "uvqk": (6, 14),
    "kernel_in_blocks": (3, 6, 2),
}
SPLITS = {
    "qkv": Split(0, (5, 5, 5)),
    "uvqk": Split(1, (2, 3, 4, 5), transposed=True),
    "kernel_in_blocks": Split(1, (4, 8)),
}


def split_of(names):
    """The splits of parameters called ``shape`` or ``layout/shape``."""
    return {name: SPLITS[name.split("/")[-1]] for name in names if name.split("/")[-1] in SPLITS}


def tensor_of(name, step, dtype=torch.float32):
    """The parameter (step -1) or gradient of this name, the same on every rank and in this process."""
    shape = name.split("/")[-1]
    generator = torch.Generator().manual_seed(1000 * list(SHAPES).index(shape) + step + 1)
    return torch.randn(SHAPES[shape], generator=generator).to(dtype)


@functools.cache
def mesh_of(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"axis{i}" for i in range(len(shape))))


def laid_out(tensor, layout):
    """A copy of the whole tensor, or this rank's part of it.

    Args:
        tensor: the same on every rank.
        layout: None for a plain tensor, the dimension that all ranks shard, or the shape of a mesh and placements.
    """
    if layout is None:
        return tensor.clone()
    if isinstance(layout, int):
        layout = ((dist.get_world_size(),), (Shard(layout),))
    mesh_shape, placements = layout
    return distribute_tensor(tensor, mesh_of(*mesh_shape), placements, src_data_rank=None)


def local_of(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def train_plainly(settings, gradients=tensor_of, num_steps=5, names=SHAPES):
    """Parameters and momentum, by name, that plain Muon makes of them."""
    params = {name: nn.Parameter(tensor_of(name, -1)) for name in names}
    optimizer = Muon(params.items(), splits=split_of(names), **settings)
    for step in range(num_steps):
        for name, param in params.items():
            param.grad = gradients(name, step)
        optimizer.step()
    return (
        {name: param.detach() for name, param in params.items()},
        {name: optimizer.state[param]["momentum_buffer"] for name, param in params.items()},
    )


def assert_all_close(found, expected, **tolerance):
    assert set(found) <= set(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **tolerance, msg=lambda text: f"{name}: {text}")  # noqa: B023
