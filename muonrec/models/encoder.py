"""What of a trained, sharded model is ranked: users and items as vectors, unless the model brings its own scorer."""

# B = users of the batch, C = items asked for, D = width

from __future__ import annotations

from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from muonrec.batch import CANDIDATES, HISTORY, TARGETS, SequenceBatch


class ShardedEncoder:
    """A trained model behind `retrieval`: every rank must make the same calls in the same order.

    Args:
        model: `DistributedModelParallel` around one of MODELS; put into evaluation mode by each call.
        num_items: rows of the item table.
        device: where batches go.
    """

    def __init__(self, model: DistributedModelParallel, *, num_items: int, device: torch.device) -> None:
        self.model = model
        self.num_items = num_items
        self.device = device

    @torch.no_grad()
    def user_vectors(self, batch: SequenceBatch) -> torch.Tensor:
        """Float32 ``[B, D]``: the state after each user's latest event."""
        self.model.eval()
        return self.model(batch.to(self.device)).float()

    @torch.no_grad()
    def item_vectors(self, item_ids_C: torch.Tensor) -> torch.Tensor:
        """Float32 ``[C, D]``: rows of the item table, as scored; ids int64, none twice is not required."""
        lengths = torch.tensor([0, 0, item_ids_C.numel()], device=self.device)
        features = KeyedJaggedTensor(
            keys=[HISTORY, TARGETS, CANDIDATES], values=item_ids_C.to(self.device), lengths=lengths, stride=1
        )
        model: Any = self.model.module
        rows_CD = model.embeddings(features)[CANDIDATES].values()
        # In float64, so that an item has one norm: a GPU adds up few rows in another order than many.
        return model.scored(rows_CD.double()).float()


def scorer_of(model: DistributedModelParallel, *, num_items: int, device: torch.device) -> Any:
    """What `muonrec.generation.rank_held_out` takes: the model's own ``scorer`` if its class has one, or its vectors.

    Args:
        model: around one of MODELS. A class that ranks by other means than inner products has a method
            ``scorer(sharded, device)``, given the sharded model that it is in.
        num_items: rows of the item table.
        device: where batches go.
    """
    if hasattr(model.module, "scorer"):
        return model.module.scorer(model, device)
    return ShardedEncoder(model, num_items=num_items, device=device)
