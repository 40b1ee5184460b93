"""One optimizer for a TorchRec model: tables fused into the backward pass, matrices by Muon, the rest by AdamW."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_types import ShardedEmbeddingModule, ShardingType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from muonrec.embeddings.fused import NOT_ASKED, NOT_FUSED, fused_tables, table_optimizer
from muonrec.embeddings.roles import role_rules
from muonrec.optim import Assignment, DistributedMuon, Muon, Role, Routing, param_groups

Overrides = Sequence[tuple[str, str | Role]]


class JoinedOptimizer(CombinedOptimizer):
    """TorchRec's `CombinedOptimizer` that also knows its parts and the routing it was built from.

    Args:
        parts: keyed optimizers by name: ``tables`` (fused), ``dense_tables``, ``muon`` or ``matrices``, and ``adamw``.
        routing: which parameter went where, and why.
    """

    def __init__(self, parts: Mapping[str, KeyedOptimizer], routing: Sequence[Assignment]) -> None:
        # The fused part keeps TorchRec's own keys, so that existing checkpoints of tables load.
        super().__init__([("" if name == "tables" else name, part) for name, part in parts.items()])
        self.parts = dict(parts)
        self._base_lrs = {name: [float(group["lr"]) for group in part.param_groups] for name, part in parts.items()}
        self.routing = Routing(routing)

    @property
    def params(self) -> Mapping[str, Any]:
        """Parameters by name, to be read: `WarmupOptimizer` around all parts would write to it."""
        return _ReadOnlyParams(super().params)

    @property
    def state(self) -> Mapping[torch.Tensor, Any]:
        """State by parameter; a rank has none of the momentum that another rank owns."""
        return {parameter: state for parameter, state in super().state.items() if state}

    def scale_lr(self, part: str, factor: float) -> None:
        """Set a part's rates to ``factor`` times those it was built with.

        Those of the tables reach FBGEMM with the next `zero_grad` or `step`.
        """
        for group, lr in zip(self.parts[part].param_groups, self._base_lrs[part], strict=True):
            group["lr"] = factor * lr  # type: ignore[index]

    def step(self, closure: Any = None) -> None:
        """Step every part; after the backward pass, when all gradients are there.

        Raises:
            ValueError: called within the backward pass.
        """
        if torch._C._current_graph_task_id() >= 0:
            raise ValueError(
                "the whole optimizer was stepped within the backward pass, as by TorchRec's "
                "TrainPipelineSparseDistBwdOpt, before all gradients are there; DDP's replicas would drift apart; "
                "use muonrec.OverlappedPipeline, which steps what is complete, with FSDP2, or TrainPipelineSparseDist"
            )
        for part in self.parts.values():  # not super's: its hooks would run twice
            part.step(closure=closure)

    def init_state(self, sparse_grad_parameter_names: set[str] | None = None) -> None:
        """Nothing to do: the state exists. TorchRec's would step with zero gradients, and decay the weights."""

    # So that a `torch.amp.GradScaler` hands its scale over, before it calls `step`.
    _step_supports_amp_scaling = True

    def _refuse_scale(self, _: object) -> None:
        raise ValueError(
            "a GradScaler scales the loss, and the fused tables have taken the scaled gradients in the backward pass; "
            "train in bf16 without a scaler: torch.autocast(device_type, torch.bfloat16) around the forward pass"
        )

    grad_scale = property(fset=_refuse_scale)

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradients of part ``adamw``, before clipping."""
        part = self.parts.get("adamw")
        return part.grad_norm if isinstance(part, DenseOptimizer) else None


class _ReadOnlyParams(dict[str, Any]):
    def __setitem__(self, name: str, value: Any) -> None:
        raise ValueError(
            "WarmupOptimizer sets every group to one rate, and the tables, Muon and AdamW have rates of their own; use "
            "torch.optim.lr_scheduler.LambdaLR(optimizer, ...) or optimizer.scale_lr(part, factor), which scale them, "
            "or a WarmupOptimizer with its own lr and param_name around each of optimizer.parts"
        )


class AccumulatedStep:
    """What a train pipeline takes for its optimizer: gradients are cleared before the first and used after the last
    micro-batch of a step.

    DDP reduces the gradients with the last micro-batch, unless its graph is static. FSDP2 reduces them with each, since
    it holds whole gradients until it does.

    Args:
        optimizer: stepped and cleared.
        model: that it belongs to.
        timed: entered around every step of the optimizer, such as a `muonrec.runlog.Stopwatch`.
    """

    def __init__(
        self,
        optimizer: JoinedOptimizer,
        model: DistributedModelParallel,
        *,
        timed: AbstractContextManager[object] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._timed = nullcontext() if timed is None else timed
        wrapped = model._dmp_wrapped_module
        # A static graph is recorded by the first backward pass, which must reduce. Reducing every micro-batch of the
        # first step alone would do, but a resumed run would not repeat the rounding of the one that was not stopped.
        is_apart = isinstance(wrapped, DistributedDataParallel) and not wrapped.static_graph
        self._unreduced: Callable[[], AbstractContextManager[None]] = wrapped.no_sync if is_apart else nullcontext
        self._is_first = self._is_last = True

    def over(self, micro_steps: range) -> Iterator[int]:
        """Yield the micro-batches of one step."""
        for micro_step in micro_steps:
            self._is_first, self._is_last = micro_step == micro_steps[0], micro_step == micro_steps[-1]
            with nullcontext() if self._is_last else self._unreduced():
                yield micro_step

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._is_first:
            self._optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        if self._is_last:
            with self._timed:
                self._optimizer.step()


class DenseOptimizer(KeyedOptimizerWrapper):
    """A torch optimizer under TorchRec's keys, whose state exists from construction and whose step clips.

    The norm is taken over the parameters of this optimizer alone: Muon does not depend on the scale of a gradient, and
    the fused tables are updated before any norm is known. Under FSDP2 it is the norm over all shards.

    Args:
        parameters: by name.
        make: the optimizer of ``(name, parameter)`` pairs.
        max_grad_norm: clip to this norm; None to leave the gradients alone.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        make: Callable[[list[tuple[str, torch.Tensor]]], torch.optim.Optimizer],
        *,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(dict(parameters), lambda named: make(list(named.items())), pass_params_dict=True)  # type: ignore[arg-type]
        self.max_grad_norm = max_grad_norm
        self.grad_norm: float | None = None
        self._is_wrapping_checked = False

    def step(self, closure: Any = None) -> None:
        if not self._is_wrapping_checked:
            _refuse_clipping_that_does_nothing(self.params.values())
            self._is_wrapping_checked = True
        if self.max_grad_norm is not None:
            gradients = [p.grad for p in self.params.values() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if hasattr(norm, "full_tensor"):
                norm = norm.full_tensor()
            torch.nn.utils.clip_grads_with_norm_(self.params.values(), self.max_grad_norm, norm)
            self.grad_norm = float(norm)
        super().step(closure)

    def init_state(self, sparse_grad_parameter_names: set[str] | None = None) -> None:
        """Nothing to do: the state exists. TorchRec's would step with zero gradients, and decay the weights."""


def build_optimizer(
    model: nn.Module,
    *,
    muon: Mapping[str, Any] | None,
    adamw: Mapping[str, Any],
    matrices: Mapping[str, Any] | None = None,
    dense_tables: Mapping[str, Any] | None = None,
    overrides: Overrides = (),
    max_grad_norm: float | None = None,
) -> JoinedOptimizer:
    """One optimizer for a model: fused tables, Muon (or AdamW) on the tower's matrices, AdamW on the rest.

    A real `CombinedOptimizer`: TorchRec's train pipelines, schedulers and DCP take it as it is. Every rank must
    call it.

    Args:
        model: sharded, its tables with an optimizer in the backward pass; or any module without TorchRec's tables,
            plain, under DDP or under FSDP2.
        muon: arguments of `DistributedMuon` for the matrices; None for AdamW there.
        adamw: arguments of `torch.optim.AdamW` for everything else.
        matrices: with ``muon=None``, arguments of the AdamW that updates the matrices.
        dense_tables: arguments of TorchRec's `RowWiseAdagrad` for ``data_parallel`` tables, whose copies DDP keeps
            equal and which no backward pass updates; needed where there are any.
        overrides: ordered ``(pattern, "muon" | "muon_whole" | "adamw")``, or a `Role` with blocks of its own in place
            of the name; the first that matches a name wins.
        max_grad_norm: of what ``adamw`` updates, not of ``matrices``; see `DenseOptimizer`.

    Raises:
        ValueError: a pattern that matches nothing or a table, neither or both of ``muon`` and ``matrices``, arguments
            that the optimizer does not take, or a table that is not sharded, that nothing trains, or that is trained by
            an optimizer that nobody chose.
    """
    if (muon is None) == (matrices is None):
        raise ValueError(
            "give the matrices one optimizer: either muon=dict(lr=...) or muon=None, matrices=dict(lr=...)"
        )
    _check_settings(DistributedMuon, muon=muon)
    _check_settings(torch.optim.AdamW, adamw=adamw, matrices=matrices)
    _check_settings(RowWiseAdagrad, dense_tables=dense_tables)
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}; use more than 0, or None to leave the gradients alone")
    replicated = _check_tables_are_trained(model, with_dense_tables=dense_tables is not None)
    if dense_tables is not None and not replicated:
        raise ValueError(
            "dense_tables was given, but no table is data_parallel; leave it out: fused tables train by the optimizer "
            "that apply_optimizer_in_backward or fused_params gave them"
        )
    routing = explain(model, overrides=overrides, adjust_lr_fn=(muon or {}).get("adjust_lr_fn"))
    named = model.named_parameters() if _is_sharded(model) else _unwrapped(model).named_parameters()
    dense = dict(in_backward_optimizer_filter(named))
    twice = [a.name for a in routing if a.optimizer != "sparse" and (a.name not in dense or a.name in replicated)]
    if twice:
        raise ValueError(
            f"an override gives {twice} to a dense optimizer, but that of their table trains them already; write "
            "patterns that match no table"
        )
    idle = [a.name for a in routing if a.optimizer == "sparse" and a.name in dense and a.name not in replicated]
    if idle:
        raise ValueError(f"{idle} would be trained by nothing, being no tables; give them to 'muon' or 'adamw'")
    routed = {where: {a.name: dense[a.name] for a in routing if a.optimizer == where} for where in ("muon", "adamw")}
    splits = {a.name: a.split for a in routing if a.split is not None}

    parts: dict[str, KeyedOptimizer] = {}
    if isinstance(model, DistributedModelParallel):
        parts["tables"] = table_optimizer(model)
    if replicated:
        copies = {name: dense[name] for name in replicated}
        parts["dense_tables"] = DenseOptimizer(copies, lambda named: _rowwise_adagrad(named, **(dense_tables or {})))
    if routed["muon"] and muon is not None:
        parts["muon"] = DenseOptimizer(routed["muon"], lambda named: DistributedMuon(named, splits=splits, **muon))
    elif routed["muon"]:
        # The table that is printed must say what happens: these matrices have an AdamW, with rates of their own.
        routing = Routing(
            dataclasses.replace(
                a, optimizer="adamw", split=None, lr_scales=(), reason=f"{a.reason}; in the group of matrices"
            )
            if a.optimizer == "muon"
            else a
            for a in routing
        )
        parts["matrices"] = DenseOptimizer(routed["muon"], lambda named: _adamw(named, **(matrices or {})))
    if routed["adamw"]:
        parts["adamw"] = DenseOptimizer(
            routed["adamw"], lambda named: _adamw(named, **adamw), max_grad_norm=max_grad_norm
        )
    return JoinedOptimizer(parts, routing)


def explain(
    model: nn.Module | JoinedOptimizer, *, overrides: Overrides = (), adjust_lr_fn: str | None = None
) -> Routing:
    """Which optimizer updates each trainable parameter, where it lies, in which blocks, at which scale of the rate, and
    why; ``print`` shows it as a table.

    Args:
        model: any module, sharded or not yet (a dry run, which changes nothing), or an optimizer of `build_optimizer`.
            Every rank must call it with a sharded model.
        overrides: as in `build_optimizer`.
        adjust_lr_fn: as in `DistributedMuon`, for the scales.
    """
    if isinstance(model, JoinedOptimizer):
        return model.routing
    inner = _unwrapped(model)
    routing = param_groups(inner, rules=role_rules(inner), overrides=overrides)
    # A rank sees its own rows of a table under the table's name.
    whole = {name: tuple(value.size()) for name, value in model.state_dict().items()} if _is_sharded(model) else {}
    placements = _placements(model, routing)
    return Routing(
        dataclasses.replace(
            assignment,
            shape=whole.get(assignment.name, assignment.shape)
            if assignment.optimizer == "sparse"
            else assignment.shape,
            placement=placements[assignment.name],
        ).with_lr_scales(adjust_lr_fn)
        for assignment in routing
    )


def _check_settings(kind: type[torch.optim.Optimizer], **settings: Mapping[str, Any] | None) -> None:
    """Refuse what is not a dictionary of arguments that ``kind`` takes; parameters and splits are ours to give."""
    known = set(inspect.signature(kind).parameters) - {"params", "splits", "settings", "options"}
    if kind is DistributedMuon:
        known |= set(inspect.signature(Muon).parameters) - {"params", "splits"}
    for name, given in settings.items():
        if given is None and name != "adamw":
            continue
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} is {given!r}; give {kind.__name__}'s arguments as {name}=dict(lr=...)")
        for key in given:
            if key not in known:
                advice = f"it takes {', '.join(sorted(known))}"
                if key == "splits" and kind is DistributedMuon:
                    advice = "give blocks by overrides=[(pattern, Role('muon', reason, Split(...)))]"
                raise ValueError(f"{name} has {key!r}, which {kind.__name__} is not given here; {advice}")


def _is_sharded(model: nn.Module) -> bool:
    return isinstance(model, DistributedModelParallel)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, whose names of parameters stay the same under every wrapper."""
    if isinstance(model, DistributedModelParallel | DistributedDataParallel):
        return model.module
    return model


def _placements(model: nn.Module, routing: Routing) -> dict[str, str]:
    """Where each parameter lies, by name; empty for a model that is not wrapped by anything yet."""
    tables = {}
    for path, module in _unwrapped(model).named_modules():
        for table, plan in (getattr(module, "module_sharding_plan", None) or {}).items():
            tables[path, table] = f"{plan.sharding_type}, {plan.compute_kernel} kernel"
    is_wrapped = isinstance(model, DistributedModelParallel | DistributedDataParallel)
    params = dict(_unwrapped(model).named_parameters())
    texts = {}
    for name in (a.name for a in routing):
        path, _, table = name.removesuffix(".weight").rpartition(".")
        param = params[name]
        if (path.rpartition(".")[0], table) in tables:
            texts[name] = tables[path.rpartition(".")[0], table]
        elif isinstance(param, DTensor):
            texts[name] = ", ".join(
                f"{f'Shard({place.dim})' if isinstance(place, Shard) else type(place).__name__} over {size}"
                for place, size in zip(param.placements, param.device_mesh.shape, strict=True)
            )
        else:
            texts[name] = f"replicated on {dist.get_world_size()}" if is_wrapped else ""
    return texts


def _check_tables_are_trained(model: nn.Module, *, with_dense_tables: bool) -> list[str]:
    """Refuse tables that nothing would train, or an optimizer that nobody chose.

    Returns:
        Names of the parameters of data-parallel tables, which a dense optimizer has to train.
    """
    if not _is_sharded(model):
        tables = [a.name for a in param_groups(_unwrapped(model), rules=role_rules(model)) if a.optimizer == "sparse"]
        if tables:
            raise ValueError(
                f"{tables} are tables that TorchRec has not sharded, or not through DistributedModelParallel; give "
                "them an optimizer by apply_optimizer_in_backward and shard the model by DistributedModelParallel first"
            )
        return []
    replicated = {
        table: f"{path}.{'embedding_bags' if hasattr(module, 'embedding_bags') else 'embeddings'}.{table}.weight"
        for path, module in _unwrapped(model).named_modules()
        if isinstance(module, ShardedEmbeddingModule)
        for table, plan in (getattr(module, "module_sharding_plan", None) or {}).items()
        if plan.sharding_type == ShardingType.DATA_PARALLEL.value
    }
    for table in fused_tables(model):
        if table.optimizer == NOT_FUSED and not (with_dense_tables and table.name in replicated):
            raise ValueError(
                f"table {table.name!r} has a dense kernel, which the backward pass does not train, and Muon and AdamW "
                "are not for tables; give the planner ParameterConstraints(sharding_types=['row_wise', 'table_wise', "
                "'column_wise'], compute_kernels=['fused']) for it"
                + (", or give build_optimizer dense_tables=dict(lr=...)" if table.name in replicated else "")
            )
        if table.optimizer == NOT_ASKED:
            raise ValueError(
                f"table {table.name!r} was sharded without an optimizer, so FBGEMM would train it by its default, SGD "
                f"at {table.lr:g}; call apply_optimizer_in_backward on it before DistributedModelParallel, or give the "
                "sharder fused_params with 'optimizer' and 'learning_rate'"
            )
    return list(replicated.values())


def _refuse_clipping_that_does_nothing(parameters: Any) -> None:
    """Look for TorchRec's `GradientClippingOptimizer` among the callers of a step.

    What wraps an optimizer reads no more of it than any other wrapper does, and leaves no trace in it: that it is in
    the middle of its own step is the one thing that tells.
    """
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return
    frame = sys._getframe(1)
    while frame is not None:
        wrapper = frame.f_locals.get("self")
        if isinstance(wrapper, GradientClippingOptimizer):
            # It reads .grad of the local tensors, which FSDP2 leaves empty.
            if wrapper._clipping is GradientClipping.NORM and not wrapper._sharded_params:
                raise ValueError(
                    "GradientClippingOptimizer clips nothing under FSDP2 unless it is given enable_global_grad_clip="
                    "True and param_to_pgs; use build_optimizer(..., max_grad_norm=...) instead"
                )
        frame = frame.f_back  # type: ignore[assignment]


def _adamw(named: list[tuple[str, torch.Tensor]], **settings: Any) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW([p for _, p in named], **settings)
    group = optimizer.param_groups[0]
    # State exists from construction: DCP gathers keys collectively and loads in place.
    for parameter in group["params"]:
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0, device=parameter.device if group["fused"] or group["capturable"] else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
            **({"max_exp_avg_sq": torch.zeros_like(parameter)} if group["amsgrad"] else {}),
        }
    return optimizer


def _rowwise_adagrad(named: list[tuple[str, torch.Tensor]], **settings: Any) -> torch.optim.Optimizer:
    return RowWiseAdagrad([p for _, p in named], **settings)
