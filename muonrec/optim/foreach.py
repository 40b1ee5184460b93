"""Does to many matrices in few calls what ``update`` does to one, to the same bits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muonrec.optim.update import Split, as_matrix, on_device, restore_, scaled_ranges


class Placement(NamedTuple):
    """Where a parameter, or a shard of it, stands in its matrix; see ``apply_update_``."""

    split: Split
    shape: tuple[int, int]
    start: int = 0


def advance_momenta_(
    buffers: Sequence[Tensor], grads: Sequence[Tensor], *, momentum: float, nesterov: bool
) -> list[Tensor]:
    """``update_momentum_`` and ``look_ahead`` of many; what is to be orthogonalized.

    Returns:
        Without ``nesterov`` the buffers themselves: do not write to them.
    """
    if not buffers:
        return []
    torch._foreach_lerp_(list(buffers), list(grads), 1 - momentum)
    return list(torch._foreach_lerp(list(grads), list(buffers), momentum)) if nesterov else list(buffers)


def apply_updates_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    placements: Sequence[Placement],
    *,
    lr: float | Tensor,
    weight_decay: float,
    cautious: bool = False,
    adjust_lr_fn: str | None,
) -> None:
    """``apply_update_`` of many parameters of one group.

    Args:
        params: parameters or shards of them, without gradient tracking.
        updates: orthogonalized matrices, one each.
        placements: one each.
        lr, weight_decay, cautious, adjust_lr_fn: see ``apply_update_``.
    """
    if not params:
        return
    matrices = [as_matrix(param) for param in params]
    lr = on_device(lr, params[0].device)
    kept = 1 - lr * weight_decay
    if cautious:
        decayed = [
            torch.where(param_RC * update_RC >= 0, param_RC * kept, param_RC)
            for param_RC, update_RC in zip(matrices, updates, strict=True)
        ]
        torch._foreach_copy_(matrices, decayed)
    else:
        torch._foreach_mul_(matrices, kept)

    by_scale: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for param_RC, update_RC, (split, shape, start) in zip(matrices, updates, placements, strict=True):
        size = param_RC.shape[split.dim]
        for first, last, scale in scaled_ranges(split, shape, adjust_lr_fn, start, size):
            is_all = last - first == size
            into, by = by_scale.setdefault(scale, ([], []))
            into.append(param_RC if is_all else param_RC.narrow(split.dim, first, last - first))
            by.append(update_RC if is_all else update_RC.narrow(split.dim, first, last - first))
    for scale, (into, by) in by_scale.items():
        if isinstance(lr, Tensor):
            cast = [update.to(param.dtype) for param, update in zip(into, by, strict=True)]
            torch._foreach_sub_(into, torch._foreach_mul(cast, lr * scale))
        else:
            torch._foreach_add_(into, by, alpha=-(lr * scale))
    for param, param_RC in zip(params, matrices, strict=True):
        restore_(param, param_RC)
