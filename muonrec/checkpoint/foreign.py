"""Checkpoints that other people's TorchRec code wrote through DCP, for a run that goes on with muonrec's optimizer."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torchrec.optim.keyed import CombinedOptimizer

from muonrec.checkpoint.contents import TensorPlanner
from muonrec.checkpoint.together import dcp_errors, together
from muonrec.checkpoint.weights import differences

logger = logging.getLogger(__name__)

SHOWN = 6  # names in a warning; `Adopted` has all


class Adopted(NamedTuple):
    """State of an optimizer on this rank after `adopt_checkpoint`: what was found, and what starts anew; sorted."""

    kept: list[str]
    fresh: list[str]


def adopt_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: CombinedOptimizer,
    *,
    model_key: str = "model",
    optimizer_key: str = "opt",
) -> Adopted:
    """Go on from a checkpoint that was trained by another optimizer, usually AdamW everywhere above the tables.

    Reads ``dcp.save({"model": dmp.state_dict(), "opt": optimizer.state_dict()})`` of any number of ranks. Weights are
    all loaded. State is loaded for every parameter whose optimizer keeps the same: that of the tables, AdamW's two
    averages and steps where AdamW stays, the momentum where the old one was a Muon too. The rest, Muon's momentum as a
    rule, starts at zero and is logged: at 0.95 the average has 64 % of its weight from new gradients after 20 steps.

    Every rank must call it. Rates are not loaded, and of other entries nothing. The metadata is read by DCP itself,
    which unpickles it: load what you trust.

    Args:
        folder: of the checkpoint.
        model: sharded in any way.
        optimizer: of `muonrec.build_optimizer`.
        model_key: under which the model's state dict was saved.
        optimizer_key: under which the optimizer's was. Whatever name it gave to its dense part is found out.

    Raises:
        ValueError: nothing is saved under a key, a weight is missing, or anything is of another size; on every rank.
        OSError: the checkpoint cannot be read; on every rank.
    """
    folder = Path(folder)
    there = together(lambda: _sizes(folder))
    together(lambda: _check_keys(folder, there, model_key, optimizer_key))
    nested_model, nested_optimizer = model.state_dict(), optimizer.state_dict()
    wanted: dict[str, torch.Tensor] = {f"{model_key}.{k}": v for k, v in flatten_state_dict(nested_model)[0].items()}
    kept: list[str] = []
    fresh: list[str] = []
    for keys in _state_by_part(optimizer, nested_optimizer):
        prefix = _prefix_of(keys, there, optimizer_key)
        for key, (ours, tensor) in keys.items():
            theirs = f"{optimizer_key}.state.{prefix}{key}"
            (kept if theirs in there else fresh).append(ours)
            if theirs in there:
                wanted[theirs] = tensor

    together(lambda: _check(folder, wanted, there))
    with dcp_errors(f"{folder} could not be read"):
        dcp.load({**wanted}, storage_reader=FileSystemReader(folder), planner=TensorPlanner())
    model.load_state_dict(nested_model)
    optimizer.load_state_dict(nested_optimizer)
    kept, fresh = sorted(kept), sorted(fresh)
    logger.info("%s: all weights and %d tensors of optimizer state loaded", folder, len(kept))
    if fresh:
        logger.warning(
            "%s holds no state for %d tensors of this rank, which start at zero: %s%s",
            folder,
            len(fresh),
            ", ".join(fresh[:SHOWN]),
            f" and {len(fresh) - SHOWN} more" if len(fresh) > SHOWN else "",
        )
    return Adopted(kept, fresh)


def _sizes(folder: Path) -> dict[str, list[int]]:
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except FileNotFoundError as error:
        raise OSError(f"{folder} holds no .metadata, hence no checkpoint of DCP: {error}") from error
    return {key: list(entry.size) for key, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}


def _state_by_part(
    optimizer: CombinedOptimizer, nested: Mapping[str, Any]
) -> Iterator[dict[str, tuple[str, torch.Tensor]]]:
    """For each part, our whole key and the tensor by the key without the part's name."""
    for part, keyed in optimizer.optimizers:
        names = {CombinedOptimizer.prepend_opt_key(name, part): name for name in keyed.params}
        yield {
            f"{names[whole]}.{leaf}": (f"{whole}.{leaf}", tensor)
            for whole, state in nested["state"].items()
            if whole in names
            for leaf, tensor in flatten_state_dict(state)[0].items()
            if isinstance(tensor, torch.Tensor)
        }


def _prefix_of(keys: Collection[str], there: Collection[str], optimizer_key: str) -> str:
    """What their optimizer puts before the names of these parameters; the most frequent, as names end alike."""
    start = f"{optimizer_key}.state."
    theirs = [key.removeprefix(start) for key in there if key.startswith(start)]
    found = Counter(
        key[:end] for key in theirs for end in (0, *(dot.end() for dot in re.finditer(r"\.", key))) if key[end:] in keys
    )
    return max(found, key=lambda prefix: (found[prefix], -len(prefix)), default="")


def _check_keys(folder: Path, there: Collection[str], model_key: str, optimizer_key: str) -> None:
    """Under a wrong key there would be nothing to load, and every state, the tables' too, would start at zero."""
    found = sorted({key.partition(".")[0] for key in there})
    for argument, start in (("model_key", f"{model_key}."), ("optimizer_key", f"{optimizer_key}.state.")):
        if not any(name.startswith(start) for name in there):
            raise ValueError(
                f"{folder} holds no tensors under {start!r}; it has tensors under {', '.join(found) or 'no key'}; pass "
                f"{argument}=..., the key that the {argument.removesuffix('_key')}'s state dict was saved under"
            )


def _check(folder: Path, wanted: Mapping[str, torch.Tensor], there: Mapping[str, list[int]]) -> None:
    here = {key: list(tensor.size()) for key, tensor in wanted.items()}
    theirs = {key: there[key] for key in here if key in there}
    if theirs != here:
        raise ValueError(
            f"{folder} is of another model: {differences(theirs, here)}; it must hold every weight, and row statistics "
            "of column-wise tables must be loaded under the sharding they were saved with"
        )
