"""Stand-ins for a model over semantic IDs, and the plain twins of the search: one prefix at a time, without a cache."""

# B = users of a batch, K = beams, V = codes of a level

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from benchmarks.generation import Attention
from muonrec.batch import HISTORY, SequenceBatch
from muonrec.data.semantic_ids.ids import SemanticIds


class TableDecoder:
    """Log-probabilities hashed from the user and the prefix: a table of them, in effect. The state is the hash."""

    device = torch.device("cpu")

    def __init__(self, semantic_ids: SemanticIds, num_beams: int = 50) -> None:
        self.semantic_ids, self.num_beams = semantic_ids, num_beams
        self.num_calls = 0  # every rank must make equally many

    def history_lengths(self, batch: SequenceBatch) -> torch.Tensor:
        return batch.features[HISTORY].lengths()[: len(batch.labels)].long()

    def begin(self, batch: SequenceBatch) -> torch.Tensor:
        return _mixed(batch.user_ids.unsqueeze(1) + 17)

    def log_probs(self, state, codes_BK, level):
        self.num_calls += 1
        if codes_BK is not None:
            state = _mixed(state * 1_000_003 + codes_BK)
        codes_V = torch.arange(self.semantic_ids.codebook_sizes[level])
        logits = (_mixed(state.unsqueeze(2) * 7919 + codes_V) % 100_003).float() / 15_000
        return logits.log_softmax(2), state

    def select(self, state, beams_BK):
        return state.gather(1, beams_BK)


class AttentiveDecoder(Attention):
    """With a cache to be reordered, or the numbers change; an empty batch has a row, as a model's may."""

    def __init__(self, semantic_ids: SemanticIds, num_beams: int = 50) -> None:
        super().__init__(semantic_ids, num_users=64, width=8, num_beams=num_beams)

    def history_lengths(self, batch: SequenceBatch) -> torch.Tensor:
        return batch.features[HISTORY].lengths()[: len(batch.labels)].long()

    def begin(self, batch: SequenceBatch):
        if len(batch.user_ids) == 0:
            batch = dataclasses.replace(batch, user_ids=torch.zeros(1, dtype=torch.int64))
        return super().begin(batch)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ (x >> 29)) * -4658895280553007687  # splitmix64's
    return (x ^ (x >> 32)) & (2**40 - 1)


def log_probs_after(decoder, user: SequenceBatch, prefix: tuple[int, ...]) -> np.ndarray:
    """Float32 ``[V]`` of the codes after ``prefix``, for a batch of one user, from scratch."""
    log_probs, state = decoder.log_probs(decoder.begin(user), None, 0)
    for level, code in enumerate(prefix, start=1):
        state = decoder.select(state, torch.zeros(1, 1, dtype=torch.int64))
        log_probs, state = decoder.log_probs(state, torch.tensor([[code]]), level)
    return log_probs[0, 0].numpy()


def plain_beam_search(decoder, user: SequenceBatch, num_beams: int, seen: set[int] = frozenset()) -> dict[int, float]:
    """Items and scores, best first: a dict of prefixes, and a beam at a time; with enough beams, every item."""
    codes = [tuple(row) for row in decoder.semantic_ids.codes.tolist()]
    below: dict[tuple[int, ...], list[int]] = {}
    for item, row in enumerate(codes):
        for level in range(len(row) + 1):
            below.setdefault(row[:level], []).append(item)
    first_key = {prefix: min(tie_key(item) for item in items) for prefix, items in below.items()}
    beams = {(): np.float32(0)}
    for level in range(len(codes[0])):
        log_probs = {prefix: log_probs_after(decoder, user, prefix) for prefix in beams}
        reached = {}
        for prefix in below:
            if len(prefix) == level + 1 and prefix[:-1] in beams and not set(below[prefix]) <= seen:
                reached[prefix] = beams[prefix[:-1]] + log_probs[prefix[:-1]][prefix[-1]]
        best = sorted(reached, key=lambda prefix: (-reached[prefix], first_key[prefix]))[:num_beams]
        beams = {prefix: reached[prefix] for prefix in best}
    return {below[prefix][0]: float(score) for prefix, score in beams.items()}


def tie_key(item: int) -> int:
    return ((item + 1) * 0x9E3779B97F4A7C15) % 2**62
