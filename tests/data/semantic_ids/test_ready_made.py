"""Codes that somebody else made come in the order of the vocabulary, and unfit ones are named."""

import json
from pathlib import Path

import pytest

from muonrec.data.semantic_ids.config import ReadyMade
from muonrec.data.semantic_ids.ready_made import read_ready_made

RAW_IDS = ["b", "a", "7"]


def read(tmp_path: Path, text: str, **settings: object) -> list[list[int]]:
    path = tmp_path / "index.json"
    path.write_text(text)
    return read_ready_made(ReadyMade(path=str(path), **settings), path, RAW_IDS).tolist()


def test_numbers_and_tokens_give_the_same_codes_in_the_order_of_the_vocabulary(tmp_path: Path) -> None:
    numbers = {"7": [0, 255], "a": [12, 3], "b": [1, 3]}
    tokens = {item: [f"<a_{codes[0]}>", f"<b_{codes[1]}>"] for item, codes in numbers.items()}
    for index in (numbers, tokens):
        assert read(tmp_path, json.dumps(index)) == [[1, 3], [12, 3], [0, 255]]


GOOD = '"a": [1, 2], "b": [3, 4]'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{{{GOOD}}}", "lacks codes for '7', 1 of the 3 items of the data set; pass the file that was made"),
        (f'{{{GOOD}, "7": [5, 6], "c": [7, 8]}}', "has codes for 'c', 1 items that the data set does not have; .*"),
        (f'{{{GOOD}, "7": [5]}}', "item '7' has the levels 0, the first item has 0, 1; every item needs a code of"),
        (f'{{{GOOD}, "7": ["<a_1>", "<b_2>"]}}', "item '7' has the levels a, b, the first item has 0, 1"),
        (f'{{{GOOD}, "7": []}}', r"item '7' has \[\], expected a list of codes"),
        (f'{{{GOOD}, "7": {{"0": 1}}}}', "item '7' has .*, expected a list of codes"),
        (f'{{{GOOD}, "7": [5, -1]}}', "item '7' has the code -1, expected a number from 0 on or a token like <a_12>"),
        (f'{{{GOOD}, "7": [5, true]}}', "item '7' has the code True"),
        (f'{{{GOOD}, "7": [5, "6"]}}', "item '7' has the code '6'"),
        (f'{{{GOOD}, "a": [1, 2], "7": [5, 6]}}', "item 'a' stands twice; keep one of them"),
        ("[]", "index.json holds a list, expected a JSON object of item id -> codes"),
        ("", "index.json is empty; pass a file with at least one item"),
    ],
)
def test_unfit_codes_are_refused_naming_the_item(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_items_that_a_filter_dropped_may_be_left_out(tmp_path: Path) -> None:
    text = f'{{{GOOD}, "7": [5, 6], "c": [7, 8]}}'
    assert read(tmp_path, text, ignore_unknown=True) == [[3, 4], [1, 2], [5, 6]]
