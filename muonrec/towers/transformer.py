"""The transformer tower: positions, causal blocks, and a last norm, on packed events."""

# T = events of all users, B = users, D = width

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from muonrec.towers.attention import SelfAttention
from muonrec.towers.packing import Groups, PackedLayout

Norm = Literal["pre", "post"]
Positions = Literal["from_end", "from_start"]


class TransformerTower(nn.Module):
    """SASRec's self-attention blocks (Kang & McAuley 2018) without padding.

    Args:
        embedding_dim: width of the events, D.
        num_layers: blocks.
        num_heads: attention heads of a block.
        feedforward_dim: width of the feed-forward layer; the paper's is D.
        dropout: of the embedded events, of attention and of each residual branch.
        max_length: positions there are.
        norm: ``pre``: norm inside the residual branch; ``post``: after the sum.
        positions: ``from_end``: the latest event is always position 0, as left padding makes it in the paper's code;
            ``from_start``: the oldest event kept is 0.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_layers: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        max_length: int,
        norm: Norm = "pre",
        positions: Positions = "from_end",
    ) -> None:
        super().__init__()
        self.positions = positions
        self.position = nn.Embedding(max_length, embedding_dim)
        nn.init.normal_(self.position.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(embedding_dim, num_heads, feedforward_dim, dropout, norm) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embedding_dim)

    def forward(self, x_TD: torch.Tensor, lengths_B: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Hidden states ``[T, D]`` of packed events; row t knows its user's events up to t.

        Args:
            x_TD: embedded events, users in order of falling length.
            lengths_B: int64, events of each user.
            groups: `SequenceBatch.groups`.
        """
        layout = PackedLayout.of(lengths_B, groups)
        position_T = layout.from_end_T if self.positions == "from_end" else layout.position_T
        x_TD = self.dropout(x_TD + self.position(position_T))
        for block in self.blocks:
            x_TD = block(x_TD, layout)
        return self.norm(x_TD)


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, each in a residual branch with its norm."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        norm: Norm,
        *,
        attention_dropout: float | None = None,
        causal: bool = True,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.attention_norm = nn.LayerNorm(embedding_dim)
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        self.attention = SelfAttention(embedding_dim, num_heads, attention_dropout, causal=causal, head_dim=head_dim)
        self.feedforward_norm = nn.LayerNorm(embedding_dim)
        self.feedforward = feedforward(embedding_dim, feedforward_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_TD: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        if self.pre:
            x_TD = x_TD + self.dropout(self.attention(self.attention_norm(x_TD), layout))
            return x_TD + self.dropout(self.feedforward(self.feedforward_norm(x_TD)))
        x_TD = self.attention_norm(x_TD + self.dropout(self.attention(x_TD, layout)))
        return self.feedforward_norm(x_TD + self.dropout(self.feedforward(x_TD)))


def feedforward(embedding_dim: int, feedforward_dim: int, dropout: float) -> nn.Sequential:
    """The feed-forward layer of a block."""
    return nn.Sequential(
        nn.Linear(embedding_dim, feedforward_dim),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(feedforward_dim, embedding_dim),
    )
