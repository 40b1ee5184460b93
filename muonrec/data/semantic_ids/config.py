"""What ``data.semantic_ids`` may say; needs no torch, so that the stages that only read a config stay light."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import pydantic
from upath import UPath

from muonrec.config import Config, name_only
from muonrec.data.places import Place


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


IdsSource: TypeAlias = ReadyMade


class SemanticIdsConfig(Config):
    """Section ``data.semantic_ids``.

    Attributes:
        source: what the codes are made of, by ``name``.
        collisions: of items with the same codes: ``extra_level`` gives every item a running number among those that
            share its codes as one more code (Rajput et al. 2023), where any do.
        output: folder of the IDs, or its URL on an object store; null: ``<data.output>-semantic-ids``.
    """

    source: Annotated[IdsSource, pydantic.BeforeValidator(name_only)]
    collisions: Literal["extra_level"] = "extra_level"
    output: Place | None = None

    def place(self, dataset: Path | UPath) -> Path | UPath:
        """The folder of the IDs of the items of ``dataset``.

        Beside the data set and not in it: that is replaced as a whole where a setting changes, and IDs that took hours
        may be right for the next one.
        """
        return self.output or dataset.with_name(f"{dataset.name}-semantic-ids")
