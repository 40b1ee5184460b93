"""Generation: rankings of items made code by code, by a model over semantic IDs."""

from muonrec.generation.beam_search import Beams, CodeDecoder, SeenLeaves, beam_search
from muonrec.generation.ranking import rank_generated, rank_held_out
from muonrec.generation.trie import CodeTrie, TrieLevel

__all__ = [
    "Beams",
    "CodeDecoder",
    "CodeTrie",
    "SeenLeaves",
    "TrieLevel",
    "beam_search",
    "rank_generated",
    "rank_held_out",
]
