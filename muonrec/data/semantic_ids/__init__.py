"""Semantic IDs: a short tuple of codes for every item, near items sharing the first ones."""

from muonrec.data.semantic_ids.ids import SemanticIds
from muonrec.data.semantic_ids.stored import load_semantic_ids
from muonrec.data.semantic_ids.tokens import Tokenizer

__all__ = ["SemanticIds", "load_semantic_ids", "Tokenizer"]
