"""SequentialModel: what the models share that score users against the item table by an inner product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from muonrec.batch import CANDIDATES, HISTORY, TARGETS, SequenceBatch
from muonrec.embeddings.tables import item_table
from muonrec.losses import NEXT_ITEM_LOSSES, NextItemLoss


class SequentialModel(nn.Module):
    """An item table, a causal tower over each user's events, and a loss over the next items.

    Training: ``(loss, statistics)`` of a batch. Evaluation: the users' vectors ``[B, D]``, whose products with the rows
    of the item table are the scores.

    Args:
        tower: called with the rows of the events ``[T, D]``, the events of each user ``[B]`` and the groups;
            gives hidden states ``[T, D]``, of which row t knows its user's events up to t alone.
        num_items: rows of the item table.
        embedding_dim: width of its rows, D.
        loss: of the next items.
        input_scale: what the rows are multiplied by that are read, and those that are scored are not.
        normalize: score by the cosine: hidden states and rows of items are scaled to length 1.
    """

    losses = NEXT_ITEM_LOSSES

    def __init__(
        self,
        tower: nn.Module,
        *,
        num_items: int,
        embedding_dim: int,
        loss: NextItemLoss,
        input_scale: float = 1.0,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.embeddings = item_table(num_items, embedding_dim)
        self.tower = tower
        self.loss = loss
        self.input_scale = input_scale
        self.normalize = normalize

    def forward(self, batch: SequenceBatch) -> Any:
        embedded = self.embeddings(batch.features)
        history = embedded[HISTORY]
        lengths_B = history.lengths()
        hidden_TD = self.scored(self.hidden(history.values() * self.input_scale, lengths_B, batch))
        if not self.training:
            return last_events(hidden_TD, lengths_B)
        targets, candidates = (self.scored(embedded[key].values()) for key in (TARGETS, CANDIDATES))
        return self.loss(hidden_TD, targets, candidates, batch)

    def hidden(self, x_TD: torch.Tensor, lengths_B: torch.Tensor, batch: SequenceBatch) -> torch.Tensor:
        """The tower's hidden states; for a model whose tower takes more of the batch to override."""
        return self.tower(x_TD, lengths_B, batch.groups)

    def scored(self, x_CD: torch.Tensor) -> torch.Tensor:
        """Hidden states or rows of items as the inner product takes them."""
        return F.normalize(x_CD, dim=-1) if self.normalize else x_CD


def last_events(x_TD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """The row ``[B, D]`` of the latest event of each user that has one."""
    return x_TD[(torch.cumsum(lengths_B, 0) - 1)[lengths_B > 0]]
