"""Decides which optimizer updates which parameter, by the role of the module that holds it, and says why."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from muonrec.optim.update import Split, adjust_lr, matrix_shape, whole

OptimizerName = Literal["sparse", "muon", "adamw"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("sparse", "muon", "adamw")
# What an override may ask for beside an optimizer: Muon on a fused matrix as it stands, gates or q, k and v together.
MUON_WHOLE = "muon_whole"

# A projection inside a tower widens by 8 at most (HSTU's uvqk); a layer that widens by 16, and whose output no other
# layer takes in, scores a vocabulary. (The first layer of a DLRM widens 13 numbers to 512, for the next to take in.)
HEAD_MIN_EXPANSION = 16
# Beside a table with as many rows, less is evidence enough; 4 is the usual feed-forward layer, which may by chance be
# as wide as the table of positions is long.
HEAD_MIN_EXPANSION_LIKE_A_TABLE = 4

# What a bare parameter is called whose rows are looked up: BERT4Rec's positional, HSTU's _position_embeddings_weight,
# _timestamp_embeddings_weight and _action_embedding_table. A projection of them is none.
_TABLE_WORDS = {"pos", "position", "positions", "positional", "timestamp", "timestamps"}
_TABLE_WORDS |= {"emb", "embed", "embedding", "embeddings", "table", "tables"}
_PROJECTION_WORDS = {"proj", "projection", "linear", "kernel"}


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
        placement: where it lies, in a short phrase; empty if nobody said.
        lr_scales: what Muon's rate is multiplied with, for each block; empty if nobody said.
    """

    name: str
    shape: tuple[int, ...]
    optimizer: OptimizerName
    reason: str
    split: Split | None = None
    aliases: tuple[str, ...] = ()
    placement: str = ""
    lr_scales: tuple[float, ...] = ()

    def with_lr_scales(self, adjust_lr_fn: str | None) -> "Assignment":
        """The same, with what ``adjust_lr`` makes of each block's shape; only Muon has any."""
        if self.optimizer != "muon":
            return dataclasses.replace(self, lr_scales=())
        shape = matrix_shape(self.name, self.shape)
        split = self.split or whole(shape)
        scales = [adjust_lr(1.0, adjust_lr_fn, s[::-1] if split.transposed else s) for s in split.shapes(shape)]
        return dataclasses.replace(self, lr_scales=tuple(scales))


class Routing(list[Assignment]):
    """The assignments of a model; as text, the table of `format_routing`."""

    def __str__(self) -> str:
        return format_routing(self)


RoleRule = Callable[[nn.Module, str], Role | None]


def param_groups(
    model: nn.Module, *, rules: Sequence[RoleRule] = (), overrides: Iterable[tuple[str, str | Role]] = ()
) -> Routing:
    """Assign every trainable parameter of a model exactly once, in the order of ``model.named_parameters()``.

    A tied parameter has one assignment for all its names; it goes to Muon only where every one of its roles does.

    Args:
        model: whatever holds the parameters; wrapped and sharded models too.
        rules: asked in order, before the rules for torch's modules, with the module and its own name of the parameter
            (``"weight"``); the first that returns a role decides.
        overrides: ``(pattern, optimizer)`` in order; the first pattern found in a name (``re.search``) decides. Blocks
            found by role stay; ``"muon_whole"`` takes them for one matrix, and a `Role` in place of the optimizer's
            name brings its own.

    Raises:
        ValueError: a pattern never decides anything, an optimizer is not known, or Muon is given what is not a matrix.
    """
    table_sizes = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    widths = _Widths(table_sizes, widths_taken_in(model))
    holders = _holders(model)
    lists = {module: path.rpartition(".")[2] for path, module in model.named_modules() if _is_list(module)}
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)

    assignments = []
    for param in names:
        first, *aliases = names[param]
        # Wrappers may show parameters that none of their modules holds; rules see those from the top.
        held_by = holders.get(param, [(model, first)])
        role = _common_role(
            [_role(module, name, param, rules, widths, label=lists.get(module, name)) for module, name in held_by]
        )
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


@dataclass(frozen=True)
class _Widths:
    """What tells an output head from a hidden layer: rows of the lookup tables, and the widths that layers take in."""

    tables: set[int]
    taken_in: set[int]


def widths_taken_in(model: nn.Module) -> set[int]:
    """The widths that some layer of the model takes in: nothing takes in the scores of an output head."""
    widths = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            widths.add(module.in_features)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            widths.add(module.input_size)
        elif isinstance(module, nn.MultiheadAttention):
            widths.add(module.embed_dim)
    return widths


def format_routing(assignments: Sequence[Assignment], *, fold: bool = True) -> str:
    """The assignments as a table of plain text: name, shape, placement, optimizer, blocks, lr scale, reason.

    Args:
        assignments: as `param_groups` or `muonrec.explain` give them.
        fold: write the layers of a tower that differ in their first number only on one line,
            ``blocks.{0..7}.query.weight``; otherwise each name stands in full, to be searched.
    """
    header = ("name", "shape", "placement", "optimizer", "blocks", "lr scale", "reason")
    rows: list[tuple[str, ...]] = [
        (
            " = ".join((a.name, *a.aliases)),
            " x ".join(map(str, a.shape)) or "scalar",
            a.placement,
            a.optimizer,
            _format_split(a.split) if a.optimizer == "muon" else "",
            _format_scales(a.lr_scales),
            a.reason,
        )
        for a in assignments
    ]
    rows = _folded(rows) if fold else rows
    # Whoever asks without a model in ranks has no placements to read about.
    shown = [i for i in range(len(header)) if i not in (2, 4, 5) or any(row[i] for row in rows)]
    widths = {i: max(len(row[i]) for row in [header, *rows]) for i in shown}
    lines = [header, tuple("-" * widths.get(i, 0) for i in range(len(header))), *rows]
    return "\n".join("  ".join(line[i].ljust(widths[i]) for i in shown).rstrip() for line in lines)


def _folded(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """One row for those that differ in the first number of their name only, where the numbers follow each other."""
    layers: dict[tuple[str, ...], list[int]] = {}
    for name, *others in rows:
        head, number, tail = _at_first_number(name)
        layers.setdefault((head, tail, *others), []).append(number)
    folded = []
    for (head, tail, *others), numbers in layers.items():  # in the order of their first rows
        first, last = numbers[0], numbers[-1]
        if len(numbers) > 1 and numbers == list(range(first, last + 1)):
            folded.append((f"{head}{{{first}..{last}}}{tail}", *others))
        else:
            names = [head if number < 0 else f"{head}{number}{tail}" for number in numbers]
            folded += [(name, *others) for name in names]
    return folded


def _at_first_number(name: str) -> tuple[str, int, str]:
    match = re.search(r"(?<![^.])\d+(?![^.])", name)  # between dots or ends
    # A tied parameter has several names on its line, and a number in each.
    if match is None or " = " in name:
        return name, -1, ""
    return name[: match.start()], int(match.group()), name[match.end() :]


def _format_scales(scales: Sequence[float]) -> str:
    texts = [f"{scale:.3g}" for scale in scales]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


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


def _is_list(module: nn.Module) -> bool:
    """Whether its parameters are named by its own name, and numbered."""
    return isinstance(module, nn.ParameterList | nn.ParameterDict)


def _role(
    module: nn.Module, name: str, param: Tensor, rules: Sequence[RoleRule], widths: "_Widths", *, label: str
) -> Role:
    for rule in rules:
        role = rule(module, name)
        if role is not None:
            if role.optimizer not in OPTIMIZERS:
                raise ValueError(f"a rule gave '{name}' to {role.optimizer!r}; use one of {', '.join(OPTIMIZERS)}")
            return role
    return _torch_role(module, name, param, widths, label)


def _torch_role(module: nn.Module, name: str, param: Tensor, widths: "_Widths", label: str) -> Role:
    """The role of a parameter in one of torch's own modules, or by its shape in any other.

    Args:
        module: that holds it.
        name: under which the module holds it.
        param: itself.
        widths: of the model around it.
        label: its name, or that of the list that numbers it.
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Role("adamw", "rows of a lookup table")
    # Norms outside of torch are known by the name of their class, which is as close to a role as it gets.
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | _NormBase) or type(module).__name__.endswith("Norm"):
        return Role("adamw", "gain or bias of a norm")
    words = set(label.lower().split("_"))
    if words & {"bias", "biases"}:
        return Role("adamw", "bias")
    if sum(size > 1 for size in param.shape) < 2 or param.ndim < 2:
        return Role("adamw", "scalar or vector" if param.ndim < 2 else "a single row or column")

    if isinstance(module, nn.Linear):
        return _linear_role(module, widths)
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return Role("muon", "q, k and v of attention", Split.even(3, param.shape))
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _recurrent_role(module, name, param)
    if isinstance(module, _ConvNd):
        return _convolution_role(module, param)
    if words & _TABLE_WORDS and not words & _PROJECTION_WORDS:
        return Role("adamw", "rows of a table, by its name")
    if param.ndim > 2:
        return Role("adamw", f"{param.ndim} dimensions and not a known kernel")
    return Role("muon", "matrix")


def _linear_role(module: nn.Linear, widths: "_Widths") -> Role:
    expansion = module.out_features / module.in_features
    if module.out_features in widths.taken_in:
        return Role("muon", "linear layer")
    if expansion >= HEAD_MIN_EXPANSION:
        return Role("adamw", f"output head: widens {expansion:.0f} times")
    if expansion > HEAD_MIN_EXPANSION_LIKE_A_TABLE and module.out_features in widths.tables:
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


def _override(assignments: list[Assignment], overrides: list[tuple[str, str | Role]]) -> Routing:
    patterns = [(pattern, _compiled(pattern), optimizer) for pattern, optimizer in map(_pair, overrides)]
    deciding: set[int] = set()
    matching: set[int] = set()
    result = Routing()
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


def _pair(override: object) -> tuple[str, str | Role]:
    if not isinstance(override, str) and isinstance(override, Sequence) and len(override) == 2:
        pattern, optimizer = override
        if isinstance(pattern, str) and isinstance(optimizer, str | Role):
            return pattern, optimizer
    raise ValueError(
        f"overrides holds {override!r}; give a list of pairs such as ('heads', 'adamw'), or a Role for the name"
    )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"override {pattern!r} is not a regular expression: {error}") from None


def _overridden(assignment: Assignment, pattern: str, asked: str | Role) -> Assignment:
    if asked == MUON_WHOLE:
        asked = Role("muon", f"override {pattern!r}: not in blocks", assignment.split and assignment.split.joined())
    role = asked if isinstance(asked, Role) else Role(asked, f"override {pattern!r}", assignment.split)  # type: ignore[arg-type]
    if role.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"override {pattern!r} asks for optimizer {role.optimizer!r}; use one of "
            f"{', '.join((*OPTIMIZERS, MUON_WHOLE))}"
        )
    return dataclasses.replace(assignment, optimizer=role.optimizer, reason=role.reason, split=role.split)


def _format_split(split: Split | None) -> str:
    if split is None:
        return ""
    stored = "stored (in, out)" if split.transposed else ""
    if len(split.sizes) == 1:
        return stored
    what = ("rows", "columns")[split.dim] + (f", {stored}" if stored else "")
    if len(set(split.sizes)) == 1:
        return f"{len(split.sizes)} x {split.sizes[0]} {what}"
    return f"{' + '.join(map(str, split.sizes))} {what}"
