"""Models: each is two attributes, `embeddings` and `tower`, and one line in MODELS."""

from muonrec.models.encoder import ShardedEncoder
from muonrec.models.sasrec import SASRec, SASRecConfig

MODELS = {"sasrec": SASRec}

__all__ = ["MODELS", "SASRec", "SASRecConfig", "ShardedEncoder"]
