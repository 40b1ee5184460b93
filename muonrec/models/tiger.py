"""TIGER (Rajput et al. 2023): an encoder-decoder that reads a user's events as semantic IDs and writes the next one."""

# B = users, K = beams of a user

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from muonrec.batch import CANDIDATES, HISTORY, TARGETS, USER, SequenceBatch
from muonrec.config import Config
from muonrec.data.loader import Samples
from muonrec.data.semantic_ids import SemanticIds, Tokenizer
from muonrec.embeddings.tables import token_tables
from muonrec.losses import TokenLoss
from muonrec.towers.encoder_decoder import DecoderState, EncoderDecoderTower


class TigerConfig(Config):
    """Settings of TIGER, which needs ``data.semantic_ids`` and the tables ``token`` and ``user``; the defaults are the
    paper's.

    Attributes:
        embedding_dim: width of the codes' embeddings, and of the hidden states.
        num_layers: blocks of the encoder, and of the decoder.
        num_heads: attention heads of a block.
        head_dim: width of each; null: ``embedding_dim`` divided by ``num_heads``.
        feedforward_dim: width of the feed-forward layers.
        dropout: of the embeddings, of attention, within feed-forward layers and of each residual branch.
        attention_dropout: null: as ``dropout``; 0 has torch's fused attention on a CPU, a step in a third of the time.
        max_length: events of a user that are read, the latest.
        samples: ``prefixes``, as the paper, reads every prefix of a user's events anew, by an encoder that looks both
            ways; ``users`` reads all of them once, by a causal encoder, and predicts each from those before it, at a
            fraction of the work.
        num_user_tokens: rows of the table ``user``, which users share.
        num_beams: prefixes that the search keeps, and items of a generated list, unless the stage says.
    """

    name: Literal["tiger"] = "tiger"
    embedding_dim: int = Field(default=128, ge=1)
    num_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=6, ge=1)
    head_dim: int | None = Field(default=64, ge=1)
    feedforward_dim: int = Field(default=1024, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float | None = Field(default=None, ge=0, lt=1)
    max_length: int = Field(default=20, ge=1)
    samples: Samples = "prefixes"
    num_user_tokens: int = Field(default=2000, ge=1)
    num_beams: int = Field(default=50, ge=10)  # validation counts ten places


class Tiger(nn.Module):
    """TIGER on packed tokens.

    Training: ``(loss, statistics)`` of a batch of `Tokenizer.for_training`. Evaluation: the `DecoderState` of the users
    of one of `Tokenizer.for_decoding`, for a beam search to go on from.

    Args:
        config: settings.
        semantic_ids: the codes of every item.
        loss: of the next item's codes.
    """

    config_class = TigerConfig
    losses = ("token_softmax",)

    def __init__(self, config: TigerConfig, *, semantic_ids: SemanticIds, loss: TokenLoss) -> None:
        super().__init__()
        self.config = config
        self.semantic_ids = semantic_ids
        self.embeddings = token_tables(sum(semantic_ids.codebook_sizes), config.num_user_tokens, config.embedding_dim)
        self.tower = EncoderDecoderTower(
            embedding_dim=config.embedding_dim,
            codebook_sizes=semantic_ids.codebook_sizes,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            feedforward_dim=config.feedforward_dim,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            max_length=config.max_length,
            causal=config.samples == "users",
        )
        self.loss = loss
        # As SASRec does: rows start small, and the residual stream should not.
        self.input_scale = config.embedding_dim**0.5

    def forward(self, batch: SequenceBatch) -> Any:
        embedded = self.embeddings(batch.features)
        users_BD = embedded[USER].values() * self.input_scale
        history = embedded[HISTORY]
        events_TD = history.values() * self.input_scale
        if not self.training:
            tokens_MD = embedded[CANDIDATES].values() * self.input_scale
            return self.tower.begin(users_BD, events_TD, history.lengths(), tokens_MD, batch.groups)
        targets_TD = embedded[TARGETS].values() * self.input_scale
        logits = self.tower(users_BD, events_TD, history.lengths(), targets_TD, batch.groups)
        return self.loss(logits, batch)

    def scorer(self, sharded: DistributedModelParallel, device: torch.device) -> ShardedDecoder:
        """What ranks items by ``sharded``, which holds this model."""
        return ShardedDecoder(sharded, device=device)


class ShardedDecoder:
    """A trained TIGER behind a beam search: every rank must make the same calls in the same order.

    Args:
        model: `DistributedModelParallel` around `Tiger`; put into evaluation mode by each call.
        device: where batches go.
    """

    def __init__(self, model: DistributedModelParallel, *, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.semantic_ids: SemanticIds = model.module.semantic_ids
        config: TigerConfig = model.module.config
        self.num_beams = config.num_beams
        self.tokenizer = Tokenizer(self.semantic_ids, num_user_tokens=config.num_user_tokens)

    @torch.no_grad()
    def begin(self, batch: SequenceBatch) -> DecoderState:
        """Read the B users of a batch of `Tokenizer.for_decoding`; one beam each, without a code yet."""
        self.model.eval()
        return self.model(batch.to(self.device))

    @torch.no_grad()
    def log_probs(
        self, state: DecoderState, codes_BK: torch.Tensor | None, level: int
    ) -> tuple[torch.Tensor, DecoderState]:
        """Log probabilities ``[B, K, codes of the level]``, float32, whatever items there are; and what to go on with.

        Args:
            state: of the K beams.
            codes_BK: int64, what each beam took on the level before; None at the first, where K is 1.
            level: of the codes, in order.
        """
        if codes_BK is None:
            assert level == 0
            return state.log_probs_BKC, state
        return self.model.module.tower.step(state, codes_BK, level)

    def select(self, state: DecoderState, beams_BK: torch.Tensor) -> DecoderState:
        """`DecoderState.select`."""
        return state.select(beams_BK)

    def history_lengths(self, batch: SequenceBatch) -> torch.Tensor:
        """Events of each user of a tokenized batch, int64 ``[B]``."""
        return batch.features[HISTORY].lengths()[: len(batch.labels)].long() // len(self.semantic_ids.codebook_sizes)
