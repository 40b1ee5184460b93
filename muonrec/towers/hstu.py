"""HSTU's tower (Zhai et al. 2024): pointwise aggregated attention, in memory that grows with the events."""

# T = events of all users, B = users of a group, L = its longest history, Q = queries of a block, K = keys up to its
# last query, D = width, N = heads, H = width of a head

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from muonrec.towers.packing import Groups, PackedLayout, pad, unpad
from muonrec.towers.transformer import Positions

# Queries that meet their keys at once: an event is charged this many scores a head at most, however long its history.
QUERY_BLOCK = 128
# As the reference has it: 128 steps of a factor of e^0.301, 1.35; the last ones no log of events ever reaches.
NUM_TIME_BUCKETS = 128
_LOG_OF_STEP = 0.301
_EPS = 1e-6


class HSTUTower(nn.Module):
    """Hierarchical Sequential Transduction Units (Zhai et al. 2024, arXiv 2402.17152) without padding.

    Args:
        embedding_dim: width of the events, D.
        num_layers: blocks.
        num_heads: of each block.
        linear_dim: width of u and v, of each head.
        attention_dim: width of q and k, of each head.
        dropout: of the embedded events and of what each block's output layer reads.
        attention_dropout: of the attention weights; the reference has the setting and leaves it unused.
        max_length: positions there are; also what the attention weights are divided by, so that an event's state
            does not depend on the batch it came in.
        time_bias: also learn a relative bias for the time between events; `forward` then needs their times.
        positions: ``from_start``, the reference's: the oldest event kept is 0; ``from_end``: the latest event is 0.
        last_norm: end with a `nn.LayerNorm`; off where the vectors are scaled to length 1 instead.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_layers: int,
        num_heads: int,
        linear_dim: int,
        attention_dim: int,
        dropout: float,
        max_length: int,
        attention_dropout: float = 0.0,
        time_bias: bool = False,
        positions: Positions = "from_start",
        last_norm: bool = True,
    ) -> None:
        super().__init__()
        self.positions = positions
        self.time_bias = time_bias
        self.position = nn.Embedding(max_length, embedding_dim)
        nn.init.normal_(self.position.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            HSTUBlock(
                embedding_dim, num_heads, linear_dim, attention_dim, dropout, attention_dropout, max_length, time_bias
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embedding_dim) if last_norm else nn.Identity()

    def forward(
        self, x_TD: torch.Tensor, lengths_B: torch.Tensor, groups: Groups, timestamps_T: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states ``[T, D]`` of packed events; row t knows its user's events up to t.

        Args:
            x_TD: embedded events, users in order of falling length.
            lengths_B: int64, events of each user.
            groups: `SequenceBatch.groups`.
            timestamps_T: int64, seconds; for a time bias alone.

        Raises:
            ValueError: there is a time bias, and the events do not all have a time.
        """
        if self.time_bias and (timestamps_T is None or timestamps_T.numel() != len(x_TD)):
            raise ValueError(
                f"the tower has a time bias but the batch brings {0 if timestamps_T is None else timestamps_T.numel()} "
                f"times for {len(x_TD)} events; load the data set with load_sequences(timestamps=True), or turn "
                "model.time_bias off"
            )
        layout = PackedLayout.of(lengths_B, groups)
        position_T = layout.from_end_T if self.positions == "from_end" else layout.position_T
        x_TD = self.dropout(x_TD + self.position(position_T))
        for block in self.blocks:
            x_TD = block(x_TD, layout, timestamps_T)
        return self.norm(x_TD)


class HSTUBlock(nn.Module):
    """One unit: ``x + output(u * norm(silu(q k^T + bias) / max_length @ v))``, u, v, q and k from one projection.

    The biases are the reference's but for one thing: its time bias of query i and key j is of ``t_(i+1) - t_j``, and so
    tells the model when the event comes that it is to predict, which nobody knows when asking for a recommendation.
    Here it is of ``t_i - t_j``. Tables of ours hold no rows for pairs that the causal mask leaves out.

    Attention is pointwise, so blocks of queries are computed one after the other, and computed again in the backward
    pass, with nothing to carry from one to the next: no matrix of scores outlives its block.

    The projection is a bare parameter, stored ``(in, out)`` under the reference's names, by which
    `muonrec.embeddings.roles` knows where to split it.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        linear_dim: int,
        attention_dim: int,
        dropout: float,
        attention_dropout: float,
        max_length: int,
        time_bias: bool,
    ) -> None:
        super().__init__()
        self._num_heads, self._linear_dim, self._attention_dim = num_heads, linear_dim, attention_dim
        self._sizes = [num_heads * linear_dim] * 2 + [num_heads * attention_dim] * 2
        self.max_length = max_length
        self.attention_dropout = attention_dropout
        self._uvqk = nn.Parameter(torch.empty(embedding_dim, sum(self._sizes)))
        nn.init.normal_(self._uvqk, std=0.02)
        self.output = nn.Linear(num_heads * linear_dim, embedding_dim)
        nn.init.xavier_uniform_(self.output.weight)
        self.dropout = nn.Dropout(dropout)
        self.position_bias = nn.Parameter(torch.empty(max_length))
        nn.init.normal_(self.position_bias, std=0.02)
        self.time_bias: nn.Parameter | None = None
        if time_bias:
            self.time_bias = nn.Parameter(torch.empty(NUM_TIME_BUCKETS + 1))
            nn.init.normal_(self.time_bias, std=0.02)

    def forward(self, x_TD: torch.Tensor, layout: PackedLayout, timestamps_T: torch.Tensor | None) -> torch.Tensor:
        u_TC, v_TC, q_TC, k_TC = F.silu(_norm(x_TD) @ self._uvqk).split(self._sizes, dim=1)
        attended = [
            unpad(self._attend(q_TC[events], k_TC[events], v_TC[events], pad_BL, times), unpad_T)
            for events, pad_BL, unpad_T in layout.groups
            for times in [None if timestamps_T is None else timestamps_T[events]]
        ]
        # No events at all: every parameter still takes part, since DDP waits for its gradient.
        attended_TC = torch.cat(attended) if attended else v_TC + sum(bias.sum() for bias in self._biases())
        return x_TD + self.output(self.dropout(u_TC * _norm(attended_TC)))

    def _biases(self) -> list[nn.Parameter]:
        return [self.position_bias] + ([] if self.time_bias is None else [self.time_bias])

    def _attend(
        self,
        q_TC: torch.Tensor,
        k_TC: torch.Tensor,
        v_TC: torch.Tensor,
        pad_BL: torch.Tensor,
        timestamps_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """The attended values of one group, padded: ``[B, L, N * H]``."""
        q_BNLH, k_BNLH, v_BNLH = (
            pad(x_TC, pad_BL).unflatten(-1, (self._num_heads, -1)).transpose(1, 2) for x_TC in (q_TC, k_TC, v_TC)
        )
        timestamps_BL = None if self.time_bias is None or timestamps_T is None else timestamps_T[pad_BL]
        length = pad_BL.shape[1]
        blocks = []
        for first in range(0, length, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, length)
            times = None if timestamps_BL is None else timestamps_BL[:, :last]
            block = (q_BNLH[:, :, first:last], k_BNLH[:, :, :last], v_BNLH[:, :, :last], times)
            if length <= QUERY_BLOCK:  # autograd may keep the scores: they are few
                blocks.append(self._attend_block(*block))
            else:
                blocks.append(checkpoint(self._attend_block, *block, use_reentrant=False))
        return torch.cat(blocks, dim=2).transpose(1, 2).flatten(2)

    def _attend_block(
        self, q_BNQH: torch.Tensor, k_BNKH: torch.Tensor, v_BNKH: torch.Tensor, timestamps_BK: torch.Tensor | None
    ) -> torch.Tensor:
        """The last Q of K events look back; padding stands to the right of every event, where the mask hides it."""
        num_queries, num_keys = q_BNQH.shape[2], k_BNKH.shape[2]
        first = num_keys - num_queries
        places_K = torch.arange(num_keys, device=q_BNQH.device)
        distance_QK = (places_K[first:, None] - places_K).clamp(min=0)
        scores_BNQK = q_BNQH @ k_BNKH.transpose(2, 3) + _rows(self.position_bias, distance_QK)
        if self.time_bias is not None:
            assert timestamps_BK is not None
            elapsed_BQK = timestamps_BK[:, first:, None] - timestamps_BK[:, None, :]
            scores_BNQK = scores_BNQK + _rows(self.time_bias, time_buckets(elapsed_BQK))[:, None]
        # silu(0) = 0: what the mask leaves out adds nothing
        weights_BNQK = F.silu(scores_BNQK.tril(first)) / self.max_length
        return F.dropout(weights_BNQK, self.attention_dropout, self.training) @ v_BNKH


def time_buckets(elapsed_s: torch.Tensor) -> torch.Tensor:
    """Buckets, int64 in ``[0, NUM_TIME_BUCKETS]``, of int64 seconds: their log in steps of 0.301, as the reference."""
    log = elapsed_s.abs().clamp(min=1).float().log()
    return (log / _LOG_OF_STEP).long().clamp(max=NUM_TIME_BUCKETS)


def _rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    # On a CPU its backward takes an eighth of the time that of indexing takes, and a fortieth of that of F.embedding.
    return table.index_select(0, index.flatten()).view(index.shape)


def _norm(x: torch.Tensor) -> torch.Tensor:
    """The reference's norms have neither gain nor bias."""
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)
