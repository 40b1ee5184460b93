"""GRU4Rec (Hidasi et al. 2016): gated recurrent units over the user's events, scored against the item table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from muonrec.config import Config
from muonrec.losses import NextItemLoss
from muonrec.models.sequential import SequentialModel
from muonrec.towers.gru import GRUTower


class GRU4RecConfig(Config):
    """Settings of GRU4Rec. Items are scored by the rows they are read by, as in the paper's later version (2018).

    Attributes:
        embedding_dim: width of the events, and of the table's rows.
        hidden_dim: width of the recurrence; where it is not ``embedding_dim``, a linear layer leads back.
        num_layers: recurrent layers.
        dropout: of the embedded events.
        hidden_dropout: of the hidden states, between layers and of the last.
        max_length: events of a user that are read, the latest.
    """

    name: Literal["gru4rec"] = "gru4rec"
    embedding_dim: int = Field(default=64, ge=1)
    hidden_dim: int = Field(default=64, ge=1)
    num_layers: int = Field(default=1, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    max_length: int = Field(default=50, ge=1)

    def tower_activations(self) -> tuple[int, str]:
        """As `SASRecConfig.tower_activations`: of a layer three gates twice, states, and both of them dropped."""
        width, hidden = self.embedding_dim, self.hidden_dim
        words = f"{self.num_layers} layers x 9 x {hidden} + 4 x {width}"
        return self.num_layers * 9 * hidden + 4 * width, words


class GRU4Rec(SequentialModel):
    """GRU4Rec on packed events."""

    config_class = GRU4RecConfig

    def __init__(self, config: GRU4RecConfig, *, num_items: int, loss: NextItemLoss) -> None:
        tower = GRUTower(
            embedding_dim=config.embedding_dim,
            hidden_dim=config.hidden_dim,
            num_layers=config.num_layers,
            dropout=config.dropout,
            hidden_dropout=config.hidden_dropout,
        )
        super().__init__(tower, num_items=num_items, embedding_dim=config.embedding_dim, loss=loss)
