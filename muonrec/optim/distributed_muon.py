"""Muon on many ranks: each matrix is orthogonalized once, on the rank that owns it.

Two layouts mix freely. *Replicated* parameters (plain tensors, as under DDP) have their gradient everywhere already,
so momentum and iteration stay on the owner and only the update travels. *Sharded* parameters (DTensors of FSDP2) keep
a shard of the momentum on each rank; the shards of what is to be orthogonalized travel to the owner, the shards of the
result back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from muonrec.optim.batching import orthogonalize_batched
from muonrec.optim.exchange import Exchange, Incoming, Outgoing
from muonrec.optim.muon import Muon, Params, newton_schulz_settings, step_settings
from muonrec.optim.newton_schulz import JORDAN_COEFFICIENT, Coefficients
from muonrec.optim.ownership import assign_owners, newton_schulz_cost, plan_hash, shard_range
from muonrec.optim.update import (
    Split,
    apply_update_,
    as_matrix,
    look_ahead,
    matrix_shape,
    update_momentum_,
)

# R = rows, C = columns of a parameter taken as a matrix

# Two, so that one is orthogonalized while the other travels; more would cut the batches of equal shapes into pieces.
NUM_BUCKETS = 2


@dataclass(frozen=True, eq=False)
class _Matrix:
    """One parameter in the plan; the same on every rank, but for the tensor."""

    name: str
    param: Tensor
    group_index: int
    shape: tuple[int, int]
    shard_dim: int | None  # of the matrix; None where the parameter is replicated
    split: Split
    owner: int
    bucket: int

    @property
    def is_sharded(self) -> bool:
        return self.shard_dim is not None

    def local_range(self, rank: int, num_ranks: int) -> tuple[int, int]:
        """``(start, stop)`` along ``shard_dim`` of the matrix of what a rank holds."""
        assert self.shard_dim is not None
        # Dim 1 of a convolution kernel (out, in, k) is in * k columns of the matrix.
        stride = self.shape[self.shard_dim] // self.param.shape[self.shard_dim]
        start, stop = shard_range(self.param.shape[self.shard_dim], num_ranks, rank)
        return start * stride, stop * stride

    def local_shape(self, rank: int, num_ranks: int) -> tuple[int, int]:
        """``(R, C)`` of what a rank holds."""
        if self.shard_dim is None:
            return self.shape
        start, stop = self.local_range(rank, num_ranks)
        return (stop - start, self.shape[1]) if self.shard_dim == 0 else (self.shape[0], stop - start)


class DistributedMuon(Muon):
    """Muon over a group of ranks; equals ``Muon`` on one device for the same settings.

    Takes plain tensors that are equal on all ranks (DDP) and DTensors ``Shard(0)`` or ``Shard(1)`` on a one-dimensional
    mesh (FSDP2), in any mix; shards may be uneven or empty. A step costs at most two all-to-alls per bucket, with two
    buckets, and one small all-reduce, for any number of matrices. What travels is in the narrower of the parameter's
    dtype and ``ns_dtype``, which loses nothing, since the iteration casts to it anyway.

    Every rank must construct it with the same parameters in the same order and call ``step`` the same number of times.
    Gradients may be missing: on every rank, and the parameter is skipped as in torch; on some, and they count as zero
    there if the parameter is sharded, while a replicated one takes the gradient of a rank that has it.

    ``state`` holds the momentum of replicated parameters on their owner alone; the other ranks hold an empty entry.
    Save and load it by name with ``named_state`` and DCP, which also serves another number of ranks.
    ``load_state_dict`` takes what this rank saved, or a dictionary that holds every momentum.

    Not for embeddings, heads, gains or biases: give those to AdamW. Not for HSDP or tensor-parallel placements yet.

    Args:
        params: ``(name, parameter)`` pairs, or groups of them.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn, ns_dtype, splits: as in
            ``Muon``.
        process_group: the ranks that share the work; by default all of them, or this process alone where
            ``torch.distributed`` is not initialized.

    Raises:
        ValueError: as ``Muon``; names are missing, a placement is not supported, or the ranks were given different
            parameters.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] | Sequence[Coefficients] = JORDAN_COEFFICIENT,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype = torch.bfloat16,
        splits: Mapping[str, Split] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        self.process_group = process_group
        self.num_ranks = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        if self.rank < 0:
            raise ValueError(
                "this rank is not in process_group; construct DistributedMuon on the ranks of the group alone"
            )
        super().__init__(
            params,
            lr,
            weight_decay,
            momentum,
            nesterov,
            ns_coefficients,
            eps,
            ns_steps,
            adjust_lr_fn,
            ns_dtype=ns_dtype,
            splits=splits,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Used by the constructor; later it is refused, since the owners are planned by then."""
        if hasattr(self, "_matrices"):
            raise ValueError(
                "DistributedMuon was given a group after its owners were planned; construct it with all groups"
            )
        super().add_param_group(param_group)
        if "param_names" not in self.param_groups[-1]:
            raise ValueError(
                "DistributedMuon was given parameters without names, by which owners are planned and state is saved; "
                "pass model.named_parameters(), or groups whose 'params' are (name, parameter) pairs"
            )

    def _init_state(self) -> None:
        self._matrices = self._plan()
        self._device = _local(self._matrices[0].param).device
        self._compare_plans()
        for matrix in self._matrices:
            # Every rank has an entry for every parameter: DCP steps an optimizer whose state is empty, and one rank
            # stepping alone would hang.
            self.state[matrix.param] = {}
            if self._holds_momentum(matrix):
                self.state[matrix.param]["momentum_buffer"] = torch.zeros_like(matrix.param)

    def _plan(self) -> list[_Matrix]:
        group_indices = {param: i for i, group in enumerate(self.param_groups) for param in group["params"]}
        shapes = {name: matrix_shape(name, param.shape) for param, name in self.names.items()}
        costs = {}
        for param, name in self.names.items():
            steps = self.param_groups[group_indices[param]]["ns_steps"]
            costs[name] = sum(newton_schulz_cost(shape, steps) for shape in self.split_of(param).shapes(shapes[name]))

        owners = assign_owners(costs, self.num_ranks)
        buckets: dict[str, int] = {}
        for rank in range(self.num_ranks):
            owned = {name: cost for name, cost in costs.items() if owners[name] == rank}
            buckets |= assign_owners(owned, NUM_BUCKETS if self.num_ranks > 1 else 1)
        return [
            _Matrix(
                name=name,
                param=param,
                group_index=group_indices[param],
                shape=shapes[name],
                shard_dim=self._shard_dim(name, param),
                split=self.split_of(param),
                owner=owners[name],
                bucket=buckets[name],
            )
            for param, name in self.names.items()
        ]

    def _shard_dim(self, name: str, param: Tensor) -> int | None:
        if not isinstance(param, DTensor):
            return None
        mesh, placement = param.device_mesh, param.placements[0]
        if mesh.ndim != 1 or type(placement) is not Shard or placement.dim > 1:
            raise ValueError(
                f"'{name}' is placed as {tuple(param.placements)} on a mesh of shape {tuple(mesh.shape)}, which is not "
                "supported yet, use Shard(0) or Shard(1) on a one-dimensional mesh (fully_shard) or plain tensors (DDP)"
            )
        mesh_ranks = mesh.mesh.tolist()
        group_ranks = dist.get_process_group_ranks(self.process_group)
        if mesh_ranks != group_ranks:
            raise ValueError(
                f"'{name}' is sharded over ranks {mesh_ranks} but process_group is of ranks {group_ranks}; "
                "pass process_group=mesh.get_group(), and make one optimizer per mesh"
            )
        return placement.dim

    def _compare_plans(self) -> None:
        if self.num_ranks == 1:
            return
        rows = [self._plan_row(matrix) for matrix in self._matrices]
        hashes: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(hashes, plan_hash(rows), group=self.process_group)
        if len(set(hashes)) == 1:
            return
        plans: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(plans, rows, group=self.process_group)
        other = next(rank for rank in range(self.num_ranks) if hashes[rank] != hashes[0])
        ours, theirs = [{row[0]: row for row in plans[rank]} for rank in (0, other)]
        # Absent ones first: one name too many moves the owners of others.
        differing = [name for name in ours | theirs if (name in ours) != (name in theirs)]
        differing = differing or [name for name in ours if ours[name] != theirs[name]] or ["their order"]
        raise ValueError(
            f"ranks 0 and {other} were given different parameters: they differ in {differing[0]}"
            f" ({ours.get(differing[0], 'absent')} and {theirs.get(differing[0], 'absent')}), {len(differing)} in all; "
            "give every rank the same names, shapes, dtypes, placements, splits and settings in the same order"
        )

    def _plan_row(self, matrix: _Matrix) -> list[Any]:
        """What must be the same on every rank, in plain values."""
        split, group = matrix.split, self.param_groups[matrix.group_index]
        # A rate in a tensor prints its device, which differs between ranks.
        settings = {key: str(float(group[key]) if key == "lr" else group[key]) for key in self.defaults}
        layout = [list(matrix.param.shape), str(matrix.param.dtype), matrix.shard_dim]
        return [
            matrix.name,
            *layout,
            [split.dim, *split.sizes, split.transposed],
            matrix.owner,
            matrix.bucket,
            settings,
        ]

    def _holds_momentum(self, matrix: _Matrix) -> bool:
        return matrix.is_sharded or matrix.owner == self.rank

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient on any rank; gradients are not written to.

        Every rank must call it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        sources = self._agree_on_gradients()
        moving = [matrix for matrix in self._matrices if matrix.name in sources]
        buckets = [[m for m in moving if m.bucket == i] for i in range(NUM_BUCKETS)]
        buckets = [bucket for bucket in buckets if bucket]

        # Launch: all shards are on their way before the first matrix is touched.
        gathers = [self._send_to_owners(bucket, sources) for bucket in buckets]

        # Compute: while this bucket is orthogonalized, the next one arrives and the one before returns.
        returns = []
        for bucket, gather in zip(buckets, gathers, strict=True):
            updates = self._orthogonalize_owned(bucket, sources, gather)
            returns.append(self._send_from_owners(bucket, updates))

        # Finish.
        for bucket, returned in zip(buckets, returns, strict=True):
            self._apply(bucket, returned)
        return loss

    def _agree_on_gradients(self) -> dict[str, int]:
        """By name, the rank whose gradient counts if the parameter is replicated; without the names that no rank has.

        It is the owner or, going up from there and around, the first rank that has the gradient.
        """
        distances = [
            (self.rank - m.owner) % self.num_ranks if _has_gradient(m) else self.num_ranks for m in self._matrices
        ]
        if self.num_ranks > 1:
            shared = torch.tensor(distances, dtype=torch.int32, device=self._device)
            dist.all_reduce(shared, dist.ReduceOp.MIN, group=self.process_group)
            distances = shared.tolist()
        return {
            m.name: (m.owner + distance) % self.num_ranks
            for m, distance in zip(self._matrices, distances, strict=True)
            if distance < self.num_ranks
        }

    def _send_to_owners(self, bucket: list[_Matrix], sources: Mapping[str, int]) -> Exchange | None:
        """Advance the momentum of shards and send what is to be orthogonalized; None where nothing has to travel."""
        outgoing: list[list[Outgoing]] = [[] for _ in range(self.num_ranks)]
        incoming: list[list[Incoming]] = [[] for _ in range(self.num_ranks)]
        for m in bucket:
            source = sources[m.name]
            if m.is_sharded:
                update = self._advance_momentum(m, m.param.grad)
                outgoing[m.owner].append((as_matrix(update), self._wire_dtype(m)))
                if m.owner == self.rank:
                    for rank in range(self.num_ranks):
                        incoming[rank].append((m.local_shape(rank, self.num_ranks), self._wire_dtype(m)))
            elif source != m.owner:
                # In full precision: this one is averaged into the momentum, not orthogonalized at once.
                if source == self.rank:
                    assert m.param.grad is not None
                    outgoing[m.owner].append((m.param.grad, m.param.dtype))
                if m.owner == self.rank:
                    incoming[source].append((m.param.shape, m.param.dtype))
        # Decided from what every rank knows: a rank that skipped a collective alone would hang the others.
        if not any(m.is_sharded or sources[m.name] != m.owner for m in bucket):
            return None
        return Exchange(outgoing, incoming, self.process_group, self._device)

    def _orthogonalize_owned(
        self, bucket: list[_Matrix], sources: Mapping[str, int], gather: Exchange | None
    ) -> dict[str, Tensor]:
        """The whole orthogonalized updates of the matrices that this rank owns, by name."""
        arrived = gather.wait() if gather is not None else []
        owned = [m for m in bucket if m.owner == self.rank]
        updates = {}
        for m in owned:
            if m.shard_dim is not None:
                updates[m.name] = torch.cat([next(shards) for shards in arrived], dim=m.shard_dim)
            else:
                source = sources[m.name]
                grad = m.param.grad if source == self.rank else next(arrived[source])
                updates[m.name] = as_matrix(self._advance_momentum(m, grad)).to(self._wire_dtype(m))

        splits = {m.name: m.split for m in owned}
        settings = {m.name: newton_schulz_settings(self.param_groups[m.group_index]) for m in owned}
        return orthogonalize_batched(updates, splits, settings)

    def _send_from_owners(self, bucket: list[_Matrix], updates: Mapping[str, Tensor]) -> Exchange:
        """Send each rank its shard of a sharded update and the whole of a replicated one."""
        outgoing: list[list[Outgoing]] = [[] for _ in range(self.num_ranks)]
        incoming: list[list[Incoming]] = [[] for _ in range(self.num_ranks)]
        for m in bucket:
            incoming[m.owner].append((m.local_shape(self.rank, self.num_ranks), self._wire_dtype(m)))
            if m.owner != self.rank:
                continue
            for rank in range(self.num_ranks):
                update = updates[m.name]
                if m.shard_dim is not None:
                    start, stop = m.local_range(rank, self.num_ranks)
                    update = update.narrow(m.shard_dim, start, stop - start)
                outgoing[rank].append((update, self._wire_dtype(m)))
        return Exchange(outgoing, incoming, self.process_group, self._device)

    def _apply(self, bucket: list[_Matrix], returned: Exchange) -> None:
        arrived = returned.wait()
        for m in bucket:
            is_cut_along_split = m.shard_dim == m.split.dim
            apply_update_(
                _local(m.param),
                next(arrived[m.owner]),
                split=m.split,
                start=m.local_range(self.rank, self.num_ranks)[0] if is_cut_along_split else 0,
                **step_settings(self.param_groups[m.group_index], m.name, m.param.shape),
            )

    def _advance_momentum(self, matrix: _Matrix, grad: Tensor | None) -> Tensor:
        """Average one more gradient in, of a shard or of the whole; returns what is to be orthogonalized."""
        group = self.param_groups[matrix.group_index]
        buffer = _local(self.state[matrix.param]["momentum_buffer"])
        local_grad = torch.zeros_like(buffer) if grad is None else _local(grad)
        update_momentum_(buffer, local_grad, group["momentum"])
        return look_ahead(buffer, local_grad, momentum=group["momentum"], nesterov=group["nesterov"])

    def _wire_dtype(self, matrix: _Matrix) -> torch.dtype:
        ns_dtype = self.param_groups[matrix.group_index]["ns_dtype"]
        return ns_dtype if ns_dtype.itemsize <= matrix.param.dtype.itemsize else matrix.param.dtype

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, and keep the momentum that belongs on this rank.

        Raises:
            ValueError: the momentum of a parameter that this rank owns is absent, as when another number of ranks saved
                it. Some of the state is replaced by then.
        """
        super().load_state_dict(state_dict)
        for matrix in self._matrices:
            if not self._holds_momentum(matrix):
                self.state[matrix.param] = {}
            elif "momentum_buffer" not in self.state[matrix.param]:
                raise ValueError(
                    f"the state dict holds no momentum of '{matrix.name}', which rank {self.rank} of {self.num_ranks} "
                    "owns; another rank or number of ranks saved it: save and load named_state() with DCP instead"
                )


def _has_gradient(matrix: _Matrix) -> bool:
    grad = matrix.param.grad
    if isinstance(grad, DTensor) and isinstance(matrix.param, DTensor) and grad.placements != matrix.param.placements:
        raise ValueError(
            f"the gradient of '{matrix.name}' is placed as {tuple(grad.placements)} but the parameter as "
            f"{tuple(matrix.param.placements)}; redistribute the gradient before step()"
        )
    return grad is not None


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
