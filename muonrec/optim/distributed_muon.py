"""Muon on many ranks: each matrix is orthogonalized once, on the rank that owns it.

Two kinds of parameters mix freely. Of *replicated* ones every rank has the whole gradient already, so momentum and
iteration stay on the owner and only the update travels. Of *sharded* ones each rank keeps the momentum of the part that
it holds; the parts of what is to be orthogonalized travel to the owner, those of the result back to all who hold them.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from muonrec.optim.agreement import agree_on_gradients, agree_on_plan, join_meshes
from muonrec.optim.batching import orthogonalize_batched
from muonrec.optim.exchange import Broadcast, Exchange, Pending
from muonrec.optim.foreach import Placement, advance_momenta_, apply_updates_
from muonrec.optim.layout import Layout, Part, Placing, assemble, find_gradient_problem, find_problem, placing_of
from muonrec.optim.muon import Muon, Params, newton_schulz_settings, step_settings
from muonrec.optim.ownership import assign_buckets, assign_owners, newton_schulz_cost
from muonrec.optim.transfers import FromOwners, Matrix, ToOwners, plan_from_owners, plan_to_owners
from muonrec.optim.update import as_matrix, matrix_shape, normalize_neurons, update_dtype

# Sets of parameters with gradients whose transfers are remembered: towers of several tasks come and go.
_NUM_PLANS = 16


class DistributedMuon(Muon):
    """Muon over a group of ranks; equals ``Muon`` on one device for the same settings.

    Takes, in any mix and in several groups: plain tensors that are equal on all ranks of ``process_group`` (DDP, also
    that of TorchRec's 2D parallelism, which is over all ranks), and DTensors on meshes of any number of axes, placed
    by ``Replicate()``, ``Shard(0)``, ``Shard(1)`` and ``_StridedShard`` of those: FSDP2, HSDP, tensor parallelism,
    FSDP2 on top of it, shards of rows by shards of columns. Shards may be uneven or empty. A mesh lies in
    ``process_group``; where it is a slice, as a tensor-parallel group is, slices alike make up the rest, and hold
    copies. Not taken: partial placements, ``Shard`` of the further dimensions of a convolution kernel, and parameters
    that only some of the ranks have (pipeline and expert parallelism): give each such group of ranks its own optimizer.

    Each matrix is orthogonalized once among all ranks that hold a part or a copy of it. Matrices are packed in two
    buckets of replicated ones and two of sharded ones, however many there are; a step costs at most two collectives
    per bucket and one small all-reduce, and one small all-gather where ranks disagree about which gradients exist. What
    travels is in the narrower of the parameter's dtype and ``ns_dtype``, which loses nothing, since the iteration casts
    to it anyway. Under HSDP an owner packs a part once for each of its copies, under DDP at most twice what all owners
    send together.

    Every rank must construct it with the same parameters in the same order and call ``step`` the same number of times.
    Gradients of copies must be equal, as DDP and FSDP2 leave them. They may be missing: on every rank, and the
    parameter is skipped as in torch; on some, and each part takes the gradient of a rank that holds a copy of it, and
    counts as zero where there is none.

    ``state`` holds the momentum of replicated parameters on their owner alone; the other ranks hold an empty entry.
    Save and load it by name with ``named_state`` and DCP, which also serves another number of ranks and another layout.
    ``load_state_dict`` takes what this rank saved, or a dictionary that holds every momentum.

    Not for embeddings, heads, gains or biases: give those to AdamW.

    Args:
        params: ``(name, parameter)`` pairs, or groups of them.
        settings, options: all that ``Muon`` takes, under the same names and in the same order.
        process_group: the ranks that share the work; by default all of them, or this process alone where
            ``torch.distributed`` is not initialized.
        assume_all_gradients: promise that every parameter has a gradient on every rank at every step. Then ``step``
            does not ask the other ranks, and the host does not wait for the device. A rank on which the promise is
            broken raises, and leaves the others waiting for it.

    Raises:
        ValueError: as ``Muon``; names are missing, a placement or mesh is not supported, or the ranks were given
            different parameters. On every rank, where one rank alone finds fault.
    """

    def __init__(
        self,
        params: Params,
        *settings: Any,
        process_group: dist.ProcessGroup | None = None,
        assume_all_gradients: bool = False,
        **options: Any,
    ) -> None:
        self.assume_all_gradients = assume_all_gradients
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        self.process_group = process_group
        self.num_ranks = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        if self.rank < 0:
            raise ValueError(
                "this rank is not in process_group; construct DistributedMuon on the ranks of the group alone"
            )
        self._has_compared = False
        try:
            super().__init__(params, *settings, **options)
        except ValueError as error:
            if self.process_group is None or self.num_ranks == 1 or self._has_compared:
                raise
            # The others wait to compare plans, and would not learn why this rank never comes.
            agree_on_plan([], [], str(error), self.process_group)

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
        self._device = _local(next(iter(self.names))).device
        self._matrices = self._plan()
        self._plans: dict[Any, list[tuple[ToOwners, FromOwners]]] = {}
        for m in self._matrices:
            # Every rank has an entry for every parameter: DCP steps an optimizer whose state is empty, and one rank
            # stepping alone would hang.
            self.state[m.param] = {}
            if self._keeps_momentum(m):
                like = _local(m.param) if m.is_replicated else m.param
                self.state[m.param]["momentum_buffer"] = torch.zeros_like(like)
        self._init_second_momentum([m.param for m in self._matrices if m.owner == self.rank])

    def _plan(self) -> list[Matrix]:
        group_indices = {param: i for i, group in enumerate(self.param_groups) for param in group["params"]}
        shapes = {name: matrix_shape(name, param.shape) for param, name in self.names.items()}
        costs = {}
        for param, name in self.names.items():
            steps = self.param_groups[group_indices[param]]["ns_steps"]
            costs[name] = sum(newton_schulz_cost(shape, steps) for shape in self.split_of(param).shapes(shapes[name]))
        owners = assign_owners(costs, self.num_ranks)

        layouts = self._lay_out(owners)
        buckets = assign_buckets(
            costs, owners, {name: layout.is_replicated for name, layout in layouts.items()}, self.num_ranks
        )
        return [
            Matrix(
                name=name,
                param=param,
                group_index=group_indices[param],
                shape=shapes[name],
                layout=layouts[name],
                split=self.split_of(param),
                owner=owners[name],
                bucket=buckets[name],
                turn=turn,
            )
            for turn, (param, name) in enumerate(self.names.items())
        ]

    def _lay_out(self, owners: Mapping[str, int]) -> dict[str, Layout]:
        """Where each parameter lies, once all ranks have agreed that they were given the same."""
        group_ranks = [0] if self.process_group is None else dist.get_process_group_ranks(self.process_group)
        placings = {name: placing_of(param) for param, name in self.names.items()}
        # By the meshes themselves, which parameters share.
        names = {(placing.mesh_ranks, placing.mesh_shape): name for name, placing in placings.items()}
        order = list(names)
        rows = [
            self._plan_row(param, placings[name], order.index(placings[name][1:]), owners[name])
            for param, name in self.names.items()
        ]
        problems = [find_problem(name, param, group_ranks) for param, name in self.names.items()]
        problem = next(filter(None, problems), None)
        said = [[ranks for ranks, _ in order]]
        if self.process_group is not None and self.num_ranks > 1:
            self._has_compared = True
            said = agree_on_plan(rows, said[0], problem, self.process_group)
        elif problem is not None:
            raise ValueError(problem)
        meshes = {
            mesh: join_meshes(name, mesh[1], [ranks[i] for ranks in said], group_ranks)
            for i, (mesh, name) in enumerate(names.items())
        }
        return {
            name: Layout(param.shape, placings[name].placements, meshes[placings[name][1:]])
            for param, name in self.names.items()
        }

    def _plan_row(self, param: Tensor, placing: Placing, mesh: int, owner: int) -> list[Any]:
        """What must be the same on every rank, in plain values."""
        name, split = self.names[param], self.split_of(param)
        group = next(group for group in self.param_groups if any(p is param for p in group["params"]))
        # A rate in a tensor prints its device, which differs between ranks.
        settings = {key: str(float(group[key]) if key == "lr" else group[key]) for key in self.defaults}
        layout = [list(param.shape), str(param.dtype), str(placing.placements), mesh, list(placing.mesh_shape)]
        return [name, *layout, [split.dim, *split.sizes, split.transposed], owner, settings]

    def _keeps_momentum(self, m: Matrix) -> bool:
        return not m.is_replicated or m.owner == self.rank

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient on any rank; gradients are not written to.

        Every rank must call it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        buckets = self._plan_step()

        # Launch: all parts are on their way before the first matrix is touched.
        gathers = [self._send_to_owners(to_owners) for to_owners, _ in buckets]

        # Compute: while this bucket is orthogonalized, the next one arrives and the one before returns.
        returns = []
        for (to_owners, from_owners), (ready, gather) in zip(buckets, gathers, strict=True):
            updates = self._orthogonalize_owned(to_owners, ready, gather)
            returns.append((updates, self._send_from_owners(from_owners, updates)))

        # Finish.
        for (_, from_owners), (updates, returned) in zip(buckets, returns, strict=True):
            self._apply(from_owners, updates, returned)
        return loss

    def _plan_step(self) -> list[tuple[ToOwners, FromOwners]]:
        """What each bucket sends and receives, worked out once for each set of gradients."""
        having = self._agree_on_gradients()
        key = (tuple(having), *(group["ns_dtype"] for group in self.param_groups))
        if key not in self._plans:
            if len(self._plans) == _NUM_PLANS:
                self._plans.clear()
            moving = [m for m, ranks in zip(self._matrices, having, strict=True) if ranks is None or ranks]
            buckets = [[m for m in moving if m.bucket == i] for i in range(max(m.bucket for m in self._matrices) + 1)]
            present = {m.name: ranks for m, ranks in zip(self._matrices, having, strict=True)}
            wire_dtypes = {m.name: self._wire_dtype(m) for m in moving}
            this = {"rank": self.rank, "num_ranks": self.num_ranks}
            self._plans[key] = [
                (
                    plan_to_owners(bucket, present, wire_dtypes, **this),
                    plan_from_owners(bucket, wire_dtypes, **this),
                )
                for bucket in buckets
                if bucket
            ]
        return self._plans[key]

    def _agree_on_gradients(self) -> list[frozenset[int] | None]:
        """For each matrix the ranks that have its gradient; None for all of them."""
        problem = next(filter(None, (find_gradient_problem(m.name, m.param) for m in self._matrices)), None)
        flags = [m.param.grad is not None for m in self._matrices]
        if self.assume_all_gradients:
            if not all(flags):
                names = [m.name for m, has_gradient in zip(self._matrices, flags, strict=True) if not has_gradient]
                problem = (
                    f"{names} have no gradient on rank {self.rank}, but assume_all_gradients promises one for every "
                    "parameter on every rank at every step; leave it False where a batch may lack a feature"
                )
            having: list[frozenset[int] | None] | None = [None] * len(flags)
        elif self.process_group is None or self.num_ranks == 1:
            having = [None if has_gradient else frozenset() for has_gradient in flags]
        else:
            having = agree_on_gradients(
                flags, is_refused=problem is not None, group=self.process_group, device=self._device
            )
        if problem is not None or having is None:
            raise ValueError(problem or "another rank refuses a gradient; its own error says which and why")
        return having

    def _start(self, exchange: Exchange | Broadcast, tensors: Sequence[Tensor]) -> Pending:
        assert self.process_group is not None
        return exchange.start(tensors, self.process_group, self._device)

    def _send_to_owners(self, plan: ToOwners) -> tuple[dict[str, Tensor], Pending | None]:
        """Advance what momentum can be, and send it; returns what is ready to be orthogonalized, by name."""
        ready = self._advance_momenta([(m, m.param.grad) for m in plan.advanced])
        if plan.exchange is None:
            return ready, None
        lent = [as_matrix(_local(m.param.grad)) for m in plan.lent if m.param.grad is not None]
        return ready, self._start(plan.exchange, lent + [ready[m.name] for m in plan.sent])

    def _orthogonalize_owned(
        self, plan: ToOwners, ready: dict[str, Tensor], gather: Pending | None
    ) -> dict[str, Tensor]:
        """The whole orthogonalized updates of the matrices that this rank owns, by name."""
        arrived = gather.wait() if gather is not None else []
        num_borrowed = len(plan.borrowed)
        ready |= self._advance_momenta(list(zip(plan.borrowed, arrived[:num_borrowed], strict=True)))
        parts: dict[str, list[tuple[Part, Tensor]]] = {m.name: [] for m, _ in plan.owned}
        for (m, part), update in zip(plan.arriving, arrived[num_borrowed:], strict=True):
            parts[m.name].append((part, update))
        for m, own in plan.owned:
            if own is not None:
                # Beside parts that have travelled, in their dtype; a whole is cast by the batch on the way in.
                update = ready[m.name]
                parts[m.name].append((own, update.to(self._wire_dtype(m)) if parts[m.name] else update))

        group_settings = [newton_schulz_settings(group) for group in self.param_groups]
        results = orthogonalize_batched(
            {name: assemble(pieces) for name, pieces in parts.items()},
            {m.name: m.split for m, _ in plan.owned},
            {m.name: group_settings[m.group_index] for m, _ in plan.owned},
            {m.name: self._wire_dtype(m) for m, _ in plan.owned},
        )
        for m, _ in plan.owned:
            beta2 = self.param_groups[m.group_index]["normuon_beta2"]
            if beta2 is not None:
                second_momentum = self.state[m.param]["second_momentum_buffer"]
                results[m.name] = normalize_neurons(results[m.name], second_momentum, m.split, beta2=beta2)
        return results

    def _send_from_owners(self, plan: FromOwners, updates: Mapping[str, Tensor]) -> Pending | None:
        """Send every rank its part of each update."""
        if plan.exchange is None:
            return None
        return self._start(plan.exchange, [part.of(updates[m.name]) for m, part in plan.sent])

    def _apply(self, plan: FromOwners, updates: Mapping[str, Tensor], returned: Pending | None) -> None:
        arrived = zip(plan.arriving, returned.wait() if returned is not None else [], strict=True)
        # By group: parameters, updates, where they stand.
        work: dict[int, tuple[list[Tensor], list[Tensor], list[Placement]]] = {}
        for m, update in [*arrived, *((m, part.of(updates[m.name])) for m, part in plan.kept)]:
            local, dim = _local(m.param), m.split.dim
            # Of a convolution kernel (out, in, k), in * k columns of the matrix are in entries of dim 1.
            scale = m.shape[dim] // m.param.shape[dim]
            params, pieces, placements = work.setdefault(m.group_index, ([], [], []))
            for offset, start, size in m.layout.part(self.rank).sections[dim]:
                is_all = size == update.shape[dim]
                params.append(local if is_all else local.narrow(dim, offset // scale, size // scale))
                pieces.append(update if is_all else update.narrow(dim, offset, size))
                placements.append(Placement(m.split, m.shape, start))
        for group_index, (params, pieces, placements) in work.items():
            apply_updates_(params, pieces, placements, **step_settings(self.param_groups[group_index]))

    def _advance_momenta(self, grads: Sequence[tuple[Matrix, Tensor | None]]) -> dict[str, Tensor]:
        """Average one more gradient in, of parts or of wholes; returns what is to be orthogonalized, by name."""
        by_group: dict[int, list[tuple[Matrix, Tensor | None]]] = {}
        for m, grad in grads:
            by_group.setdefault(m.group_index, []).append((m, grad))
        updates: dict[str, Tensor] = {}
        for group_index, members in by_group.items():
            group = self.param_groups[group_index]
            buffers = [_local(self.state[m.param]["momentum_buffer"]) for m, _ in members]
            local_grads = [
                torch.zeros_like(buffer) if grad is None else _local(grad).view_as(buffer)
                for buffer, (_, grad) in zip(buffers, members, strict=True)
            ]
            advanced = advance_momenta_(buffers, local_grads, momentum=group["momentum"], nesterov=group["nesterov"])
            updates |= {m.name: as_matrix(update) for (m, _), update in zip(members, advanced, strict=True)}
        return updates

    def _wire_dtype(self, m: Matrix) -> torch.dtype:
        return update_dtype(m.param.dtype, self.param_groups[m.group_index]["ns_dtype"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, and keep the momentum that belongs on this rank.

        Raises:
            ValueError: the momentum of a parameter that this rank owns is absent, as when another number of ranks saved
                it. Some of the state is replaced by then.
        """
        super().load_state_dict(state_dict)
        for m in self._matrices:
            if not self._keeps_momentum(m):
                self.state[m.param] = {}
            elif "momentum_buffer" not in self.state[m.param]:
                raise ValueError(
                    f"the state dict holds no momentum of '{m.name}', which rank {self.rank} of {self.num_ranks} "
                    "owns; another rank or number of ranks saved it: save and load named_state() with DCP instead"
                )
            elif m.owner != self.rank:
                self.state[m.param].pop("second_momentum_buffer", None)


def _signature() -> inspect.Signature:
    """What ``*settings`` and ``**options`` stand for, for `help` and editors."""
    own = inspect.signature(DistributedMuon.__init__).parameters
    extra = [own["process_group"], own["assume_all_gradients"]]
    return inspect.Signature([*inspect.signature(Muon).parameters.values(), *extra])


DistributedMuon.__signature__ = _signature()  # type: ignore[attr-defined]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
