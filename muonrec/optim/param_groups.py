"""Decides which optimizer updates which parameter, by the role of the module that holds it, and says why."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from muonrec.optim.update import Split, matrix_shape

OptimizerName = Literal["sparse", "muon", "adamw"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("sparse", "muon", "adamw")

# A projection inside a tower widens by 8 at most (HSTU's uvqk); a layer that widens by 16 scores a vocabulary.
HEAD_MIN_EXPANSION = 16
# Beside a table with as many rows, less is evidence enough; 4 is the usual feed-forward layer, which may by chance be
# as wide as the table of positions is long.
HEAD_MIN_EXPANSION_LIKE_A_TABLE = 4


@dataclass(frozen=True)
class Role:
    """What one parameter is to its module.

    Attributes:
        optimizer: who updates it.
        reason: a short phrase for people.
        split: its blocks, where it stands for several matrices.
    """

    optimizer: OptimizerName
    reason: str
    split: Split | None = None


@dataclass(frozen=True)
class Assignment:
    """One trainable parameter and its optimizer.

    Attributes:
        name: as ``model.named_parameters()`` has it.
        shape: the whole shape, also where the parameter is sharded.
        optimizer: who updates it.
        reason: why, in a short phrase.
        split: the blocks for Muon, or None.
        aliases: other names of the same tied parameter.
    """

    name: str
    shape: tuple[int, ...]
    optimizer: OptimizerName
    reason: str
    split: Split | None = None
    aliases: tuple[str, ...] = ()


RoleRule = Callable[[nn.Module, str], Role | None]


def param_groups(
    model: nn.Module, *, rules: Sequence[RoleRule] = (), overrides: Iterable[tuple[str, str]] = ()
) -> list[Assignment]:
    """Assign every trainable parameter of a model exactly once, in the order of ``model.named_parameters()``.

    A tied parameter has one assignment for all its names; it goes to Muon only where every one of its roles does.

    Args:
        model: whatever holds the parameters; wrapped and sharded models too.
        rules: asked in order, before the rules for torch's modules, with the module and its own name of the parameter
            (``"weight"``); the first that returns a role decides.
        overrides: ``(pattern, optimizer)`` in order; the first pattern found in a name (``re.search``) decides. Blocks
            found by role stay.

    Raises:
        ValueError: a pattern never decides anything, an optimizer is not known, or Muon is given what is not a matrix.
    """
    table_sizes = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    holders = _holders(model)
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)

    assignments = []
    for param in names:
        first, *aliases = names[param]
        # Wrappers may show parameters that none of their modules holds; rules see those from the top.
        held_by = holders.get(param, [(model, first)])
        role = _common_role([_role(module, name, param, rules, table_sizes) for module, name in held_by])
        assignments.append(
            Assignment(first, tuple(param.shape), role.optimizer, role.reason, role.split, tuple(aliases))
        )
    assignments = _override(assignments, list(overrides))

    for assignment in assignments:
        if assignment.optimizer == "muon":
            shape = matrix_shape(assignment.name, assignment.shape)
            if assignment.split is not None:
                assignment.split.check(assignment.name, shape)
    return assignments


def format_routing(assignments: Sequence[Assignment]) -> str:
    """The assignments as a table of plain text: name, shape, optimizer, blocks, reason."""
    header = ("name", "shape", "optimizer", "blocks", "reason")
    rows = [
        (
            " = ".join((a.name, *a.aliases)),
            " x ".join(map(str, a.shape)) or "scalar",
            a.optimizer,
            _format_split(a.split) if a.optimizer == "muon" else "",
            a.reason,
        )
        for a in assignments
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _holders(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    """The modules that hold each parameter, with their own name for it."""
    holders: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(param, []).append((module, name))
    return holders


def _common_role(roles: list[Role]) -> Role:
    if len(roles) == 1:
        return roles[0]
    # A table that is also the output head is a table: its rows are looked up. So Muon comes last.
    role = min(roles, key=lambda role: ("sparse", "adamw", "muon").index(role.optimizer))
    reasons = list(dict.fromkeys([role.reason, *(other.reason for other in roles)]))
    return Role(role.optimizer, "tied: " + ", also ".join(reasons), role.split)


def _role(module: nn.Module, name: str, param: Tensor, rules: Sequence[RoleRule], table_sizes: set[int]) -> Role:
    for rule in rules:
        role = rule(module, name)
        if role is not None:
            if role.optimizer not in OPTIMIZERS:
                raise ValueError(f"a rule gave '{name}' to {role.optimizer!r}; use one of {', '.join(OPTIMIZERS)}")
            return role
    return _torch_role(module, name, param, table_sizes)


def _torch_role(module: nn.Module, name: str, param: Tensor, table_sizes: set[int]) -> Role:
    """The role of a parameter in one of torch's own modules, or by its shape in any other."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Role("adamw", "rows of a lookup table")
    # Norms outside of torch are known by the name of their class, which is as close to a role as it gets.
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | _NormBase) or type(module).__name__.endswith("Norm"):
        return Role("adamw", "gain or bias of a norm")
    if "bias" in name.split("_"):
        return Role("adamw", "bias")
    if sum(size > 1 for size in param.shape) < 2 or param.ndim < 2:
        return Role("adamw", "scalar or vector" if param.ndim < 2 else "a single row or column")

    if isinstance(module, nn.Linear):
        return _linear_role(module, table_sizes)
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return Role("muon", "q, k and v of attention", Split.even(3, param.shape))
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _recurrent_role(module, name, param)
    if isinstance(module, _ConvNd):
        return _convolution_role(module, param)
    if param.ndim > 2:
        return Role("adamw", f"{param.ndim} dimensions and not a known kernel")
    return Role("muon", "matrix")


def _linear_role(module: nn.Linear, table_sizes: set[int]) -> Role:
    expansion = module.out_features / module.in_features
    if expansion >= HEAD_MIN_EXPANSION:
        return Role("adamw", f"output head: widens {expansion:.0f} times")
    if expansion > HEAD_MIN_EXPANSION_LIKE_A_TABLE and module.out_features in table_sizes:
        return Role("adamw", "output head: a row per row of a table")
    return Role("muon", "linear layer")


def _recurrent_role(module: nn.RNNBase | nn.RNNCellBase, name: str, param: Tensor) -> Role:
    num_gates = 1
    if isinstance(module, nn.GRU | nn.GRUCell):
        num_gates = 3
    elif isinstance(module, nn.LSTM | nn.LSTMCell):
        num_gates = 4
    if num_gates == 1 or name.startswith("weight_hr"):  # an LSTM's projection of the hidden state has no gates
        return Role("muon", "recurrent layer")
    if param.shape[0] == num_gates:
        return Role("adamw", f"{num_gates} gates of a single row each")
    return Role("muon", f"{num_gates} gates of a recurrent layer", Split.even(num_gates, param.shape))


def _convolution_role(module: _ConvNd, param: Tensor) -> Role:
    if isinstance(module, _ConvTransposeNd):
        # (in, out / groups, k): flattened it would be one matrix per tap laid side by side in the wrong orientation.
        return Role("adamw", "kernel of a transposed convolution")
    rows = param.shape[0] // module.groups
    if rows == 1:
        return Role("adamw", "depthwise kernel: single rows")
    if module.groups > 1:
        return Role("muon", f"convolution in {module.groups} groups", Split.even(module.groups, param.shape))
    return Role("muon", f"convolution as {param.shape[0]} x {math.prod(param.shape[1:])}")


def _override(assignments: list[Assignment], overrides: list[tuple[str, str]]) -> list[Assignment]:
    patterns = [(pattern, re.compile(pattern), optimizer) for pattern, optimizer in overrides]
    deciding: set[int] = set()
    matching: set[int] = set()
    result = []
    for assignment in assignments:
        all_names = (assignment.name, *assignment.aliases)
        matches = [i for i, (_, compiled, _) in enumerate(patterns) if any(map(compiled.search, all_names))]
        matching.update(matches)
        if not matches:
            result.append(assignment)
            continue
        deciding.add(matches[0])
        pattern, _, optimizer = patterns[matches[0]]
        result.append(_overridden(assignment, pattern, optimizer))

    for i, (pattern, _, _) in enumerate(patterns):
        if i in deciding:
            continue
        if i in matching:
            raise ValueError(f"override {pattern!r} never decides: earlier patterns match all its names; put it first")
        names = [name for a in assignments for name in (a.name, *a.aliases)]
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
        raise ValueError(f"override {pattern!r} matches no parameter; close names are {', '.join(close)}")
    return result


def _overridden(assignment: Assignment, pattern: str, optimizer: str) -> Assignment:
    for known in OPTIMIZERS:
        if optimizer == known:
            return Assignment(
                assignment.name,
                assignment.shape,
                known,
                f"override {pattern!r}",
                assignment.split,
                assignment.aliases,
            )
    raise ValueError(f"override {pattern!r} asks for optimizer {optimizer!r}; use one of {', '.join(OPTIMIZERS)}")


def _format_split(split: Split | None) -> str:
    if split is None:
        return ""
    what = ("rows", "columns")[split.dim]
    if len(set(split.sizes)) == 1:
        return f"{len(split.sizes)} x {split.sizes[0]} {what}"
    return f"{' + '.join(map(str, split.sizes))} {what}"
