"""What Muon does to one matrix around the orthogonalization: momentum, blocks, learning rate, weight decay.

Functions whose name ends in an underscore write to their first argument, the others write to none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from muonrec.optim.newton_schulz import Coefficients, orthogonalize

# R = rows, C = columns of a parameter taken as a matrix

NORMUON_EPS = 1e-10  # of the authors' code; a neuron that never moved stays where it is
ADJUST_LR_FNS = ("original", "match_rms_adamw", "spectral_unclamped")


@dataclass(frozen=True)
class Split:
    """A matrix that stands for several: q, k and v in one projection, the gates of a GRU, HSTU's u, v, q and k.

    Each block is orthogonalized by itself and its learning rate scaled by its own shape.

    Attributes:
        dim: 0 for blocks of rows, 1 for blocks of columns (of the flattened kernel, for a convolution).
        sizes: how long the blocks are along ``dim``, in order; they need not be even and must add up to the whole.
        transposed: the matrix is stored ``(in, out)`` and applied as ``x @ weight``, as HSTU's uvqk, so that the
            learning rate is scaled by the transposed shape. ``torch.nn.Linear`` stores ``(out, in)``.
    """

    dim: int
    sizes: tuple[int, ...]
    transposed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if self.dim not in (0, 1):
            raise ValueError(f"Split along dim {self.dim}; use 0 for blocks of rows or 1 for blocks of columns")
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"Split into sizes {self.sizes}; give at least one size, each of 1 or more")

    @classmethod
    def heads(cls, num_heads: int, shape: Sequence[int], *, dim: int = 0, transposed: bool = False) -> "Split":
        """A block per attention head; for q, k and v in one projection, ``num_heads`` is three times that of one.

        Raises:
            ValueError: the heads do not divide the matrix evenly.
        """
        if num_heads < 1 or shape[dim] % num_heads:
            raise ValueError(
                f"{num_heads} heads do not divide dim {dim} of a matrix {' x '.join(map(str, shape))}; "
                "give the sizes of uneven blocks to Split itself"
            )
        return cls(dim, (shape[dim] // num_heads,) * num_heads, transposed)

    @classmethod
    def even(cls, num_blocks: int, shape: Sequence[int], *, dim: int = 0) -> "Split":
        """``num_blocks`` blocks of the same size of a matrix of this shape."""
        return cls(dim, (shape[dim] // num_blocks,) * num_blocks)

    def joined(self) -> "Split":
        """One block instead of several, in the same orientation."""
        return Split(self.dim, (sum(self.sizes),), self.transposed)

    def ranges(self) -> list[tuple[int, int]]:
        """``(start, stop)`` of each block along ``dim``."""
        stops = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return [(stop - size, stop) for stop, size in zip(stops, self.sizes, strict=True)]

    def shapes(self, shape: tuple[int, int]) -> list[tuple[int, int]]:
        """``(R, C)`` of each block of a matrix of this shape."""
        return [(size, shape[1]) if self.dim == 0 else (shape[0], size) for size in self.sizes]

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raise ValueError where the sizes do not add up to parameter ``name``."""
        if sum(self.sizes) != shape[self.dim]:
            raise ValueError(
                f"the split of '{name}' has sizes {self.sizes}, together {sum(self.sizes)}, but the matrix is "
                f"{shape[0]} x {shape[1]}; sizes along dim {self.dim} must add up to {shape[self.dim]}"
            )


def whole(shape: tuple[int, int]) -> Split:
    """The split of a matrix that stands for itself."""
    return Split(0, (shape[0],))


def matrix_shape(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """``(R, C)`` of a parameter taken as a matrix: convolution kernels become ``(out, in * k)`` (Jordan, 2024).

    Raises:
        ValueError: the parameter has fewer than two dimensions, or no elements.
    """
    if len(shape) < 2 or 0 in shape:
        raise ValueError(
            f"Muon was given '{name}' of shape {tuple(shape)}, which is not a matrix; "
            "give biases, gains and scalars to AdamW"
        )
    return shape[0], math.prod(shape[1:])


def as_matrix(tensor: Tensor) -> Tensor:
    """``(R, C)`` of a parameter, its gradient or its momentum; a view, unless the memory format forbids it."""
    return tensor if tensor.ndim == 2 else tensor.flatten(1)


def update_momentum_(buffer: Tensor, grad: Tensor, momentum: float) -> Tensor:
    """Move the running average of gradients on by one step. An average as in torch, not Jordan's sum."""
    return buffer.lerp_(grad, 1 - momentum)


def look_ahead(buffer: Tensor, grad: Tensor, *, momentum: float, nesterov: bool) -> Tensor:
    """What is to be orthogonalized: the average, with Nesterov's one more step towards the gradient.

    Returns:
        Without ``nesterov`` the buffer itself: do not write to it.
    """
    return grad.lerp(buffer, momentum) if nesterov else buffer


def orthogonalize_blocks(
    update_RC: Tensor,
    split: Split,
    *,
    coefficients: Sequence[Coefficients],
    eps: float,
    dtype: torch.dtype,
    gram: bool = False,
) -> Tensor:
    """Orthogonalize each block of one matrix by itself."""
    blocks = [orthogonalize(block, coefficients, eps, dtype, gram) for block in update_RC.split(split.sizes, split.dim)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, split.dim)


def update_dtype(param_dtype: torch.dtype, ns_dtype: torch.dtype) -> torch.dtype:
    """The narrower of the two, in which an orthogonalized update is kept and sent: the iteration yields no more."""
    return ns_dtype if ns_dtype.itemsize <= param_dtype.itemsize else param_dtype


# Neurons: the rows of a matrix (out, in), the columns of a transposed one.


def second_momentum_shape(split: Split, shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of NorMuon's running average: along the neurons, and one for each block that has all of them."""
    neurons_dim = 1 if split.transposed else 0
    others = 1 if split.dim == neurons_dim else len(split.sizes)
    return (shape[0], others) if neurons_dim == 0 else (others, shape[1])


def normalize_neurons(update_RC: Tensor, second_momentum: Tensor, split: Split, *, beta2: float) -> Tensor:
    """Divide each neuron's update by the root of its running mean square, and keep each block's norm (NorMuon).

    Li et al. 2025, arXiv 2510.05491, algorithm 1. The bias of the first steps cancels, since the norm is kept.

    Args:
        update_RC: whole and orthogonalized. Not modified.
        second_momentum: of ``second_momentum_shape``; it is moved on by one step.
        split: the blocks, each normalized by itself.
        beta2: how much of the running average is kept each step.

    Returns:
        ``(R, C)``, dtype of the update; computed in that of ``second_momentum``.
    """
    inputs_dim = 0 if split.transposed else 1
    are_neurons_split = split.dim != inputs_dim
    blocks = []
    for i, ((start, stop), block) in enumerate(
        zip(split.ranges(), update_RC.split(split.sizes, split.dim), strict=True)
    ):
        average = second_momentum.narrow(split.dim, *((start, stop - start) if are_neurons_split else (i, 1)))
        block = block.to(average.dtype)
        average.lerp_(block.square().mean(inputs_dim, keepdim=True), 1 - beta2)
        normalized = block / (average.sqrt() + NORMUON_EPS)
        blocks.append(normalized * (block.norm() / (normalized.norm() + NORMUON_EPS)))
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, split.dim)).to(update_RC.dtype)


def adjust_lr(lr: float, adjust_lr_fn: str | None, shape: tuple[int, int]) -> float:
    """Scale the learning rate by the shape ``(R, C) = (out, in)`` of the matrix.

    Args:
        lr: the learning rate of the group.
        adjust_lr_fn: ``"original"`` (and None) is Jordan's ``sqrt(max(1, R / C))``; ``"match_rms_adamw"`` is
            Moonlight's ``0.2 sqrt(max(R, C))`` (arXiv 2502.16982), which lets AdamW's rate and decay be reused;
            ``"spectral_unclamped"`` is ``sqrt(R / C)`` (arXiv 2310.17813).
        shape: of the matrix, or of one block of it.
    """
    rows, columns = shape
    match adjust_lr_fn:
        case None | "original":
            return lr * math.sqrt(max(1, rows / columns))
        case "match_rms_adamw":
            return lr * (0.2 * math.sqrt(max(rows, columns)))
        case "spectral_unclamped":
            return lr * math.sqrt(rows / columns)
    raise ValueError(f"adjust_lr_fn is {adjust_lr_fn!r}; use one of {', '.join(ADJUST_LR_FNS)}")


@lru_cache(maxsize=4096)
def scaled_ranges(
    split: Split, shape: tuple[int, int], adjust_lr_fn: str | None, start: int, size: int
) -> tuple[tuple[int, int, float], ...]:
    """``(first, last, scale)`` along ``split.dim`` of each stretch of a shard whose learning rate has one scale.

    Args:
        split: the blocks of the whole matrix.
        shape: ``(R, C)`` of the whole matrix.
        adjust_lr_fn: see ``adjust_lr``.
        start: where along ``split.dim`` the shard begins.
        size: how long it is there.
    """
    ranges: list[tuple[int, int, float]] = []
    for (block_start, block_stop), block_shape in zip(split.ranges(), split.shapes(shape), strict=True):
        first, last = max(block_start - start, 0), min(block_stop - start, size)
        if first >= last:
            continue
        scale = adjust_lr(1.0, adjust_lr_fn, block_shape[::-1] if split.transposed else block_shape)
        if ranges and ranges[-1][2] == scale:
            first = ranges.pop()[0]
        ranges.append((first, last, scale))
    return tuple(ranges)


def on_device(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """The rate as it can be multiplied with tensors of a device; no wait for it, if it lies there or on the CPU."""
    if not isinstance(lr, Tensor):
        return lr
    return lr.reshape(()) if lr.device == device else lr.item()


def apply_update_(
    param: Tensor,
    update_RC: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float,
    cautious: bool = False,
    adjust_lr_fn: str | None,
    split: Split,
    shape: tuple[int, int],
    start: int = 0,
) -> None:
    """Decay the parameter, then subtract the orthogonalized update, each block by its own learning rate.

    Args:
        param: the whole parameter, or one shard of it; of any memory format.
        update_RC: orthogonalized, of the shape of ``param`` taken as a matrix.
        lr: the learning rate before it is adjusted. Weight decay is decoupled and uses it as it is, as in torch. A
            tensor on the parameter's device is never read by the host, and gives what a float gives up to rounding.
        weight_decay: fraction of the parameter that ``lr`` is multiplied with.
        cautious: decay only the numbers that the update does not move away from zero (arXiv 2510.12402).
        adjust_lr_fn: see ``adjust_lr``.
        split: the blocks of the whole matrix.
        shape: ``(R, C)`` of the whole matrix.
        start: where along ``split.dim`` this shard begins.
    """
    param_RC = as_matrix(param)
    lr = on_device(lr, param.device)
    kept = 1 - lr * weight_decay
    if cautious:
        param_RC.copy_(torch.where(param_RC * update_RC >= 0, param_RC * kept, param_RC))
    else:
        param_RC.mul_(kept)
    for first, last, scale in scaled_ranges(split, shape, adjust_lr_fn, start, param_RC.shape[split.dim]):
        block = param_RC.narrow(split.dim, first, last - first)
        block_of_update = update_RC.narrow(split.dim, first, last - first)
        if isinstance(lr, Tensor):
            block.sub_(block_of_update.to(block.dtype) * (lr * scale))
        else:
            block.add_(block_of_update, alpha=-(lr * scale))
    restore_(param, param_RC)


def restore_(param: Tensor, param_RC: Tensor) -> None:
    """Write the matrix back to the parameter, where it may not be a view of it: channels_last."""
    if param.ndim > 2 and not param.is_contiguous():
        param.copy_(param_RC.view(param.shape))
