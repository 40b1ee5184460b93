"""One optimizer for a TorchRec model: tables fused into the backward pass, matrices by Muon, the rest by AdamW."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.batched_embedding_kernel import (
    BaseBatchedEmbedding,
    BaseBatchedEmbeddingBag,
    BatchedFusedEmbedding,
    BatchedFusedEmbeddingBag,
)
from torchrec.distributed.embedding_types import ShardedEmbeddingModule, ShardedEmbeddingTable
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import optimizers
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from muonrec.embeddings.rowwise_adam import RowwiseAdam, RowwiseAdamTables
from muonrec.embeddings.tables import SparseOptimizer, TableConfig
from muonrec.optim import Assignment, DistributedMuon, Role, param_groups

logger = logging.getLogger(__name__)

# What each name asks of FBGEMM: the class TorchRec translates, and the kernel that must come of it. TorchRec's own
# classes only carry settings, whatever FBGEMM calls them.
_FUSED: dict[SparseOptimizer, tuple[type[torch.optim.Optimizer], EmbOptimType]] = {
    "rowwise_adagrad": (RowWiseAdagrad, EmbOptimType.EXACT_ROWWISE_ADAGRAD),
    "adagrad": (optimizers.Adagrad, EmbOptimType.EXACT_ADAGRAD),
    "sgd": (optimizers.SGD, EmbOptimType.EXACT_SGD),
    "partial_rowwise_adam": (optimizers.PartialRowWiseAdam, EmbOptimType.PARTIAL_ROWWISE_ADAM),
    "adam": (optimizers.Adam, EmbOptimType.ADAM),
}
_ADAM = (EmbOptimType.PARTIAL_ROWWISE_ADAM, EmbOptimType.ADAM)
# On a CPU the rows are in the only memory there is.
_MEMORY = {EmbeddingLocation.MANAGED: "uvm", EmbeddingLocation.MANAGED_CACHING: "uvm_caching"}
_CHECKED = ("lr", "eps", "betas", "weight_decay", "weight_decay_mode", "max_gradient", "data_type", "memory")
_DECAY = {"l2": WeightDecayMode.L2, "decoupled": WeightDecayMode.DECOUPLE}


def fuse_optimizers(model: nn.Module, tables: Mapping[str, TableConfig]) -> None:
    """Attach to each table of an unsharded model the optimizer that FBGEMM shall run in its backward pass.

    Raises:
        ValueError: a table without settings (FBGEMM would train it by SGD at 0.01), settings without a table, or a
            table that has an optimizer already.
    """
    parameters = dict(_table_parameters(model))
    missing, unknown = sorted(parameters.keys() - tables.keys()), sorted(tables.keys() - parameters.keys())
    if missing or unknown:
        raise ValueError(
            f"tables of the model: {sorted(parameters)}; without settings: {missing}; settings for no table: {unknown}"
            "; give every table an entry under 'tables', with its optimizer and lr"
        )
    for name, parameter in parameters.items():
        if hasattr(parameter, "_optimizer_classes"):
            raise ValueError(f"table {name!r} has an optimizer in its backward pass already; set it in one place")
        # The one way in: the sharder's fused_params would be a second, and which of the two wins is easily mistaken.
        _apply_optimizer_in_backward(_FUSED[tables[name].optimizer][0], [parameter], _fbgemm_settings(tables[name]))


def _fbgemm_settings(table: TableConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {"lr": table.lr}
    if table.optimizer != "sgd":
        settings["eps"] = table.eps
    if table.is_adam:
        settings |= {"beta1": table.betas[0], "beta2": table.betas[1], "weight_decay": table.weight_decay}
    elif table.weight_decay:
        # Without the mode FBGEMM takes the decay and ignores it.
        settings |= {"weight_decay": table.weight_decay, "weight_decay_mode": _DECAY[table.weight_decay_mode]}
    if table.max_gradient is not None:
        settings |= {"gradient_clipping": True, "max_gradient": table.max_gradient}
    return settings


@dataclasses.dataclass(frozen=True, order=True)
class FusedTable:
    """What was found to train one table; ``optimizer`` is FBGEMM's name of it, or `NOT_FUSED` or `NOT_ASKED`.

    Settings that the optimizer does not have stand at their defaults.
    """

    name: str
    optimizer: str
    lr: float = 0.0
    eps: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)
    weight_decay: float = 0.0
    weight_decay_mode: str = "none"
    max_gradient: float = math.inf
    data_type: str = "fp32"
    memory: str = "hbm"
    by: str = "FBGEMM, fused into the backward pass"

    def __str__(self) -> str:
        settings = [f"lr {self.lr:g}"]
        settings += [f"eps {self.eps:g}"] * bool(self.eps)
        settings += [f"betas {self.betas[0]:g} and {self.betas[1]:g}"] * any(self.betas)
        settings += [f"{self.weight_decay_mode} weight decay {self.weight_decay:g}"] * bool(self.weight_decay)
        settings += [f"gradients clamped to {self.max_gradient:g}"] * math.isfinite(self.max_gradient)
        settings += [f"{self.data_type} rows"] * (self.data_type != "fp32")
        settings += [f"memory {self.memory}"] * (self.memory != "hbm")
        return f"{self.name}: {self.optimizer} by {self.by}; {', '.join(settings)}"


NOT_FUSED, NOT_ASKED = "no fused optimizer", "the default optimizer"


def fused_tables(model: nn.Module) -> list[FusedTable]:
    """Read back from the kernels of a sharded model what trains each of its tables; every rank must call it.

    Returns:
        The same on every rank, by name: one entry for each table that any rank holds rows of, more if ranks differ.
    """
    mine = [
        _found(table, kernel.emb_module) for _, kernel in _kernels(model) for table in kernel.config.embedding_tables
    ]
    everyone = [mine]
    if dist.is_initialized():
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
    return sorted(set().union(*everyone))


def _found(table: ShardedEmbeddingTable, table_batch: Any) -> FusedTable:
    if not hasattr(table_batch, "optimizer"):
        return FusedTable(table.name, NOT_FUSED)
    lr = float(table_batch.get_learning_rate())
    if "optimizer" not in (table.fused_params or {}):
        return FusedTable(table.name, NOT_ASKED, lr)
    kind, args = table_batch.optimizer, table_batch.optimizer_args
    mode, on_cpu = "none", table_batch.use_cpu
    if args.weight_decay and kind in _ADAM:
        mode = "decoupled"
    elif args.weight_decay and kind is EmbOptimType.EXACT_ROWWISE_ADAGRAD and (table_batch.is_nobag or not on_cpu):
        # Pooling on a CPU, FBGEMM 1.8 takes another road, which ignores the decay.
        mode = next((name for name, value in _DECAY.items() if value == args.weight_decay_mode), "none")
    found = FusedTable(
        name=table.name,
        optimizer=kind.name,
        lr=lr,
        eps=0.0 if kind is EmbOptimType.EXACT_SGD else args.eps,
        betas=(args.beta1, args.beta2) if kind in _ADAM else (0.0, 0.0),
        weight_decay=0.0 if mode == "none" else args.weight_decay,
        weight_decay_mode=mode,
        max_gradient=args.max_gradient if args.gradient_clipping else math.inf,
    )
    if isinstance(table_batch, RowwiseAdamTables):
        return dataclasses.replace(found, by="muonrec, on a dense kernel, after the backward pass")
    location = table_batch.embedding_specs[table_batch.table_names.index(table.name)][2]
    return dataclasses.replace(
        found, data_type=table_batch.weights_precision.value, memory=_MEMORY.get(location, "hbm")
    )


def check_tables(model: DistributedModelParallel, tables: Mapping[str, TableConfig]) -> list[FusedTable]:
    """Prove that each table is trained by the optimizer and the settings asked for; every rank must call it.

    That none is trained a second time, `build_optimizer` sees to.

    Returns:
        What runs for each table, in the order of their names.

    Raises:
        ValueError: names the table, what was asked and what runs; on every rank.
    """
    found = fused_tables(model)
    if [table.name for table in found] != sorted(tables):
        raise ValueError(
            f"settings are for tables {sorted(tables)}, but the ranks hold {[table.name for table in found]}; every "
            "table must be on some rank, and run the same optimizer on each rank that has rows of it"
        )
    for table in found:
        asked = _asked(table, tables[table.name])
        if table.optimizer != asked.optimizer:
            raise ValueError(f"table {table.name!r} asks for {asked.optimizer}, but {table.optimizer} runs")
        for setting in _CHECKED:
            want, have = getattr(asked, setting), getattr(table, setting)
            # FBGEMM keeps some of them in float32.
            if not (math.isclose(want, have, rel_tol=1e-6) if isinstance(want, float) else want == have):
                raise ValueError(f"table {table.name!r} asks for {setting} {want}, but {have} is in force")
    return found


def _asked(found: FusedTable, table: TableConfig) -> FusedTable:
    return FusedTable(
        name=found.name,
        optimizer=_FUSED[table.optimizer][1].name,
        lr=table.lr,
        eps=0.0 if table.optimizer == "sgd" else table.eps,
        betas=table.betas if table.is_adam else (0.0, 0.0),
        weight_decay=table.weight_decay,
        weight_decay_mode=table.weight_decay_mode if table.weight_decay else "none",
        max_gradient=math.inf if table.max_gradient is None else table.max_gradient,
        data_type=table.data_type or found.data_type,
        memory=table.memory,
    )


class JoinedOptimizer(CombinedOptimizer):
    """TorchRec's `CombinedOptimizer` that also knows its parts and the routing it was built from.

    Args:
        parts: keyed optimizers by name: ``tables`` (fused), ``muon`` or ``matrices``, and ``adamw``.
        routing: which parameter went where, and why.
    """

    def __init__(self, parts: Mapping[str, KeyedOptimizer], routing: Sequence[Assignment]) -> None:
        # The fused part keeps TorchRec's own keys, so that existing checkpoints of tables load.
        super().__init__([("" if name == "tables" else name, part) for name, part in parts.items()])
        self.parts = dict(parts)
        self._base_lrs = {name: [float(group["lr"]) for group in part.param_groups] for name, part in parts.items()}
        self.routing = list(routing)

    @property
    def state(self) -> Mapping[torch.Tensor, Any]:
        """State by parameter; a rank has none of the momentum that another rank owns."""
        return {parameter: state for parameter, state in super().state.items() if state}

    # So that a `torch.amp.GradScaler` hands its scale over, before it calls `step`.
    _step_supports_amp_scaling = True

    def _refuse_scale(self, _: object) -> None:
        raise ValueError(
            "a GradScaler scales the loss, and the fused tables have taken the scaled gradients in the backward pass; "
            "train in bf16 without a scaler: torch.autocast(device_type, torch.bfloat16) around the forward pass"
        )

    grad_scale = property(fset=_refuse_scale)

    def scale_lr(self, part: str, factor: float) -> None:
        """Set a part's rates to ``factor`` times those it was built with.

        Those of the tables reach FBGEMM with the next `zero_grad` or `step`.
        """
        for group, lr in zip(self.parts[part].param_groups, self._base_lrs[part], strict=True):
            group["lr"] = factor * lr  # type: ignore[index]

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradients of the parameters AdamW updates, before clipping."""
        part = self.parts.get("adamw")
        return part.grad_norm if isinstance(part, DenseOptimizer) else None


class AccumulatedStep:
    """What a train pipeline takes for its optimizer: gradients are cleared before the first and used after the last
    micro-batch of a step.

    DDP reduces the gradients with the last micro-batch, if `shard_model` was told that there are several. FSDP2 reduces
    them with each, since it holds whole gradients until it does.
    """

    def __init__(self, optimizer: JoinedOptimizer, model: DistributedModelParallel) -> None:
        self._optimizer = optimizer
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

    def step(self, closure: Any = None) -> None:
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
    model: DistributedModelParallel,
    *,
    muon: Mapping[str, Any] | None,
    adamw: Mapping[str, Any],
    matrices: Mapping[str, Any] | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    max_grad_norm: float | None = None,
) -> JoinedOptimizer:
    """One optimizer for a sharded model: fused tables, Muon (or AdamW) on the tower's matrices, AdamW on the rest.

    A real `CombinedOptimizer`: TorchRec's train pipelines, schedulers and DCP take it as it is. Every rank must
    call it.

    Args:
        model: sharded, its tables with an optimizer in the backward pass.
        muon: arguments of `DistributedMuon` for the matrices; None for AdamW there.
        adamw: arguments of `torch.optim.AdamW` for everything else.
        matrices: with ``muon=None``, arguments of the AdamW that updates the matrices.
        overrides: ordered ``(pattern, "muon" | "adamw")``; the first that matches a name wins.
        max_grad_norm: of AdamW's parameters, see `DenseOptimizer`.

    Raises:
        ValueError: a pattern that matches nothing or a table, neither or both of ``muon`` and ``matrices``, or a table
            that the backward pass does not train, or trains by an optimizer that nobody chose.
    """
    if (muon is None) == (matrices is None):
        raise ValueError(
            "give the matrices one optimizer: either muon=dict(lr=...) or muon=None, matrices=dict(lr=...)"
        )
    for table in fused_tables(model):
        if table.optimizer == NOT_FUSED:
            raise ValueError(
                f"table {table.name!r} has a dense kernel, which the backward pass does not train, and Muon and AdamW "
                "are not for tables; give the planner ParameterConstraints(sharding_types=['row_wise', 'table_wise', "
                "'column_wise'], compute_kernels=['fused']) for it"
            )
        if table.optimizer == NOT_ASKED:
            raise ValueError(
                f"table {table.name!r} was sharded without an optimizer, so FBGEMM would train it by its default, SGD "
                f"at {table.lr:g}; call apply_optimizer_in_backward on it before DistributedModelParallel, or give the "
                "sharder fused_params with 'optimizer' and 'learning_rate'"
            )
    routing = explain(model, overrides=overrides)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    twice = [a.name for a in routing if a.optimizer != "sparse" and a.name not in dense]
    if twice:
        raise ValueError(
            f"an override gives {twice} to a dense optimizer, but that of their table trains them already; write "
            "patterns that match no table"
        )
    routed = {where: {a.name: dense[a.name] for a in routing if a.optimizer == where} for where in ("muon", "adamw")}
    splits = {a.name: a.split for a in routing if a.split is not None}

    parts: dict[str, KeyedOptimizer] = {"tables": _table_optimizer(model)}
    if routed["muon"] and muon is not None:
        parts["muon"] = DenseOptimizer(routed["muon"], lambda named: DistributedMuon(named, splits=splits, **muon))
    elif routed["muon"]:
        # The table that is printed must say what happens: these matrices have an AdamW, with rates of their own.
        routing = [
            dataclasses.replace(a, optimizer="adamw", split=None, reason=f"{a.reason}; in the group of matrices")
            if a.optimizer == "muon"
            else a
            for a in routing
        ]
        parts["matrices"] = DenseOptimizer(routed["muon"], lambda named: _adamw(named, **(matrices or {})))
    if routed["adamw"]:
        parts["adamw"] = DenseOptimizer(
            routed["adamw"], lambda named: _adamw(named, **adamw), max_grad_norm=max_grad_norm
        )
    return JoinedOptimizer(parts, routing)


def explain(
    model: DistributedModelParallel | JoinedOptimizer, *, overrides: Sequence[tuple[str, str]] = ()
) -> list[Assignment]:
    """Which optimizer updates each trainable parameter, in which blocks and why; `format_routing` prints it.

    Args:
        model: a sharded model (a dry run), or an optimizer that `build_optimizer` made.
        overrides: as in `build_optimizer`.
    """
    if isinstance(model, JoinedOptimizer):
        return model.routing
    whole = {name: tuple(value.size()) for name, value in model.state_dict().items()}
    return [
        # A rank sees its own rows of a table under the table's name.
        dataclasses.replace(assignment, shape=whole[assignment.name])
        if assignment.optimizer == "sparse"
        else assignment
        for assignment in param_groups(model.module, rules=(table_rule(model.module),), overrides=overrides)
    ]


def table_rule(model: nn.Module) -> Callable[[nn.Module, str], Role | None]:
    """Role rule for `muonrec.optim.param_groups`: the parameters of ``model``'s tables belong to the sparse optimizer.

    Told by identity: a table of any kernel is below a sharded or unsharded embedding collection, whatever its shape.
    """
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, ShardedEmbeddingModule | EmbeddingCollection | EmbeddingBagCollection)
        for parameter in module.parameters()
    }

    def rule(module: nn.Module, parameter_name: str) -> Role | None:
        if id(getattr(module, parameter_name)) in tables:
            return Role("sparse", "rows of a table, updated by the optimizer of the table")
        return None

    return rule


def _adamw(named: list[tuple[str, torch.Tensor]], **settings: Any) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW([p for _, p in named], **settings)
    # State exists from construction: DCP gathers keys collectively and loads in place.
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _table_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for module in model.modules():
        if isinstance(module, EmbeddingCollection):
            yield from ((name, table.weight) for name, table in module.embeddings.items())
        elif isinstance(module, EmbeddingBagCollection):
            yield from ((name, table.weight) for name, table in module.embedding_bags.items())


def _table_optimizer(model: DistributedModelParallel) -> KeyedOptimizer:
    """What TorchRec has fused, our row-wise Adam beside it, and the step count of every Adam in its state."""
    parts: list[tuple[str, KeyedOptimizer]] = [("", model.fused_optimizer)]
    for path, kernel in _kernels(model.module):
        table_batch = kernel.emb_module
        if isinstance(table_batch, RowwiseAdamTables):
            optimizer: KeyedOptimizer = RowwiseAdam(kernel.config, table_batch, kernel._pg)
            parts.append((path, optimizer))
        elif isinstance(kernel, BatchedFusedEmbedding | BatchedFusedEmbeddingBag) and table_batch.optimizer in _ADAM:
            optimizer = kernel.fused_optimizer
        else:
            continue
        for key, weight in optimizer.params.items():
            # TorchRec leaves it out, and a resumed Adam would correct its moments as if they were new.
            optimizer.state[weight][f"{key.split('.')[-2]}.iter"] = table_batch.iter
    return CombinedOptimizer(parts)


def _kernels(model: nn.Module) -> Iterator[tuple[str, BaseBatchedEmbedding | BaseBatchedEmbeddingBag]]:
    for path, module in model.named_modules():
        # Managed collisions have their lookups in the collection below them.
        if isinstance(module, ShardedEmbeddingModule) and hasattr(module, "_lookups"):
            for lookup in module._lookups:  # data-parallel ones are wrapped by DDP
                yield from (
                    (path, part)
                    for part in lookup.modules()
                    if isinstance(part, BaseBatchedEmbedding | BaseBatchedEmbeddingBag)
                )
