"""The encoder-decoder tower: users' events as tokens are read both ways, and an item's codes written one by one."""

# B = users, T = tokens of all users, D = width, K = beams of a user, Q = codes of a beam at once, S = tokens of a user
# N = heads, H = head width, E = events of all users, L = levels, C = codes of a level

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from muonrec.towers.attention import Attention
from muonrec.towers.packing import Groups, PackedLayout, pad, unpad
from muonrec.towers.transformer import TransformerBlock, feedforward


class Queries(NamedTuple):
    """Who attends to the tokens of a group of users: ``rows`` of what is decoded, laid out as `PackedLayout` says."""

    rows: slice
    pad_BK: torch.Tensor | None = None  # None: every user has its own beams, and all of them are there
    unpad: torch.Tensor | None = None


class Read(NamedTuple):
    """A group of users' tokens as a decoder block attends to them."""

    queries: Queries
    k_BNSH: torch.Tensor
    v_BNSH: torch.Tensor
    visible: torch.Tensor  # bool, broadcastable to [B, N, K * Q, S]


class BlockCache(NamedTuple):
    """What a decoder block keeps between two codes: keys and values of the codes so far, and of the users' tokens."""

    k_BKNQH: torch.Tensor
    v_BKNQH: torch.Tensor
    reads: list[Read]


@dataclasses.dataclass(frozen=True)
class DecoderState:
    """Users being decoded, and K beams of each: what the next code depends on.

    Args:
        log_probs_BKC: float32, of the codes of the first level; later ones come from `EncoderDecoderTower.step`.
        tokens_MD: rows of all tokens.
        caches: of each decoder block.
    """

    log_probs_BKC: torch.Tensor
    tokens_MD: torch.Tensor
    caches: list[BlockCache]

    def select(self, beams_BK: torch.Tensor) -> DecoderState:
        """New beam k of user b goes on from the old beam ``beams_BK[b, k]``, int64; their number may change."""
        index = beams_BK[:, :, None, None, None]
        caches = []
        for k, v, reads in self.caches:
            k, v = (part.gather(1, index.expand(-1, -1, *part.shape[2:])) for part in (k, v))
            caches.append(BlockCache(k, v, reads))
        return dataclasses.replace(self, caches=caches)


class EncoderDecoderTower(nn.Module):
    """TIGER's transformer (Rajput et al. 2023): T5's shape (Raffel et al. 2020), pre-norm, on packed tokens.

    A user is its own token, followed by L tokens of each event. Every token knows by its row which level it is of, so
    positions count events. The encoder looks both ways, and one item is written after all of a user's events; or it is
    ``causal``, and an item is written after each of them, which reads a user once for all of its targets (as the
    decoder-only models do, where the paper reads every prefix anew).

    Args:
        embedding_dim: D.
        codebook_sizes: codes of each level.
        num_layers: blocks of the encoder, and as many of the decoder.
        num_heads: attention heads of a block.
        head_dim: their width; None for D / N.
        feedforward_dim: width of the feed-forward layers.
        dropout: of the embedded tokens, of attention and of each residual branch.
        attention_dropout: of attention, in its place.
        max_length: events of a history.
        causal: see above; events are counted from the oldest then, and else from the latest, which is 0.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        codebook_sizes: Sequence[int],
        num_layers: int,
        num_heads: int,
        head_dim: int | None,
        feedforward_dim: int,
        dropout: float,
        attention_dropout: float | None = None,
        max_length: int,
        causal: bool,
    ) -> None:
        super().__init__()
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        self.causal = causal
        self.codebook_sizes = tuple(codebook_sizes)
        self.position = nn.Embedding(max_length, embedding_dim)
        nn.init.normal_(self.position.weight, std=0.02)
        self.start = nn.Parameter(torch.randn(embedding_dim) * 0.02)  # what the first code is written after
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(
            TransformerBlock(
                embedding_dim,
                num_heads,
                feedforward_dim,
                dropout,
                "pre",
                attention_dropout=attention_dropout,
                causal=causal,
                head_dim=head_dim,
            )
            for _ in range(num_layers)
        )
        self.encoder_norm = nn.LayerNorm(embedding_dim)
        self.decoder = nn.ModuleList(
            DecoderBlock(embedding_dim, num_heads, head_dim, feedforward_dim, dropout, attention_dropout)
            for _ in range(num_layers)
        )
        self.decoder_norm = nn.LayerNorm(embedding_dim)
        self.head = nn.Linear(embedding_dim, sum(self.codebook_sizes), bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        """The output head, by the name under which Hugging Face's models give it: what tells the optimizers."""
        return self.head

    def forward(
        self,
        users_BD: torch.Tensor,
        events_TD: torch.Tensor,
        lengths_B: torch.Tensor,
        targets_TD: torch.Tensor,
        groups: Groups,
    ) -> list[torch.Tensor]:
        """Logits ``[B, C]`` of each level, given the codes of the levels before it; ``[E, C]`` if causal.

        Args:
            users_BD: rows of the users' own tokens.
            events_TD: rows of their events' tokens, ``[E * L, D]``.
            lengths_B: int64, tokens of each user's events; longer than B where a share without users has one row.
            targets_TD: rows of the tokens of each user's target, ``[B * L, D]``; if causal, of what follows each event,
                ``[E * L, D]``.
            groups: `SequenceBatch.groups`, in events.
        """
        memory = self._encode(users_BD, events_TD, lengths_B, groups)
        if self.causal:
            memory = memory.after_each_event(lengths_B[: len(users_BD)], groups, len(self.codebook_sizes))
        given_BQD = targets_TD.unflatten(0, (-1, len(self.codebook_sizes)))[:, :-1]
        x_BQD = torch.cat([self.start.expand(len(given_BQD), 1, -1), given_BQD], dim=1)
        x_BKQD, _ = self._decode(x_BQD[:, None], memory, None, keep=False)
        weights = self.head.weight.split(self.codebook_sizes)
        return [F.linear(x_BD, weight) for x_BD, weight in zip(x_BKQD[:, 0].unbind(1), weights, strict=True)]

    def begin(
        self,
        users_BD: torch.Tensor,
        events_TD: torch.Tensor,
        lengths_B: torch.Tensor,
        tokens_MD: torch.Tensor,
        groups: Groups,
    ) -> DecoderState:
        """Read the users and take the step to the first code; arguments as of `forward`, ``tokens_MD`` all rows."""
        memory = self._encode(users_BD, events_TD, lengths_B, groups)
        x_BKQD, caches = self._decode(self.start.expand(len(users_BD), 1, 1, -1), memory, None)
        return DecoderState(self._log_probs(x_BKQD, 0), tokens_MD, caches)

    def step(self, state: DecoderState, codes_BK: torch.Tensor, level: int) -> tuple[torch.Tensor, DecoderState]:
        """Log probabilities ``[B, K, C]``, float32, of the codes of ``level >= 1``, after ``codes_BK`` on the last."""
        x_BKQD = F.embedding(codes_BK + sum(self.codebook_sizes[: level - 1]), state.tokens_MD)[:, :, None]
        x_BKQD, caches = self._decode(x_BKQD, None, state.caches)
        return self._log_probs(x_BKQD, level), dataclasses.replace(state, caches=caches)

    def _encode(
        self, users_BD: torch.Tensor, events_TD: torch.Tensor, lengths_B: torch.Tensor, groups: Groups
    ) -> _Memory:
        num_users, num_levels = len(users_BD), len(self.codebook_sizes)
        lengths_B = lengths_B[:num_users] + 1
        groups = [(users, users + events * num_levels, 1 + longest * num_levels) for users, events, longest in groups]
        layout = PackedLayout.of(lengths_B, groups)
        # One gather lays each user's own token before those of its events.
        rows = torch.cat([users_BD, events_TD])
        is_user_T = layout.position_T == 0
        user_T = torch.cumsum(is_user_T, 0) - 1
        at_T = torch.where(is_user_T, user_T, num_users + torch.arange(len(user_T), device=user_T.device) - user_T - 1)
        # A user's own token is no event, and has no position.
        from_edge_T = layout.position_T - 1 if self.causal else layout.from_end_T
        position_TD = self.position(torch.where(is_user_T, 0, from_edge_T) // num_levels)
        x_TD = F.embedding(at_T, rows) + position_TD.masked_fill(is_user_T[:, None], 0.0)
        x_TD = self.dropout(x_TD)
        for block in self.encoder:
            x_TD = block(x_TD, layout)
        return _Memory.of(self.encoder_norm(x_TD), layout, groups)

    def _decode(
        self, x_BKQD: torch.Tensor, memory: _Memory | None, caches: list[BlockCache] | None, *, keep: bool = True
    ) -> tuple[torch.Tensor, list[BlockCache]]:
        x_BKQD = self.dropout(x_BKQD)
        kept = []
        for number, block in enumerate(self.decoder):
            x_BKQD, *cache = block(x_BKQD, memory, None if caches is None else caches[number], keep=keep)
            kept += cache
        return self.decoder_norm(x_BKQD), kept

    def _log_probs(self, x_BKQD: torch.Tensor, level: int) -> torch.Tensor:
        logits_BKC = F.linear(x_BKQD[:, :, -1], self.head.weight.split(self.codebook_sizes)[level])
        return logits_BKC.float().log_softmax(-1)


class _Memory(NamedTuple):
    """What the encoder made of the users' tokens, packed; and for each group who attends to them, and to which."""

    x_TD: torch.Tensor
    layout: PackedLayout
    queries: list[Queries]
    visible: list[torch.Tensor]

    @classmethod
    def of(cls, x_TD: torch.Tensor, layout: PackedLayout, groups: Groups) -> _Memory:
        """One that each user attends to all of its tokens of; ``groups`` in tokens."""
        ends = list(itertools.accumulate(users for users, _, _ in groups))
        queries = [Queries(slice(end - users, end)) for end, (users, _, _) in zip(ends, groups, strict=True)]
        return cls(x_TD, layout, queries, [inside_BS[:, None, None] for inside_BS in layout.inside])

    def after_each_event(self, lengths_B: torch.Tensor, groups: Groups, num_levels: int) -> _Memory:
        """The same, attended to after each event by L codes, which see the tokens up to it; ``groups`` in events."""
        events = PackedLayout.of(lengths_B // num_levels, groups)
        queries = [Queries(*group) for group in events.groups]
        visible = []
        for (_, pad_BS, _), (_, _, longest) in zip(self.layout.groups, groups, strict=True):
            # Padding stands to the right of what an event may see.
            ends_Q = torch.arange(1, longest + 1, device=pad_BS.device).repeat_interleave(num_levels) * num_levels
            visible.append(torch.arange(pad_BS.size(1), device=pad_BS.device) <= ends_Q[:, None])
        return self._replace(queries=queries, visible=visible)


class DecoderBlock(nn.Module):
    """Attention to the codes so far and to the user's tokens, and a feed-forward layer; pre-norm residual branches."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        head_dim: int | None,
        feedforward_dim: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(embedding_dim)
        self.self_attention = Attention(embedding_dim, num_heads, attention_dropout, head_dim=head_dim)
        self.cross_norm = nn.LayerNorm(embedding_dim)
        self.cross_attention = Attention(embedding_dim, num_heads, attention_dropout, head_dim=head_dim)
        self.feedforward_norm = nn.LayerNorm(embedding_dim)
        self.feedforward = feedforward(embedding_dim, feedforward_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BKQD: torch.Tensor, memory: _Memory | None, cache: BlockCache | None, *, keep: bool
    ) -> tuple[torch.Tensor] | tuple[torch.Tensor, BlockCache]:
        """The first codes, with what the encoder made of the users; or one more code, with the block's own cache.

        Returns what to go on with after them if asked to ``keep`` it.
        """
        attended, k_BKNQH, v_BKNQH = self._attend_to_codes(self.self_norm(x_BKQD), cache)
        x_BKQD = x_BKQD + self.dropout(attended)
        if cache is None:
            assert memory is not None
            reads = self._read(memory)
        else:
            reads = cache.reads
        x_BKQD = x_BKQD + self.dropout(self._attend_to_user(self.cross_norm(x_BKQD), reads))
        x_BKQD = x_BKQD + self.dropout(self.feedforward(self.feedforward_norm(x_BKQD)))
        return (x_BKQD, BlockCache(k_BKNQH, v_BKNQH, reads)) if keep else (x_BKQD,)

    def _attend_to_codes(
        self, x_BKQD: torch.Tensor, cache: BlockCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention = self.self_attention
        q, k, v = (attention.heads(part(x_BKQD)) for part in (attention.query, attention.key, attention.value))
        if cache is not None:
            k, v = torch.cat([cache.k_BKNQH, k], dim=-2), torch.cat([cache.v_BKNQH, v], dim=-2)
        # Several codes at once are the first ones; a single one sees all that are there.
        attended = attention.attend(*(part.flatten(0, 1) for part in (q, k, v)), causal=cache is None)
        return attention.output(attended.unflatten(0, x_BKQD.shape[:2])), k, v

    def _read(self, memory: _Memory) -> list[Read]:
        attention, layout = self.cross_attention, memory.layout
        k_TD, v_TD = attention.key(memory.x_TD), attention.value(memory.x_TD)
        if not layout.groups:  # no users: both projections still take part, since DDP waits for their gradients
            k_BNSH, v_BNSH = (attention.heads(part_TD[None][:0]) for part_TD in (k_TD, v_TD))
            return [Read(Queries(slice(0, 0)), k_BNSH, v_BNSH, torch.ones(0, 0, dtype=torch.bool, device=k_TD.device))]
        reads = []
        groups = zip(layout.groups, memory.queries, memory.visible, strict=True)
        for (tokens, pad_BS, _), queries, visible in groups:
            k_BNSH, v_BNSH = (attention.heads(pad(part_TD[tokens], pad_BS)) for part_TD in (k_TD, v_TD))
            reads.append(Read(queries, k_BNSH, v_BNSH, visible))
        return reads

    def _attend_to_user(self, x_BKQD: torch.Tensor, reads: list[Read]) -> torch.Tensor:
        attention = self.cross_attention
        q_BQD = attention.query(x_BKQD).flatten(1, 2)
        attended = []
        for (rows, pad_BK, unpad_T), k_BNSH, v_BNSH, visible in reads:
            # To the user's tokens all of its beams, or all its events, are so many queries.
            mine_BQD = q_BQD[rows]
            if pad_BK is not None:
                mine_BQD = pad(mine_BQD.flatten(1), pad_BK).view(len(pad_BK), -1, q_BQD.size(2))
            attended_BQD = attention.attend(attention.heads(mine_BQD), k_BNSH, v_BNSH, visible=visible)
            if pad_BK is not None and unpad_T is not None:
                attended_BQD = unpad(attended_BQD.unflatten(1, (pad_BK.size(1), -1)).flatten(2), unpad_T)
            attended.append(attended_BQD.view(-1, *q_BQD.shape[1:]))
        return attention.output(torch.cat(attended)).view_as(x_BKQD)
