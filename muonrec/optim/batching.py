"""Decides which matrices go through the Newton-Schulz iteration together, by a measured cost model, and sends them.

Matrices of a recommender are small, and launching them one by one costs more than multiplying them. But a batch that
falls out of the processor's cache costs more than its matrices one by one, so batches are cut to fit.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from muonrec.optim.newton_schulz import Coefficients, iterate_, orthogonalize
from muonrec.optim.ownership import newton_schulz_cost
from muonrec.optim.update import Split

# R = rows, C = columns of a matrix laid on its wide side, R <= C

Shape = tuple[int, int]


@dataclass(frozen=True)
class CostModel:
    """What the iteration costs on one kind of device.

    Attributes:
        launch_s: seconds that a kernel costs whatever its size.
        flops_per_s: of products of small matrices.
        batch_bytes: the most that the four buffers of a batch may fill; more falls out of the cache, or of memory.
    """

    launch_s: float
    flops_per_s: float
    batch_bytes: int

    def num_batches(self, count: int, shape: Shape, itemsize: int) -> int:
        """How many batches ``count`` matrices of one shape are cut into."""
        rows, columns = shape
        per_batch = max(1, self.batch_bytes // (2 * rows * (rows + columns) * itemsize))
        return math.ceil(count / per_batch)

    def seconds(self, count: int, shape: Shape, itemsize: int, steps: int) -> float:
        """What ``count`` matrices of one shape cost, launches and arithmetic."""
        launches = self.num_batches(count, shape, itemsize) * (3 * steps + 4)
        return launches * self.launch_s + count * newton_schulz_cost(shape, steps) / self.flops_per_s


# "cpu": python -m benchmarks.optimizer --kernels, on a core of an AMD EPYC (Zen 5, AVX512-BF16, 1 MiB of L2).
# "cuda": not measured; a launch is some 5 us, and batches stop paying at 2048 x 2048 (pytorch/pytorch#182631).
COST_MODELS = {
    ("cpu", torch.bfloat16): CostModel(launch_s=12e-6, flops_per_s=4e11, batch_bytes=4 << 20),
    ("cpu", torch.float32): CostModel(launch_s=3e-6, flops_per_s=1e11, batch_bytes=4 << 20),
    ("cuda", torch.bfloat16): CostModel(launch_s=5e-6, flops_per_s=1e14, batch_bytes=256 << 20),
}


def cost_model(device_type: str, dtype: torch.dtype) -> CostModel:
    """The measured model that is nearest to a device and a dtype."""
    if device_type != "cpu":
        return COST_MODELS["cuda", torch.bfloat16]
    return COST_MODELS["cpu", torch.bfloat16 if dtype == torch.bfloat16 else torch.float32]


@dataclass(frozen=True)
class Batch:
    """Matrices that go through the iteration together.

    Attributes:
        members: their places in the list that was planned.
        shape: ``(R, C)`` of each in the batch; smaller ones are padded with zeros, which is exact.
    """

    members: tuple[int, ...]
    shape: Shape


@lru_cache(maxsize=256)
def plan_batches(shapes: tuple[Shape, ...], model: CostModel, itemsize: int, steps: int) -> tuple[Batch, ...]:
    """Put matrices into batches: equal shapes, near shapes where padding costs less than a launch, cut to the cache.

    Args:
        shapes: ``(R, C)`` of each matrix, ``R <= C``.
        model: of the device that they are on.
        itemsize: bytes of a number in the iteration.
        steps: number of iterations.
    """
    counts = Counter(shapes)
    grown: list[tuple[Shape, list[Shape]]] = []  # the shape of a group, and of those in it
    for shape in sorted(counts, key=lambda shape: (-newton_schulz_cost(shape, steps), shape)):
        alone = model.seconds(counts[shape], shape, itemsize, steps)
        best, best_saving = None, 0.0
        for i, (group, inside) in enumerate(grown):
            padded = (max(group[0], shape[0]), max(group[1], shape[1]))
            count = sum(counts[member] for member in inside)
            apart = model.seconds(count, group, itemsize, steps) + alone
            saving = apart - model.seconds(count + counts[shape], padded, itemsize, steps)
            if saving > best_saving:
                best, best_saving = (i, padded), saving
        if best is None:
            grown.append((shape, [shape]))
        else:
            i, padded = best
            grown[i] = (padded, [*grown[i][1], shape])

    batches = []
    for group, inside in grown:
        members = [i for i, shape in enumerate(shapes) if shape in inside]
        num_batches = model.num_batches(len(members), group, itemsize)
        stops = [len(members) * (i + 1) // num_batches for i in range(num_batches)]
        batches += [Batch(tuple(members[a:b]), group) for a, b in zip([0, *stops], stops)]
    return tuple(batches)


def orthogonalize_batched(
    updates: Mapping[str, Tensor],
    splits: Mapping[str, Split],
    settings: Mapping[str, Mapping[str, Any]],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """``orthogonalize_blocks`` of many matrices, in batches.

    Equal to it up to rounding in the dtype of the iteration, which Jordan's coefficients amplify by at most 485; equal
    to the bit wherever the multiplication of a batch sums in the order of a single one's (seen on CPU in bfloat16).

    Args:
        updates: ``(R, C)`` by name, on one device. Not modified.
        splits: by name.
        settings: by name, the keyword arguments of ``orthogonalize``.
        dtypes: by name, what to return; by default the dtype of the update.

    Returns:
        ``(R, C)`` by name. A matrix with a NaN is all NaN, and none beside it in its batch.
    """
    kinds: dict[Any, list[tuple[str, int]]] = {}
    blocks = {}
    for name, update_RC in updates.items():
        split = splits[name]
        kind = (update_RC.dtype if dtypes is None else dtypes[name], *settings[name].values())
        for i, block in enumerate(update_RC.split(split.sizes, split.dim) if len(split.sizes) > 1 else [update_RC]):
            # Tall ones are laid on their side, as the iteration would do by itself, to share a batch with the wide.
            blocks[name, i] = block.mT if block.shape[0] > block.shape[1] else block
            kinds.setdefault(kind, []).append((name, i))

    for (dtype, *_), keys in kinds.items():
        done = _orthogonalize_wide([blocks[key] for key in keys], dtype, **settings[keys[0][0]])
        blocks.update(zip(keys, done, strict=True))

    results = {}
    for name, update_RC in updates.items():
        split = splits[name]
        shapes = split.shapes((update_RC.shape[0], update_RC.shape[1]))
        upright = [
            blocks[name, i].mT if rows > columns else blocks[name, i] for i, (rows, columns) in enumerate(shapes)
        ]
        results[name] = upright[0] if len(upright) == 1 else torch.cat(upright, split.dim)
    return results


def _orthogonalize_wide(
    blocks: Sequence[Tensor],
    result_dtype: torch.dtype,
    coefficients: Sequence[Coefficients],
    eps: float,
    dtype: torch.dtype,
    gram: bool = False,
) -> list[Tensor]:
    """Orthogonalize matrices of one device, none of them tall."""
    first = blocks[0]
    shapes = tuple((block.shape[0], block.shape[1]) for block in blocks)
    model = cost_model(first.device.type, dtype)
    results: list[Tensor] = list(blocks)
    for batch in plan_batches(shapes, model, dtype.itemsize, len(coefficients)):
        members = batch.members
        if len(members) == 1:
            # As a matrix, not as a batch of one: torch's Muon multiplies so, and equal bits are easier to debug.
            results[members[0]] = orthogonalize(blocks[members[0]], coefficients, eps, dtype, gram).to(result_dtype)
            continue
        is_padded = any(shapes[i] != batch.shape for i in members)
        make = torch.zeros if is_padded else torch.empty
        x_BRC = make(len(members), *batch.shape, dtype=dtype, device=first.device)
        torch._foreach_copy_(_places(x_BRC, batch, shapes), [blocks[i] for i in members])
        done_BRC = iterate_(x_BRC, coefficients, eps, gram=gram).to(result_dtype)
        for i, x_RC in zip(members, _places(done_BRC, batch, shapes), strict=True):
            results[i] = x_RC
    return results


def _places(x_BRC: Tensor, batch: Batch, shapes: Sequence[Shape]) -> list[Tensor]:
    """Where in a batch its members are."""
    return [
        x_RC if shapes[i] == batch.shape else x_RC[: shapes[i][0], : shapes[i][1]]
        for i, x_RC in zip(batch.members, x_BRC.unbind(), strict=True)
    ]
