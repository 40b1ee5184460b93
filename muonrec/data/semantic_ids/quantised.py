"""Vectors as sums of codewords, one of each level."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

# N = items, D = width of the vectors, E = width of the codewords, K = codes of a level


@dataclasses.dataclass(frozen=True)
class Codewords:
    """What codes stand for.

    Attributes:
        vectors_ND: float32, what was to be told by codes.
        encoded_NE: float32, in the space of the codewords.
        codebooks: of each level, float32 ``[K, E]``.
        decode: sums of codewords, float32 ``[N, E]``, to vectors ``[N, D]``.
    """

    vectors_ND: np.ndarray
    encoded_NE: np.ndarray
    codebooks: Sequence[np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray] = lambda sums: sums

    def sums(self, codes: np.ndarray, num_levels: int | None = None) -> np.ndarray:
        """Sum of each item's codewords on the first levels, float32 ``[N, E]``."""
        sums_NE = np.zeros_like(self.encoded_NE)
        for level, codebook_KE in enumerate(self.codebooks[:num_levels]):
            sums_NE += codebook_KE[codes[:, level]]
        return sums_NE

    def reconstruction_error(self, codes: np.ndarray) -> float:
        """Share of the vectors' variance that ``codes`` do not tell; 0 is all told, 1 no better than the mean."""
        variance = np.square(self.vectors_ND - self.vectors_ND.mean(0), dtype=np.float64).sum()
        left = np.square(self.vectors_ND - self.decode(self.sums(codes)), dtype=np.float64).sum()
        return float(left / variance) if variance else 0.0


@dataclasses.dataclass(frozen=True)
class Quantised:
    """The codes of every item before collisions are resolved.

    Attributes:
        codes: int64 ``[num_items, num_levels]``.
        codebook_sizes: codes there are on each level.
        codewords: None of codes that were ready-made.
    """

    codes: np.ndarray
    codebook_sizes: tuple[int, ...]
    codewords: Codewords | None = None
