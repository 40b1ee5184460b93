"""Models: each is two attributes, `embeddings` and `tower`, and one line in MODELS."""

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Field

from muonrec.config import name_only
from muonrec.models.encoder import ShardedEncoder
from muonrec.models.hstu import HSTU, HSTUConfig
from muonrec.models.sasrec import SASRec, SASRecConfig

MODELS: dict[str, Any] = {"sasrec": SASRec, "hstu": HSTU}

if TYPE_CHECKING:
    ModelConfig = Any
else:
    # The settings of any of MODELS, told apart by their name.
    ModelConfig = Annotated[
        Union[tuple(model.config_class for model in MODELS.values())],  # noqa: UP007
        Field(discriminator="name"),
        BeforeValidator(name_only),
    ]

__all__ = ["HSTU", "HSTUConfig", "MODELS", "ModelConfig", "SASRec", "SASRecConfig", "ShardedEncoder"]
