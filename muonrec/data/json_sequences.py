"""Cut a JSON object of a user per entry into events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from muonrec.data.json_object import JsonObject, read_object
from muonrec.data.sift import SHOWN_CHARACTERS, Rejects, as_encodable, sift
from muonrec.data.text import Chunk

_BATCH_USERS = 2**13


def json_sequence_chunks(path: Path) -> Iterator[Chunk]:
    """Users, items and no times of ``{user id: [item id, ...], ...}``, read as a whole; a line is an entry, from 1.

    Raises:
        ValueError: the file is no such object, or is empty.
    """
    users = read_object(path, what="event", expected="user id -> list of item ids")
    return _chunks(path, users)


def _chunks(path: Path, users: JsonObject) -> Iterator[Chunk]:
    names = ("user_id", "item_id")
    for start in range(0, len(users), _BATCH_USERS):
        rejects = Rejects(path)
        lines: list[int] = []
        ids: tuple[list[str], list[str]] = ([], [])
        for line, (user, items) in enumerate(users[start : start + _BATCH_USERS], start=start + 1):
            if not isinstance(items, list) or isinstance(items, JsonObject):
                rejects.add(
                    np.array([line]), "wrong_json_type", f"user {_shown_json(user)} has {_shown_json(items)}, no list"
                )
            elif not items:
                rejects.add(np.array([line]), "no_items", f"user {_shown_json(user)} has no item")
            else:
                for item in items:
                    if type(item) in (int, str):
                        lines.append(line)
                        ids[0].append(as_encodable(user))
                        ids[1].append(as_encodable(str(item)))
                    else:
                        reason = f"user {_shown_json(user)} has the item {_shown_json(item)}, expected text or a number"
                        rejects.add(np.array([line]), "wrong_json_type", reason)
        columns = [pa.array(column, pa.string()) for column in ids]
        share = min(start + _BATCH_USERS, len(users)) / len(users)
        yield sift(columns, np.array(lines, dtype=np.int64), names, "s", rejects), rejects.batch(), share


def _shown_json(value: Any) -> str:
    return json.dumps(dict(value) if isinstance(value, JsonObject) else value)[:SHOWN_CHARACTERS]
