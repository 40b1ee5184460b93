"""Made-up data sets in memory, for tests that need batches and no files."""

import numpy as np

from muonrec.data.shards import Sequences


def made_up_sequences(num_users: int = 203, num_items: int = 57, *, longest: int = 40, seed: int = 0) -> Sequences:
    """Random users of 3 to ``longest`` events, the last two held out."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, longest + 1, num_users)
    values = generator.integers(0, num_items, lengths.sum()).astype(np.int32)
    ones = np.ones(num_users, dtype=np.int32)
    return Sequences(
        values=values,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        num_train=(lengths - 2).astype(np.int32),
        num_valid=ones,
        num_test=ones,
        user_ids=np.arange(num_users, dtype=np.int64),
        num_items=num_items,
        item_train_counts=np.bincount(values, minlength=num_items).astype(np.int64),
        manifest=None,  # type: ignore[arg-type]
    )
