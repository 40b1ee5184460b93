"""SASRec (Kang & McAuley 2018): a causal transformer over the user's events, scored against the item table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from muonrec.config import Config
from muonrec.losses import NextItemLoss
from muonrec.models.sequential import SequentialModel
from muonrec.towers.transformer import Norm, Positions, TransformerTower


class SASRecConfig(Config):
    """Settings of SASRec: two pre-norm blocks as in the paper, here of width 64 and two heads.

    Attributes:
        embedding_dim: width of the events, and of the table's rows.
        num_layers: blocks.
        num_heads: attention heads of a block, which share ``embedding_dim`` equally.
        feedforward_dim: width of the feed-forward layer; the paper's is ``embedding_dim``.
        dropout: of the embedded events, of attention, within feed-forward layers and of each residual branch.
        max_length: events of a user that are read, the latest.
        norm: ``pre``, as in the paper: before attention and feed-forward layer; ``post``: after each residual sum.
        positions: ``from_end``: the latest event has 0; ``from_start``: the oldest that is read.
        scale_input: multiply the rows that are read by sqrt(``embedding_dim``), as the paper's code does.
    """

    name: Literal["sasrec"] = "sasrec"
    embedding_dim: int = Field(default=64, ge=1)
    num_layers: int = Field(default=2, ge=1)
    num_heads: int = Field(default=2, ge=1)
    feedforward_dim: int = Field(default=64, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    max_length: int = Field(default=50, ge=1)
    norm: Norm = "pre"
    positions: Positions = "from_end"
    scale_input: bool = True

    def tower_activations(self) -> tuple[int, str]:
        """Numbers of an event that autograd keeps in the tower, and their sum in words; an upper bound.

        Of a block: inputs and outputs of two norms, q, k, v, attention's output, two residuals and a dropped branch
        (10 D), the hidden layer before and after its activation and dropout (3 F). SDPA's fused kernels keep no
        probabilities. The tower keeps its input and output.
        """
        width, hidden = self.embedding_dim, self.feedforward_dim
        words = f"{self.num_layers} layers x (10 x {width} + 3 x {hidden}) + 4 x {width}"
        return self.num_layers * (10 * width + 3 * hidden) + 4 * width, words


class SASRec(SequentialModel):
    """SASRec on packed events."""

    config_class = SASRecConfig

    def __init__(self, config: SASRecConfig, *, num_items: int, loss: NextItemLoss) -> None:
        tower = TransformerTower(
            embedding_dim=config.embedding_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            feedforward_dim=config.feedforward_dim,
            dropout=config.dropout,
            max_length=config.max_length,
            norm=config.norm,
            positions=config.positions,
        )
        # The paper scales the rows it reads by sqrt(D), and not those it scores against.
        scale = config.embedding_dim**0.5 if config.scale_input else 1.0
        super().__init__(tower, num_items=num_items, embedding_dim=config.embedding_dim, loss=loss, input_scale=scale)
