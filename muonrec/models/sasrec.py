"""SASRec (Kang & McAuley 2018): a causal transformer over the user's events, scored against the item table."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from muonrec.batch import CANDIDATES, HISTORY, TARGETS, SequenceBatch
from muonrec.config import Config
from muonrec.embeddings.tables import item_table
from muonrec.losses import NextItemLoss
from muonrec.towers.transformer import Norm, Positions, TransformerTower


class SASRecConfig(Config):
    """Settings of SASRec; the defaults are the paper's widths with the norm moved inside (pre-norm).

    ``scale_input`` multiplies the rows that are read by sqrt(D), as the paper's code does.
    """

    name: Literal["sasrec"] = "sasrec"
    embedding_dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    feedforward_dim: int = 64
    dropout: float = 0.2
    max_length: int = 50
    norm: Norm = "pre"
    positions: Positions = "from_end"
    scale_input: bool = True


class SASRec(nn.Module):
    """SASRec on packed events.

    Training: ``(loss, statistics)`` of a batch. Evaluation: the users' vectors ``[B, D]``, whose products with the rows
    of the item table are the scores.
    """

    def __init__(self, config: SASRecConfig, *, num_items: int, loss: NextItemLoss) -> None:
        super().__init__()
        self.embeddings = item_table(num_items, config.embedding_dim)
        self.tower = TransformerTower(
            embedding_dim=config.embedding_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            feedforward_dim=config.feedforward_dim,
            dropout=config.dropout,
            max_length=config.max_length,
            norm=config.norm,
            positions=config.positions,
        )
        self.loss = loss
        # The paper scales the rows it reads by sqrt(D), and not those it scores against.
        self.input_scale = config.embedding_dim**0.5 if config.scale_input else 1.0

    def forward(self, batch: SequenceBatch) -> Any:
        embedded = self.embeddings(batch.features)
        history = embedded[HISTORY]
        lengths_B = history.lengths()
        hidden_TD = self.tower(history.values() * self.input_scale, lengths_B, batch.groups)
        if not self.training:
            return last_events(hidden_TD, lengths_B)
        return self.loss(hidden_TD, embedded[TARGETS].values(), embedded[CANDIDATES].values(), batch)


def last_events(x_TD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """The row ``[B, D]`` of the latest event of each user that has one."""
    return x_TD[(torch.cumsum(lengths_B, 0) - 1)[lengths_B > 0]]
