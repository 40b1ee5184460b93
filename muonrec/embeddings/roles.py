"""Role rules for the modules that recommenders are made of: TorchRec's, HSTU's, and what comes with a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet, LowRankMixtureCrossNet, VectorCrossNet
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, EmbeddingCollectionInterface

from muonrec.optim import Role, RoleRule, Split
from muonrec.optim.param_groups import HEAD_MIN_EXPANSION_LIKE_A_TABLE, widths_taken_in

_COLLECTIONS = (ShardedEmbeddingModule, EmbeddingCollectionInterface, EmbeddingBagCollectionInterface)


def role_rules(model: nn.Module) -> tuple[RoleRule, ...]:
    """The rules for `muonrec.optim.param_groups` that know the modules of ``model``, in the order to be asked."""
    return table_rule(model), _known_modules(model), _head_rule(model), _hstu_rule


def table_rule(model: nn.Module) -> Callable[[nn.Module, str], Role | None]:
    """Role rule for `muonrec.optim.param_groups`: the parameters of ``model``'s tables belong to the sparse optimizer.

    Told by identity: a table of any kernel is below a sharded or unsharded embedding collection, whatever its shape.
    """
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _COLLECTIONS)
        for parameter in module.parameters()
    }

    def rule(module: nn.Module, parameter_name: str) -> Role | None:
        if id(getattr(module, parameter_name)) in tables:
            return Role("sparse", "rows of a table, updated by the optimizer of the table")
        return None

    return rule


def _known_modules(model: nn.Module) -> RoleRule:
    """The parameters that a module holds in lists, or below itself, where only the module above knows what they are."""
    roles: dict[tuple[nn.Module, str], Role] = {}
    for path, module in model.named_modules():
        if isinstance(module, CrossNet | LowRankCrossNet | VectorCrossNet | LowRankMixtureCrossNet):
            roles |= _cross_roles(module)
        if type(module).__name__.endswith("Conv1D") and hasattr(module, "nf"):
            roles[module, "weight"] = _transposed_linear_role(module, path.rpartition(".")[2])
        if callable(getattr(module, "get_output_embeddings", None)):
            head = module.get_output_embeddings()
            if isinstance(head, nn.Linear):
                roles[head, "weight"] = Role("adamw", "output head of a transformer")
    return lambda module, parameter_name: roles.get((module, parameter_name))


def _cross_roles(cross: nn.Module) -> dict[tuple[nn.Module, str], Role]:
    """TorchRec's cross layers; their kernels are stored ``(out, in)`` and stand in lists under bare numbers."""
    roles: dict[tuple[nn.Module, str], Role] = {}
    for kind, parameters in cross.named_children():
        if not isinstance(parameters, nn.ParameterList):
            continue  # the gates of a mixture: linear layers
        for name, param in parameters.named_parameters():
            if kind == "bias":
                role = Role("adamw", "bias of a cross layer")
            elif param.ndim > 2:
                # One matrix per expert, stacked: as one matrix they would be orthogonalized across experts.
                role = Role("adamw", f"stack of {param.shape[0]} experts' cross kernels")
            elif min(param.shape) == 1:
                role = Role("adamw", "vector kernel of a cross layer")
            else:
                of_a_pair = ", one of a low-rank pair" if isinstance(cross, LowRankCrossNet) else ""
                role = Role("muon", f"kernel of a cross layer{of_a_pair}")
            roles[parameters, name] = role
    return roles


def _transposed_linear_role(module: nn.Module, name: str) -> Role:
    """GPT-2's linear layer of ``transformers``, which stores ``(in, out)``."""
    assert isinstance(module.weight, Tensor)
    rows, columns = module.weight.shape
    if name == "c_attn" and columns == 3 * rows:
        return Role("muon", "q, k and v of attention", Split(1, (rows,) * 3, transposed=True))
    return Role("muon", "linear layer", Split(1, (columns,), transposed=True))


def _head_rule(model: nn.Module) -> RoleRule:
    """A linear layer with a row per row of a table of TorchRec scores its ids; `param_groups` knows torch's tables."""
    num_rows = {
        config.num_embeddings
        for module in model.modules()
        if isinstance(module, _COLLECTIONS)
        for config in _configs(module)
    } - widths_taken_in(model)

    def rule(module: nn.Module, parameter_name: str) -> Role | None:
        if isinstance(module, nn.Linear) and parameter_name == "weight" and module.out_features in num_rows:
            if module.out_features > HEAD_MIN_EXPANSION_LIKE_A_TABLE * module.in_features:
                return Role("adamw", "output head: a row per row of a table")
        return None

    return rule


def _configs(module: nn.Module) -> list[Any]:
    for name in ("_embedding_configs", "_embedding_bag_configs"):
        if hasattr(module, name):
            return list(getattr(module, name))
    return []


def _hstu_rule(module: nn.Module, parameter_name: str) -> Role | None:
    """HSTU (arXiv 2402.17152) as ``generative_recommenders`` has it: bare parameters, stored ``(in, out)``."""
    num_heads, attention_dim = getattr(module, "_num_heads", None), getattr(module, "_attention_dim", None)
    if num_heads is None or attention_dim is None:
        return None
    param = getattr(module, parameter_name)
    if parameter_name in ("_uvqk_weight", "_uvqk"):
        hidden_dim = getattr(module, "_hidden_dim", getattr(module, "_linear_dim", None))
        if hidden_dim is not None and param.shape[1] == 2 * num_heads * (hidden_dim + attention_dim):
            sizes = (hidden_dim * num_heads,) * 2 + (attention_dim * num_heads,) * 2
            return Role("muon", "u, v, q and k of HSTU", Split(1, sizes, transposed=True))
    if parameter_name == "_output_weight" and param.ndim == 2:
        return Role("muon", "output layer of HSTU", Split(1, (param.shape[1],), transposed=True))
    return None
