"""Candidates: which items a batch's targets compete with, drawn as a function of seed and step alone."""

# K = shared negatives, T = targets of this rank's share, M = negatives of one target

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

Candidates = Literal["none", "all", "in_batch", "uniform", "popularity", "mixed", "per_target"]


@dataclasses.dataclass(frozen=True)
class CandidateSampler:
    """Draws the candidates of a global batch.

    Shared negatives are the same on every rank (a function of ``seed`` and ``step``); negatives of one target are drawn
    per virtual stream (a function of ``seed``, ``step`` and the stream), so neither depends on the number of ranks.

    Args:
        kind: ``none``; ``all`` items; ``in_batch``: the other targets of the rank's share; ``uniform`` or
            ``popularity`` (training counts to the power of 0.75, Mikolov et al. 2013) or ``mixed`` (each uniform or by
            training counts at even odds, as in-batch and uniform negatives together are; Yang et al. 2020): ``count``
            shared negatives, drawn with replacement; ``per_target``: ``count`` uniform negatives for each target.
        num_items: rows of the item table.
        count: negatives, ignored for ``none``, ``all`` and ``in_batch``.
        item_counts: int64 ``[num_items]``, occurrences in the training events; for ``popularity`` and ``in_batch``.
        seed: of the draws.

    Raises:
        ValueError: a sampled kind without ``count``, or a popularity one without counts.
    """

    kind: Candidates
    num_items: int
    count: int = 0
    item_counts: np.ndarray | None = None
    seed: int = 0
    _probability: np.ndarray | None = dataclasses.field(init=False, repr=False, default=None)
    _cumulative: np.ndarray | None = dataclasses.field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.kind in ("uniform", "popularity", "mixed", "per_target") and self.count < 1:
            raise ValueError(
                f"candidates {self.kind!r} need at least one negative, found count={self.count}; set num_negatives"
            )
        if self.kind in ("popularity", "mixed", "in_batch") and self.item_counts is None:
            raise ValueError(f"candidates {self.kind!r} need the items' training counts; pass item_counts")
        probability = self._sampling_probability()
        object.__setattr__(self, "_probability", probability)
        object.__setattr__(self, "_cumulative", np.cumsum(probability) if probability is not None else None)

    def shared(self, step: int) -> np.ndarray:
        """Ids int64 ``[K]`` of global batch ``step``: all items, or the shared negatives, or none."""
        if self.kind == "all":
            return np.arange(self.num_items, dtype=np.int64)
        if self.kind == "uniform":
            return self._generator(step).integers(0, self.num_items, self.count, dtype=np.int64)
        if self.kind in ("popularity", "mixed"):
            assert self._cumulative is not None
            draws = self._generator(step).random(self.count)
            return np.minimum(np.searchsorted(self._cumulative, draws, side="right"), self.num_items - 1).astype(
                np.int64
            )
        return np.empty(0, dtype=np.int64)

    def per_target(self, step: int, stream: int, num_targets: int) -> np.ndarray:
        """Ids int64 ``[num_targets, M]`` for one stream's targets in global batch ``step``."""
        return self._generator(step, stream).integers(0, self.num_items, (num_targets, self.count), dtype=np.int64)

    def log_q(self, item_ids: np.ndarray) -> np.ndarray:
        """Float32 log sampling probability of ``item_ids``; empty where the draw is uniform (a constant cancels)."""
        if self._probability is None:
            return np.empty(0, dtype=np.float32)
        return np.log(self._probability[item_ids]).astype(np.float32)

    def _sampling_probability(self) -> np.ndarray | None:
        if self.kind not in ("popularity", "mixed", "in_batch"):
            return None
        # An item never seen in training still needs a finite log: it counts as seen once.
        counts = np.maximum(np.asarray(self.item_counts, dtype=np.float64), 1.0)
        weights = counts**0.75 if self.kind == "popularity" else counts
        probability = weights / weights.sum()
        return (probability + 1.0 / self.num_items) / 2 if self.kind == "mixed" else probability

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, 0xCA9D, *key])))
