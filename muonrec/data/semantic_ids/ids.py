"""SemanticIds: the codes of every item, in memory."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class SemanticIds:
    """A tuple of codes for every item, no two items alike.

    Args:
        codes: int64 ``[num_items, num_levels]``; row i belongs to row i of the item vocabulary, every code of level l
            is in ``[0, codebook_sizes[l])``.
        codebook_sizes: codes there are on each level.

    Raises:
        ValueError: a code is outside its codebook, or two items have the same codes.
    """

    codes: np.ndarray
    codebook_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        num_items, num_levels = self.codes.shape
        if num_levels != len(self.codebook_sizes):
            raise ValueError(f"items have {num_levels} codes, but codebook_sizes names {len(self.codebook_sizes)}")
        outside = ((self.codes < 0) | (self.codes >= np.array(self.codebook_sizes))).any(1)
        if outside.any():
            item = int(outside.argmax())
            raise ValueError(
                f"item {item} has codes {self.codes[item].tolist()}, outside the codebooks {self.codebook_sizes}"
            )
        num_unique = len(np.unique(self.codes, axis=0))
        if num_unique != num_items:
            raise ValueError(
                f"{num_items} items share {num_unique} tuples of codes, so they cannot be told apart; resolve the "
                "collisions, by an extra level or by reassigning the last"
            )

    @property
    def fingerprint(self) -> str:
        """Sha256 of the codes and the codebook sizes."""
        return hashlib.sha256(
            repr(self.codebook_sizes).encode() + np.ascontiguousarray(self.codes).tobytes()
        ).hexdigest()
