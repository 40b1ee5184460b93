"""Attention: the projections all kinds share, and self-attention over packed events."""

# T = events of all users, B = users of a group, L = its longest history, D = width, N = heads, H = head width
# Q = queries of a user, S = what they may attend to

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from muonrec.towers.packing import PackedLayout, pad, unpad

# CUDA counts the rows of a kernel's grid in 16 bits.
_MOST_ROWS = 65_535


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) without a word on who attends to what.

    Query, key, value and output are separate `nn.Linear`s, so Muon orthogonalizes each on its own.

    Args:
        embedding_dim: D.
        num_heads: N.
        dropout: of the probabilities.
        head_dim: H; None for D / N.

    Raises:
        ValueError: ``embedding_dim`` is not a multiple of ``num_heads``, and no ``head_dim`` says how wide they are.
    """

    def __init__(self, embedding_dim: int, num_heads: int, dropout: float, *, head_dim: int | None = None) -> None:
        super().__init__()
        if head_dim is None and embedding_dim % num_heads:
            raise ValueError(f"embedding_dim {embedding_dim} is not a multiple of num_heads {num_heads}")
        width = num_heads * (head_dim or embedding_dim // num_heads)
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(embedding_dim, width)
        self.key = nn.Linear(embedding_dim, width)
        self.value = nn.Linear(embedding_dim, width)
        self.output = nn.Linear(width, embedding_dim)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., N, L, H]`` of projections ``[..., L, N * H]``."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def attend(
        self,
        q_BNQH: torch.Tensor,
        k_BNSH: torch.Tensor,
        v_BNSH: torch.Tensor,
        *,
        causal: bool = False,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What each query gathers, heads side by side again: ``[B, Q, N * H]``, to go through ``output``.

        Args:
            q_BNQH, k_BNSH, v_BNSH: heads.
            causal: query i sees the first i + 1 alone.
            visible: bool, broadcastable to ``[B, N, Q, S]``; False hides.
        """
        if len(q_BNQH) > _MOST_ROWS:
            parts = zip(*(heads.split(_MOST_ROWS) for heads in (q_BNQH, k_BNSH, v_BNSH)), strict=True)
            masks = itertools.repeat(None)
            if visible is not None:
                masks = visible.expand(torch.broadcast_shapes(visible.shape, (len(q_BNQH), 1, 1, 1))).split(_MOST_ROWS)
            return torch.cat([self.attend(*part, causal=causal, visible=mask) for part, mask in zip(parts, masks)])
        attended_BNQH = F.scaled_dot_product_attention(
            q_BNQH,
            k_BNSH.to(q_BNQH.dtype),
            v_BNSH.to(q_BNQH.dtype),
            attn_mask=visible,
            is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return attended_BNQH.transpose(-3, -2).flatten(-2)


class SelfAttention(Attention):
    """Self-attention over packed events: each attends to its user's events, if ``causal`` up to itself.

    Only attention itself is computed on padded groups; the projections see packed events.
    """

    def __init__(
        self, embedding_dim: int, num_heads: int, dropout: float, *, causal: bool = True, head_dim: int | None = None
    ) -> None:
        super().__init__(embedding_dim, num_heads, dropout, head_dim=head_dim)
        self.causal = causal

    def forward(self, x_TD: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        q_TD, k_TD, v_TD = self.query(x_TD), self.key(x_TD), self.value(x_TD)
        attended = []
        for (events, pad_BL, unpad_T), inside_BL in zip(layout.groups, layout.inside, strict=True):
            q_BNLH, k_BNLH, v_BNLH = (self.heads(pad(part_TD[events], pad_BL)) for part_TD in (q_TD, k_TD, v_TD))
            # Padding stands to the right of every event, so a causal mask hides it and no other mask is needed.
            visible = None if self.causal else inside_BL[:, None, None]
            attended_BLD = self.attend(q_BNLH, k_BNLH, v_BNLH, causal=self.causal, visible=visible)
            attended.append(unpad(attended_BLD, unpad_T))
        # No events at all: every projection still takes part, since DDP waits for its gradient.
        return self.output(torch.cat(attended) if attended else q_TD + k_TD + v_TD)
