"""Runs on disk: whether a config may go on in one, which checkpoint to take of it, and of which data it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muonrec import checkpoint
from muonrec.config import load_config
from muonrec.data.manifest import Manifest
from muonrec.data.semantic_ids import SemanticIds
from pipeline.data import deciding_settings
from pipeline.train_config import TrainConfig

# What may differ when a run is resumed: it changes where things are computed or written, not what is learned.
_MAY_DIFFER = {
    "dense_sharding",
    "log_every_steps",
    "tensorboard",
    "checkpoints",
    "fingerprints",
    "spectra_every_steps",
}
_TABLES_MAY_DIFFER = {"sharding", "min_partition", "memory", "cache_load_factor", "pooling_factor"}

# What may differ from the run that ``init_from`` names, when all that shall change is the dense optimizer.
_OF_DENSE_OPTIMIZER = {"dense_optimizer", "adamw", "routing", "schedule", "schedules", "max_grad_norm", "init_from"}


def check_output(config: TrainConfig) -> None:
    """Refuse an output folder that holds a run of another config, and one that is no folder.

    Raises:
        ValueError: names what differs.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(config.output)):
        raise ValueError(
            f"output {config.output} is a URL, but checkpoints need a folder on storage that all nodes share; "
            "pass one, and copy the run when it is done"
        )
    resolved = config.output / "resolved.yaml"
    if not resolved.is_file() or checkpoint.newest(config.output / "checkpoints") is None:
        return  # nothing was learned there yet
    before, now = (
        # Settings that came after that run stand at their defaults.
        _what_is_learned(load_config(type(config), resolved).model_dump(mode="json")),
        _what_is_learned(config.model_dump(mode="json")),
    )
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if differing:
        way = ", or delete that one to start anew"
        if "data" in differing and config.data.extends is not None:
            way += f"; to go on from its weights on data that extend its own, add init_from={config.output}"
        if "dense_optimizer" in differing and set(differing) <= _OF_DENSE_OPTIMIZER:
            way += f"; to go on from its weights with the other optimizer, add init_from={config.output}"
        raise ValueError(
            f"{config.output} holds a run whose {', '.join(differing)} differ from this config; "
            f"pass output=another/folder{way}"
        )


def _what_is_learned(tree: dict[str, Any]) -> dict[str, Any]:
    tables = {
        name: {key: value for key, value in table.items() if key not in _TABLES_MAY_DIFFER}
        for name, table in tree["tables"].items()
    }
    # Where the source lies and what is known of the items may differ: checkpoints name the data by their fingerprint.
    data = {**deciding_settings(tree["data"]), "output": tree["data"]["output"], "extends": tree["data"]["extends"]}
    return {key: value for key, value in {**tree, "tables": tables, "data": data}.items() if key not in _MAY_DIFFER}


def choose_checkpoints(run: Path, which: str) -> list[Path]:
    """A run's checkpoints in the order in which to try them: the newest first, before it the ``best`` if asked for.

    Every rank must call it.

    Raises:
        ValueError: the folder has no finished checkpoint.
    """
    root = run / "checkpoints"
    folders = checkpoint.newest_first(root)
    if not folders:
        raise ValueError(f"{run} has no finished checkpoint; train it first, or until its first validation")
    if which == "best":
        for folder in folders:
            try:
                best_step = checkpoint.read_progress(folder)["best"]["step"]
            except checkpoint.UnusableCheckpoint:
                continue  # named when it is tried
            best = checkpoint.step_folder(root, best_step)
            return [best, *(folder for folder in folders if folder != best)] if best_step else folders
    return folders


def first_items(manifest: Manifest, fingerprint: str) -> int:
    """How many of the first items are those of the data set ``fingerprint``; 0 if this one does not go back to it."""
    known = {ancestor.fingerprint: ancestor.num_items for ancestor in manifest.ancestors}
    return {**known, manifest.fingerprint: manifest.num_items}.get(fingerprint, 0)


def check_trained_on(
    source: Path, fingerprint: str, manifest: Manifest, config: TrainConfig, *, may_grow: bool = False
) -> None:
    """Refuse weights whose rows mean other items than those of the data set.

    Args:
        source: of the weights, for the message.
        fingerprint: of the data they were trained on.
        manifest: of the data set they are for.
        config: what asks for it.
        may_grow: take those of a data set that this one extends, too: its items have the first rows.

    Raises:
        ValueError: says what the weights were trained on, what was found and what to do.
    """
    if not first_items(manifest, fingerprint):
        extended = ", ".join(f"{ancestor.fingerprint[:12]}..." for ancestor in manifest.ancestors)
        raise ValueError(
            f"{source} was trained on other data than {config.data.output} holds now: on {fingerprint[:12]}..., found "
            f"{manifest.fingerprint[:12]}..., which extends {extended or 'none'}; rebuild that data set as it was, "
            "build this one with data.extends=its/folder, or pass output=another/folder to start anew"
        )
    if fingerprint != manifest.fingerprint and not may_grow:
        raise ValueError(
            f"{source} was trained on data that {config.data.output} extends, and not on what it holds now; to train "
            f"on from its weights with the new data, pass output=another/folder init_from={config.output}; to go on "
            "with the old, pass data.output=its/folder"
        )


def check_same_codes(source: Path, progress: Mapping[str, Any], ids: SemanticIds | None) -> None:
    """Refuse weights whose tokens mean other items than ``ids`` say.

    Args:
        source: of the weights, for the message.
        progress: what their checkpoint says of itself.
        ids: the codes now; None for a model that has none.

    Raises:
        ValueError: says which codes the weights were trained with.
    """
    found = progress.get("semantic_ids")
    if ids is not None and found != ids.fingerprint:
        raise ValueError(
            f"{source} was trained with other semantic IDs ({(found or 'none')[:12]}) than data.semantic_ids has now "
            f"({ids.fingerprint[:12]}): its tokens mean other items; make those IDs again, or pass "
            "output=another/folder to start anew"
        )
