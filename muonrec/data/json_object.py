"""Read a file that is one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from muonrec.data.text import read_text, refuse_empty


class JsonObject(list[tuple[str, Any]]):
    """The entries of an object, whose objects are such lists too; a dict would drop all but the last of equal keys."""


def read_object(path: Path, *, what: str, expected: str) -> JsonObject:
    """The entries of the object that ``path`` holds, in order; the file may be compressed.

    Args:
        path: read as a whole.
        what: the object is of, for the messages.
        expected: how an entry looks, for the messages.

    Raises:
        ValueError: the file is missing, empty or no such object, or the object has no entry.
    """
    refuse_empty(path, what)
    try:
        entries = json.loads(read_text(path), object_pairs_hook=JsonObject)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; check that the file is whole") from None
    if not isinstance(entries, JsonObject):
        raise ValueError(f"{path} holds a {type(entries).__name__}, expected a JSON object of {expected}")
    if not entries:
        raise ValueError(f"{path} has no {what}: its object is empty; pass one of {expected}")
    return entries
