"""Tokenizer: batches of items become batches of tokens, on the host."""

# I = items, L = levels

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from muonrec.batch import CANDIDATES, HISTORY, TARGETS, USER, SequenceBatch
from muonrec.data.loader import check_ids
from muonrec.data.semantic_ids.ids import SemanticIds


class Tokenizer:
    """Writes items as tokens, which are the rows of one table: the codes, those of a level after those before it.

    Args:
        ids: the codes of every item.
        num_user_tokens: users share this many tokens, by the remainder of their row (the paper's hash is not given).
    """

    def __init__(self, ids: SemanticIds, *, num_user_tokens: int) -> None:
        sizes = np.array(ids.codebook_sizes)
        self._tokens_IL = torch.from_numpy(ids.codes + (np.cumsum(sizes) - sizes))
        self._num_user_tokens = num_user_tokens
        self.num_tokens = int(sizes.sum())

    def for_training(self, batch: SequenceBatch) -> SequenceBatch:
        """``batch`` with the tokens of histories and targets; ``labels``, one a user or one an event, stay items.

        Raises:
            ValueError: an item without codes.
        """
        return self._tokenized(batch, batch.user_ids, targets=self._tokens(batch.labels, TARGETS))

    def for_decoding(self, batch: SequenceBatch, user_ids: np.ndarray) -> SequenceBatch:
        """An evaluation ``batch`` with the tokens of the histories, and all tokens there are as ``candidates``.

        Args:
            batch: of `evaluation_batches`.
            user_ids: int64 ``[B]``, rows of the user vocabulary, where ``batch.user_ids`` may name targets.

        Raises:
            ValueError: an item without codes.
        """
        none = torch.empty(0, dtype=torch.int64)
        everything = torch.arange(self.num_tokens)
        return self._tokenized(batch, torch.from_numpy(user_ids), targets=none, candidates=everything)

    def _tokenized(
        self,
        batch: SequenceBatch,
        user_ids: torch.Tensor,
        *,
        targets: torch.Tensor,
        candidates: torch.Tensor | None = None,
    ) -> SequenceBatch:
        history, stride = batch.features[HISTORY], batch.features.stride()
        num_levels, num_users = self._tokens_IL.size(1), len(user_ids)
        lengths = torch.zeros(4, stride, dtype=torch.int64)  # at least one row, also without users
        lengths[0] = history.lengths() * num_levels
        if targets.numel() == lengths[0].sum():
            lengths[1] = lengths[0]  # one for each event
        elif targets.numel():
            lengths[1, :num_users] = num_levels
        lengths[3, :num_users] = 1
        values = [self._tokens(history.values(), HISTORY), targets, user_ids % self._num_user_tokens]
        if candidates is not None:
            lengths[2, 0] = candidates.numel()
            values.insert(2, candidates)
        features = KeyedJaggedTensor(
            keys=[HISTORY, TARGETS, CANDIDATES, USER],
            values=torch.cat(values),
            lengths=lengths.flatten(),
            stride=stride,
        )
        return dataclasses.replace(batch, features=features)

    def _tokens(self, items: torch.Tensor, feature: str) -> torch.Tensor:
        check_ids(items.numpy(), table="item", feature=feature, num_embeddings=len(self._tokens_IL))
        return self._tokens_IL[items].flatten()
