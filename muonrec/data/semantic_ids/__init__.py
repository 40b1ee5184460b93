"""Semantic IDs: a short tuple of codes for every item, near items sharing the first ones."""

from muonrec.data.semantic_ids.ids import SemanticIds

__all__ = ["SemanticIds"]
