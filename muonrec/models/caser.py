"""Caser (Tang & Wang 2018): convolutions over the user's latest events, scored against the item table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from muonrec.config import Config
from muonrec.losses import NextItemLoss
from muonrec.models.sequential import SequentialModel
from muonrec.towers.caser import CaserTower


class CaserConfig(Config):
    """Settings of Caser; the window, and 16 and 4 kernels, are the paper's.

    There is no embedding of the user: a user's row learns nothing that the events do not say, has to be trained for
    each new one, and cannot be had for users the training never saw.

    Attributes:
        embedding_dim: width of the events, and of the table's rows.
        window: events an event knows, itself included; the paper's L.
        num_horizontal: horizontal kernels of each height from 1 to ``window``.
        num_vertical: vertical kernels.
        dropout: of the features that the convolutions give, and of the hidden layer above them.
        max_length: events of a user that are read, the latest.
    """

    name: Literal["caser"] = "caser"
    embedding_dim: int = Field(default=64, ge=1)
    window: int = Field(default=5, ge=1)
    num_horizontal: int = Field(default=16, ge=1)
    num_vertical: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    max_length: int = Field(default=50, ge=1)

    @model_validator(mode="after")
    def _window_of_a_history(self) -> CaserConfig:
        if self.window > self.max_length:
            raise ValueError(
                f"window {self.window} is longer than any history, which max_length {self.max_length} cuts: kernels "
                "would only ever meet zeros there; lower window or raise max_length"
            )
        return self

    def tower_activations(self) -> tuple[int, str]:
        """As `SASRecConfig.tower_activations`: features convolved, pooled, activated, joined and dropped; the rows
        of events that stand with gaps between users count as one more window of short histories.
        """
        width = self.embedding_dim
        features = self.window * self.num_horizontal + self.num_vertical * width
        words = f"5 x {features} features + 6 x {width}"
        return 5 * features + 6 * width, words


class Caser(SequentialModel):
    """Caser on packed events."""

    config_class = CaserConfig

    def __init__(self, config: CaserConfig, *, num_items: int, loss: NextItemLoss) -> None:
        tower = CaserTower(
            embedding_dim=config.embedding_dim,
            window=config.window,
            num_horizontal=config.num_horizontal,
            num_vertical=config.num_vertical,
            dropout=config.dropout,
        )
        super().__init__(tower, num_items=num_items, embedding_dim=config.embedding_dim, loss=loss)
