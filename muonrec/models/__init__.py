"""Models: each is two attributes, `embeddings` and `tower`, and one line in MODELS."""

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Field

from muonrec.config import name_only
from muonrec.models.caser import Caser, CaserConfig
from muonrec.models.encoder import ShardedEncoder, scorer_of
from muonrec.models.gru4rec import GRU4Rec, GRU4RecConfig
from muonrec.models.hstu import HSTU, HSTUConfig
from muonrec.models.sasrec import SASRec, SASRecConfig
from muonrec.models.tiger import ShardedDecoder, Tiger, TigerConfig

MODELS: dict[str, Any] = {
    "sasrec": SASRec,
    "gru4rec": GRU4Rec,
    "caser": Caser,
    "hstu": HSTU,
    "tiger": Tiger,
}

if TYPE_CHECKING:
    ModelConfig = Any
else:
    # The settings of any of MODELS, told apart by their name.
    ModelConfig = Annotated[
        Union[tuple(model.config_class for model in MODELS.values())],  # noqa: UP007
        Field(discriminator="name"),
        BeforeValidator(name_only),
    ]

__all__ = [
    "HSTU",
    "HSTUConfig",
    "MODELS",
    "Caser",
    "CaserConfig",
    "GRU4Rec",
    "GRU4RecConfig",
    "ModelConfig",
    "SASRec",
    "SASRecConfig",
    "ShardedDecoder",
    "ShardedEncoder",
    "Tiger",
    "TigerConfig",
    "scorer_of",
]
