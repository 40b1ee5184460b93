"""Vectors of items from their texts, by a sentence-transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from muonrec.data.semantic_ids.config import Text

# Texts are sorted by length within a call of the model: many batches at once waste less on padding.
_BATCHES_AT_ONCE = 32


def item_texts(items: pa.Table, columns: Sequence[str]) -> list[str]:
    """What is known of each item, a line ``column: value`` each, lists joined by commas; empty where nothing is.

    Args:
        items: as `muonrec.data.shards.load_items` gives them.
        columns: in the order of the lines.
    """
    texts = []
    for row in items.select(list(columns)).to_pylist():
        known = {name: ", ".join(value) if isinstance(value, list) else value for name, value in row.items()}
        texts.append("\n".join(f"{name}: {value}" for name, value in known.items() if value not in (None, "")))
    return texts


def encode_texts(
    source: Text, texts: Sequence[str], *, device: str, on_items: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """The model's vector of each text, float32 ``[num_items, width]``; zeros for an empty one.

    Args:
        source: the model and how many texts it takes at a time.
        texts: of every item.
        device: ``cpu`` or ``cuda``.
        on_items: told how many items are done.

    Raises:
        ImportError: sentence-transformers is not installed.
        ValueError: no such model, it cannot be loaded, or no item has a text.
    """
    told = [row for row, text in enumerate(texts) if text]
    if not told:
        raise ValueError(
            f"no item has a text in {', '.join(source.columns)}; name other data.semantic_ids.source.columns, or see "
            "that data.items describes the items of the log"
        )
    model = _load(source.model, device)
    vectors: np.ndarray | None = None
    step = source.batch_size * _BATCHES_AT_ONCE
    for start in range(0, len(told), step):
        rows = told[start : start + step]
        encoded = model.encode(
            [texts[row] for row in rows],
            batch_size=source.batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
        )
        if vectors is None:
            vectors = np.zeros((len(texts), encoded.shape[1]), dtype=np.float32)
        vectors[rows] = encoded
        on_items(start + len(rows))
    assert vectors is not None
    return vectors


def _load(name: str, device: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ImportError(
            "data.semantic_ids.source text needs sentence-transformers: pip install 'muonrec[text]'"
        ) from None
    try:
        return SentenceTransformer(name, device=device, local_files_only=True)
    except (OSError, ValueError):
        pass  # not here: ask the hub
    try:
        return SentenceTransformer(name, device=device)
    except Exception as error:  # each version of the library and of what it downloads by has its own
        fault = " ".join(str(error).split())
        raise ValueError(
            f"text model {name!r} cannot be loaded: {fault:.300}; pass the name or the folder of a "
            "sentence-transformers model as data.semantic_ids.source.model"
        ) from None
