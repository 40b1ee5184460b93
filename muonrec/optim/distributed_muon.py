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
from muonrec.optim.foreach import Placement, advance_momenta_, apply_updates_
from muonrec.optim.muon import Muon, Params, newton_schulz_settings, step_settings
from muonrec.optim.ownership import assign_owners, newton_schulz_cost, plan_hash, shard_range
from muonrec.optim.update import Split, as_matrix, matrix_shape, normalize_neurons, update_dtype

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
        settings, options: all that ``Muon`` takes, under the same names and in the same order.
        process_group: the ranks that share the work; by default all of them, or this process alone where
            ``torch.distributed`` is not initialized.

    Raises:
        ValueError: as ``Muon``; names are missing, a placement is not supported, or the ranks were given different
            parameters.
    """

    def __init__(
        self,
        params: Params,
        *settings: Any,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
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
        super().__init__(params, *settings, **options)

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
        self._init_second_momentum(self._owned_params())

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

    def _owned_params(self) -> list[Tensor]:
        return [matrix.param for matrix in self._matrices if matrix.owner == self.rank]

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
        advanced = self._advance_momenta([(m, m.param.grad) for m in bucket if m.is_sharded])
        for m in bucket:
            source = sources[m.name]
            if m.is_sharded:
                update = advanced[m.name]
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
        replicated = []
        for m in owned:
            if m.shard_dim is not None:
                updates[m.name] = torch.cat([next(shards) for shards in arrived], dim=m.shard_dim)
            else:
                source = sources[m.name]
                replicated.append((m, m.param.grad if source == self.rank else next(arrived[source])))
        # In the dtype of the parameter still: the batch casts them on the way in, which is the cast of the wire.
        updates |= {name: as_matrix(update) for name, update in self._advance_momenta(replicated).items()}

        group_settings = [newton_schulz_settings(group) for group in self.param_groups]
        results = orthogonalize_batched(
            updates,
            {m.name: m.split for m in owned},
            {m.name: group_settings[m.group_index] for m in owned},
            {m.name: self._wire_dtype(m) for m in owned},
        )
        for m in owned:
            beta2 = self.param_groups[m.group_index]["normuon_beta2"]
            if beta2 is not None:
                second_momentum = self.state[m.param]["second_momentum_buffer"]
                results[m.name] = normalize_neurons(results[m.name], second_momentum, m.split, beta2=beta2)
        return results

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
        # By group: parameters, updates, where they stand.
        work: dict[int, tuple[list[Tensor], list[Tensor], list[Placement]]] = {}
        for m in bucket:
            is_cut_along_split = m.shard_dim == m.split.dim
            start = m.local_range(self.rank, self.num_ranks)[0] if is_cut_along_split else 0
            params, updates, placements = work.setdefault(m.group_index, ([], [], []))
            params.append(_local(m.param))
            updates.append(next(arrived[m.owner]))
            placements.append(Placement(m.split, m.shape, start))
        for group_index, (params, updates, placements) in work.items():
            apply_updates_(params, updates, placements, **step_settings(self.param_groups[group_index]))

    def _advance_momenta(self, grads: Sequence[tuple[_Matrix, Tensor | None]]) -> dict[str, Tensor]:
        """Average one more gradient in, of shards or of wholes; what is to be orthogonalized, by name."""
        by_group: dict[int, list[tuple[_Matrix, Tensor | None]]] = {}
        for m, grad in grads:
            by_group.setdefault(m.group_index, []).append((m, grad))
        updates: dict[str, Tensor] = {}
        for group_index, members in by_group.items():
            group = self.param_groups[group_index]
            buffers = [_local(self.state[m.param]["momentum_buffer"]) for m, _ in members]
            local_grads = [
                torch.zeros_like(buffer) if grad is None else _local(grad)
                for buffer, (_, grad) in zip(buffers, members, strict=True)
            ]
            advanced = advance_momenta_(buffers, local_grads, momentum=group["momentum"], nesterov=group["nesterov"])
            updates |= zip((m.name for m, _ in members), advanced, strict=True)
        return updates

    def _wire_dtype(self, matrix: _Matrix) -> torch.dtype:
        return update_dtype(matrix.param.dtype, self.param_groups[matrix.group_index]["ns_dtype"])

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
            elif matrix.owner != self.rank:
                self.state[matrix.param].pop("second_momentum_buffer", None)


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
