"""Read semantic IDs that somebody else made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from muonrec.data.json_object import JsonObject, read_object
from muonrec.data.semantic_ids.config import ReadyMade

_TOKEN = re.compile(r"<([A-Za-z]+)_(\d{1,9})>")
_SHOWN = 5


def read_ready_made(source: ReadyMade, path: Path, raw_ids: Sequence[str]) -> np.ndarray:
    """The codes of every item, int64 ``[num_items, num_levels]`` in the order of ``raw_ids``.

    Args:
        source: how to read.
        path: the file that ``source`` names.
        raw_ids: the item vocabulary.

    Raises:
        ValueError: the file is no JSON object of codes, an item of either side is missing on the other, or has codes
            that are unlike those of the others; the item is named.
    """
    entries = read_object(path, what="item", expected='item id -> codes, such as {"7": ["<a_12>", "<b_3>"]}')
    codes: dict[str, list[int]] = {}
    levels: list[str] | None = None
    for item, tokens in entries:
        if item in codes:
            raise ValueError(f"{path}: item {item!r} stands twice; keep one of them")
        names, codes[item] = _codes_of(path, item, tokens)
        levels = names if levels is None else levels
        if names != levels:
            raise ValueError(
                f"{path}: item {item!r} has the levels {', '.join(names)}, the first item has {', '.join(levels)}; "
                "every item needs a code of each level, in the same order"
            )
    rows = rows_of(path, list(codes), raw_ids, ignore_unknown=source.ignore_unknown, what="codes")
    return np.array(list(codes.values()), dtype=np.int64)[rows]


def rows_of(path: Path, ids: Sequence[str], raw_ids: Sequence[str], *, ignore_unknown: bool, what: str) -> np.ndarray:
    """The place in ``ids`` of each of ``raw_ids``, int64.

    Args:
        path: where ``ids`` stand, for the messages.
        ids: a row each.
        raw_ids: the item vocabulary.
        ignore_unknown: whether ``ids`` may hold others.
        what: an id has there, for the messages.

    Raises:
        ValueError: an item of either side is missing on the other, or stands twice; it is named.
    """
    places = {item: place for place, item in enumerate(ids)}
    if len(places) < len(ids):
        twice = next(item for place, item in enumerate(ids) if places[item] != place)
        raise ValueError(f"{path}: item {twice!r} stands twice; keep one of them")
    if missing := [item for item in raw_ids if item not in places]:
        raise ValueError(
            f"{path} lacks {what} for {_some(missing)}, {len(missing):,} of the {len(raw_ids):,} items of the data "
            "set; pass the file that was made for these items, or name another data.semantic_ids.source"
        )
    if not ignore_unknown and len(places) > len(raw_ids):
        unknown = sorted(places.keys() - set(raw_ids))
        raise ValueError(
            f"{path} has {what} for {_some(unknown)}, {len(unknown):,} items that the data set does not have; pass the "
            "file that was made for these items, or set data.semantic_ids.source.ignore_unknown=true"
        )
    return np.array([places[item] for item in raw_ids], dtype=np.int64)


def _codes_of(path: Path, item: str, tokens: Any) -> tuple[list[str], list[int]]:
    """Names of the levels, and the code on each."""
    if not isinstance(tokens, list) or isinstance(tokens, JsonObject) or not tokens:
        raise ValueError(f"{path}: item {item!r} has {tokens!r:.60}, expected a list of codes")
    names, codes = [], []
    for level, token in enumerate(tokens):
        if type(token) is int and 0 <= token < 2**31:
            name, code = str(level), token
        elif isinstance(token, str) and (match := _TOKEN.fullmatch(token)):
            name, code = match[1], int(match[2])
        else:
            raise ValueError(
                f"{path}: item {item!r} has the code {token!r:.60}, expected a number from 0 on or a token like <a_12>"
            )
        names.append(name)
        codes.append(code)
    return names, codes


def _some(items: Sequence[str]) -> str:
    return ", ".join(map(repr, items[:_SHOWN])) + (", ..." if len(items) > _SHOWN else "")
