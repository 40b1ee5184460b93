"""Causal self-attention over packed events."""

# T = events of all users, B = users of a group, L = its longest history, D = width, N = heads, H = head width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from muonrec.towers.packing import PackedLayout, pad, unpad


class CausalAttention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017): each event attends to its user's events up to itself.

    Query, key, value and output are separate `nn.Linear`s, so Muon orthogonalizes each on its own. Only attention
    itself is computed on padded groups; the projections see packed events.

    Raises:
        ValueError: ``embedding_dim`` is not a multiple of ``num_heads``.
    """

    def __init__(self, embedding_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if embedding_dim % num_heads:
            raise ValueError(f"embedding_dim {embedding_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(embedding_dim, embedding_dim)
        self.key = nn.Linear(embedding_dim, embedding_dim)
        self.value = nn.Linear(embedding_dim, embedding_dim)
        self.output = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, x_TD: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        q_TD, k_TD, v_TD = self.query(x_TD), self.key(x_TD), self.value(x_TD)
        attended = [
            self._attend(q_TD[events], k_TD[events], v_TD[events], pad_BL, unpad_T)
            for events, pad_BL, unpad_T in layout.groups
        ]
        # No events at all: every projection still takes part, since DDP waits for its gradient.
        return self.output(torch.cat(attended) if attended else q_TD + k_TD + v_TD)

    def _attend(
        self, q_TD: torch.Tensor, k_TD: torch.Tensor, v_TD: torch.Tensor, pad_BL: torch.Tensor, unpad_T: torch.Tensor
    ) -> torch.Tensor:
        q_BNLH, k_BNLH, v_BNLH = (
            pad(x_TD, pad_BL).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x_TD in (q_TD, k_TD, v_TD)
        )
        # Padding stands to the right of every event, so the causal mask hides it and no other mask is needed.
        attended_BNLH = F.scaled_dot_product_attention(
            q_BNLH, k_BNLH, v_BNLH, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return unpad(attended_BNLH.transpose(1, 2).flatten(2), unpad_T)
