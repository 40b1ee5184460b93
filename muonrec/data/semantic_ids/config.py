"""What ``data.semantic_ids`` may say; needs no torch, so that the stages that only read a config stay light."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator
from upath import UPath

from muonrec.config import Config, name_only
from muonrec.data.places import Place
from muonrec.dense_optimizer import AdamWConfig, DenseOptimizerConfig, MuonConfig


class ReadyMade(Config):
    """Codes that somebody else made: JSON of raw item id -> codes, numbers or tokens such as ``<a_12>``.

    So publish them MiniOneRec (Kong et al. 2025) and other re-implementations of TIGER.

    Attributes:
        path: the file, which may be compressed.
        ignore_unknown: leave out its items that the data set does not have, as after a k-core; else they are an error.
    """

    name: Literal["ready_made"] = "ready_made"
    path: str
    ignore_unknown: bool = False


class Text(Config):
    """What ``data.items`` says of the items, as a sentence-transformers model reads it (Rajput et al. 2023 do so).

    Attributes:
        model: name on the hub, or folder; a model that is on this machine is read without a network.
        columns: of items.parquet, in the order in which the model reads them.
        batch_size: texts that the model takes at a time.
    """

    name: Literal["text"] = "text"
    model: str
    columns: tuple[Literal["title", "brand", "categories", "features", "description", "price"], ...] = Field(
        default=("title", "brand", "categories", "description"), min_length=1
    )
    batch_size: int = Field(default=64, ge=1)


class Embeddings(Config):
    """A matrix that somebody else made, a row per item.

    Attributes:
        path: ``.npy`` of ``[rows, width]`` numbers, or ``.parquet`` with a column of ids and one of lists.
        ids: of an ``.npy``: text file of raw item ids, a line per row; null: rows are in order of the item vocabulary.
        id_column, vector_column: of a ``.parquet``.
        ignore_unknown: leave out rows of items that the data set does not have; else they are an error.
    """

    name: Literal["embeddings"] = "embeddings"
    path: str
    ids: str | None = None
    id_column: str = "item_id"
    vector_column: str = "embedding"
    ignore_unknown: bool = False


class Cooccurrence(Config):
    """Which items users met near each other in the training part: no text is needed, nothing held out is seen.

    Positive pointwise mutual information of two items within a window, smoothed, cut down to its largest singular
    values (Levy, Goldberg & Dagan 2015, whose recommended settings the defaults are where they have one).

    Attributes:
        window: events of a user that an item is counted with, on either side.
        smoothing: power of the contexts' counts; below 1, it keeps rare items from looking alike.
        dim: width of the vectors.
    """

    name: Literal["cooccurrence"] = "cooccurrence"
    window: int = Field(default=5, ge=1)
    smoothing: float = Field(default=0.75, gt=0, le=1)
    dim: int = Field(default=64, ge=1)


class ResidualKMeans(Config):
    """k-means on the vectors, again on what its centres leave of them, and so on.

    Attributes:
        num_levels: of codes.
        codebook_size: centres of each level.
        max_rounds: of each k-means, which ends before where nothing moves any more.
    """

    name: Literal["residual_kmeans"] = "residual_kmeans"
    num_levels: int = Field(default=3, ge=1)
    codebook_size: int = Field(default=256, ge=2)
    max_rounds: int = Field(default=50, ge=1)


class RqVae(Config):
    """An autoencoder whose code is a sum of codewords, one of each level; sizes are those of Rajput et al. (2023).

    Attributes:
        num_levels: of codes.
        codebook_size: codewords of each level.
        hidden_dims: of the encoder's layers; the decoder has them the other way round.
        latent_dim: width of the codewords.
        commitment_weight: of the loss that keeps the encoder near its codewords.
        optimizer: of the matrices of encoder and decoder: ``muon`` or ``adamw``, with their settings.
        adamw: of codebooks and biases.
        batch_size: items of a step.
        num_epochs, patience: at most so many; it ends before where ``patience`` epochs bring no better reconstruction,
            by a thousandth; the best one stands.
        kmeans_rounds: of the k-means that the codebooks start from.
    """

    name: Literal["rqvae"] = "rqvae"
    num_levels: int = Field(default=3, ge=1)
    codebook_size: int = Field(default=256, ge=2)
    hidden_dims: tuple[Annotated[int, Field(ge=1)], ...] = (512, 256, 128)
    latent_dim: int = Field(default=32, ge=1)
    commitment_weight: float = Field(default=0.25, ge=0)
    optimizer: DenseOptimizerConfig = MuonConfig()
    adamw: AdamWConfig = AdamWConfig(weight_decay=0.0)
    batch_size: int = Field(default=1024, ge=1)
    num_epochs: int = Field(default=500, ge=1)
    patience: int = Field(default=30, ge=1)
    kmeans_rounds: int = Field(default=10, ge=1)


IdsSource: TypeAlias = Annotated[
    ReadyMade | Text | Embeddings | Cooccurrence, Field(discriminator="name"), BeforeValidator(name_only)
]
IdsMethod: TypeAlias = Annotated[RqVae | ResidualKMeans, Field(discriminator="name"), BeforeValidator(name_only)]


FILES = ("path", "ids")  # settings of a source that name files: what they hold decides, not where they lie


class SemanticIdsConfig(Config):
    """Codes of every item, for models that generate.

    Attributes:
        source: what the codes are made of, by ``name``.
        method: how vectors become codes, by ``name``; null for a source that is codes already.
        collisions: of items with the same codes: ``extra_level`` gives every item a running number among those that
            share its codes as one more code (Rajput et al. 2023), where any do; ``reassign_last`` leaves the nearest
            where it is and moves the others to the nearest free codes of the last level.
        normalize: divide each vector by its length first.
        seed: of all that is drawn.
        device: what computes. ``cuda`` adds in any order, so that a seed gives like codes there and not the same.
        output: folder of the IDs, or its URL on an object store; null: ``<data.output>-semantic-ids``.
    """

    source: IdsSource
    method: IdsMethod | None = None
    collisions: Literal["extra_level", "reassign_last"] = "extra_level"
    normalize: bool = True
    seed: int = Field(default=0, ge=0)
    device: Literal["cpu", "cuda"] = "cpu"
    output: Place | None = None

    @model_validator(mode="after")
    def _has_what_the_source_needs(self) -> SemanticIdsConfig:
        if isinstance(self.source, ReadyMade):
            if self.method is not None:
                raise ValueError(f"source ready_made is codes already; leave out method {self.method.name}")
            if self.collisions == "reassign_last":
                raise ValueError(
                    "source ready_made has no vectors that say which code is near; set collisions: extra_level"
                )
        elif self.method is None:
            raise ValueError(
                f"source {self.source.name} gives vectors; name the method that makes codes of them: rqvae or "
                "residual_kmeans"
            )
        return self

    def place(self, dataset: Path | UPath) -> Path | UPath:
        """The folder of the IDs of the items of ``dataset``.

        Beside the data set and not in it: that is replaced as a whole where a setting changes, and IDs that took hours
        may be right for the next one.
        """
        return self.output or dataset.with_name(f"{dataset.name}-semantic-ids")

    def deciding_settings(self) -> dict[str, Any]:
        """The settings without those under which the codes would be the same, or are meant to be."""
        leave_out: Any = {"output": True, "device": True, "source": set(FILES)}
        return self.model_dump(mode="json", exclude=leave_out)
