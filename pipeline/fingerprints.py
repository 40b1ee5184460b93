"""What a run started from, as hashes: two runs that should differ in the optimizer alone agree in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from muonrec.checkpoint.checksum import state_checksum
from muonrec.data.loader import TrainingBatches
from muonrec.embeddings.tables import table_of
from muonrec.mesh import Ranks
from muonrec.runs import FINGERPRINTS

_FIRST_BATCHES = 3


def record_fingerprints(folder: Path, model: nn.Module, loader: TrainingBatches, ranks: Ranks) -> None:
    """Write ``fingerprints.json`` into ``folder``; before the first step, every rank must call it.

    Args:
        folder: of the run.
        model: with its initial weights.
        loader: of all global batches whole, as the only rank would have it.
        ranks: this rank among the others.
    """
    # A table by its own name: its path says which kernel serves it.
    state = {table_of(key) or key: value for key, value in model.state_dict().items()}
    initial_state = state_checksum(state, ranks)
    if ranks.is_first:
        found = {"initial_state": initial_state, **data_fingerprints(loader)}
        partial = folder / f".{FINGERPRINTS}.partial"
        partial.write_text(json.dumps(found, indent=2) + "\n")
        partial.rename(folder / FINGERPRINTS)


def data_fingerprints(loader: TrainingBatches) -> dict[str, str]:
    """Hashes of the first global batches, candidates included, and of the order of the samples in the first epoch."""
    batches = hashlib.sha256()
    for step in range(_FIRST_BATCHES):
        batch = loader.share(step)
        ids = (batch.features.values(), batch.features.lengths(), batch.labels, batch.user_ids)
        for tensor in (*ids, batch.log_q, batch.timestamps_s):
            batches.update(_bytes(tensor))
    order = hashlib.sha256()
    for step in range(loader.steps_per_epoch):
        order.update(loader.samples(step).tobytes())
    return {"first_batches": batches.hexdigest()[:16], "epoch_order": order.hexdigest()[:16]}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
