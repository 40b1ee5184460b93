"""HSTU (Zhai et al. 2024): pointwise attention with relative position and time, scored against the item table."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from pydantic import Field

from muonrec.batch import SequenceBatch
from muonrec.config import Config
from muonrec.losses import NextItemLoss
from muonrec.models.sequential import SequentialModel
from muonrec.towers.hstu import QUERY_BLOCK, HSTUTower
from muonrec.towers.transformer import Positions

logger = logging.getLogger(__name__)


class HSTUConfig(Config):
    """Settings of HSTU; names as in its public code.

    Attributes:
        embedding_dim: width of the events, and of the table's rows.
        num_layers: blocks.
        num_heads: attention heads of a block.
        linear_dim: width of u and v, of each head.
        attention_dim: width of q and k, of each head.
        dropout: of the embedded events and of what each block's output layer reads.
        attention_dropout: of the attention's weights.
        max_length: events of a user that are read, the latest; attention is divided by it, too.
        positions: ``from_start``: the oldest event that is read has 0; ``from_end``: the latest.
        time_bias: add the relative time bias to that of positions; null: where the data set has times; true: or an
            error.
        normalize: scale hidden states and items to length 1, as the paper's experiments do; the loss then wants a
            ``temperature`` of about 0.05.
        scale_input: multiply the rows that are read by sqrt(``embedding_dim``), as its code does.
    """

    name: Literal["hstu"] = "hstu"
    embedding_dim: int = Field(default=64, ge=1)
    num_layers: int = Field(default=2, ge=1)
    num_heads: int = Field(default=2, ge=1)
    linear_dim: int = Field(default=32, ge=1)
    attention_dim: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    max_length: int = Field(default=50, ge=1)
    positions: Positions = "from_start"
    time_bias: bool | None = None
    normalize: bool = False
    scale_input: bool = True

    def tower_activations(self) -> tuple[int, str]:
        """As `SASRecConfig.tower_activations`: of a layer u, v, q, k three times, values attended and gated, the norm
        and the residual; scores, kept of 128 queries at a time, four times over.
        """
        width, heads = self.embedding_dim, self.num_heads
        projected = 2 * heads * (self.linear_dim + self.attention_dim)
        scores = heads * min(self.max_length, QUERY_BLOCK)
        layer = 3 * projected + 4 * heads * self.linear_dim + 4 * width + 4 * scores
        words = f"{self.num_layers} layers x (3 x {projected} of uvqk + 4 x {heads * self.linear_dim} + 4 x {width}"
        words += f" + 4 x {scores} scores) + 4 x {width}"
        return self.num_layers * layer + 4 * width, words

    def on_data(self, *, has_times: bool) -> HSTUConfig:
        """The same with ``time_bias`` decided by whether the data set has times.

        Raises:
            ValueError: it was asked for, and there are none.
        """
        if self.time_bias and not has_times:
            raise ValueError(
                "model.time_bias=true was asked but the data set has no times; leave time_bias out, or rerun "
                "python -m pipeline.data on a source that has them"
            )
        if self.time_bias is None and not has_times:
            logger.info("the data set has no times: the relative bias of HSTU is of positions alone")
        return self.model_copy(update={"time_bias": has_times and self.time_bias is not False})


class HSTU(SequentialModel):
    """HSTU on packed events. ``config.time_bias`` None counts as False: `HSTUConfig.on_data` decides it."""

    config_class = HSTUConfig

    def __init__(self, config: HSTUConfig, *, num_items: int, loss: NextItemLoss) -> None:
        tower = HSTUTower(
            embedding_dim=config.embedding_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            linear_dim=config.linear_dim,
            attention_dim=config.attention_dim,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            max_length=config.max_length,
            time_bias=bool(config.time_bias),
            positions=config.positions,
            last_norm=not config.normalize,
        )
        scale = config.embedding_dim**0.5 if config.scale_input else 1.0
        super().__init__(
            tower,
            num_items=num_items,
            embedding_dim=config.embedding_dim,
            loss=loss,
            input_scale=scale,
            normalize=config.normalize,
        )

    def hidden(self, x_TD: torch.Tensor, lengths_B: torch.Tensor, batch: SequenceBatch) -> torch.Tensor:
        """The tower's hidden states, with the times of the events."""
        return self.tower(x_TD, lengths_B, batch.groups, batch.timestamps_s)
