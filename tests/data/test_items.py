"""Item metadata: one schema from every format, plain texts, and bad rows told apart at their line."""

import gzip
import json
import math
import tracemalloc
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from muonrec.data.items import ITEM_SCHEMA, FileItems, read_items
from muonrec.data.rejected import RejectedRows

NOTHING = dict.fromkeys(ITEM_SCHEMA.names)


def read(path: Path, name: str, rejected: RejectedRows | None = None, **settings: object) -> list[dict]:
    source = TypeAdapter(FileItems).validate_python({"format": name, "path": str(path), **settings})
    reader = read_items(source) if rejected is None else read_items(source, on_rejected=rejected)
    table = reader.read_all()
    table.validate(full=True)
    assert table.schema == ITEM_SCHEMA
    return table.to_pylist()


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def item(row: int, item_id: str, **known: object) -> dict:
    return {**NOTHING, "item_id": item_id, "source_row": row, **known}


META_2014 = (
    r"""{'asin': 'B1', 'title': "Bob's \"Best\" caf\xe9 &amp; bar", 'price': 12.99, 'brand': 'Bob\u2019s', """
    r"""'imUrl': 'http://x', 'salesRank': {'Beauty': 5}, 'related': {'also_bought': ['B2']}, """
    r"""'description': "<p>Fine,\n  cheap \d</p>", 'categories': [['Beauty', 'Hair Care'], """
    """['Beauty', 'Tools &amp; More']]}"""
    "\n{'asin': 'B2', 'title': '', 'description': '  '}\n"
)
META_2018 = [
    {
        "asin": "B1", "title": "A <b>bold</b> title", "brand": "Acme &amp; Sons", "category": ["Beauty", "Hair Care"],
        "main_cat": "All Beauty", "description": ["First part.", "", "Second &lt;br /&gt;part."],
        "feature": ["Washable", "Washable", "100 % wool"], "price": "$1,299.50", "rank": "3 in X", "also_buy": [],
    },
    {
        "asin": "B2", "title": "\n var aPageStart = (new Date()).getTime();\n", "category": [], "brand": "",
        "main_cat": '<img src="x.png" alt="Amazon"/>', "price": ".a-box-inner{background-color:#fff}",
    },
    {"asin": "B3", "category": [], "main_cat": "All Beauty", "price": "$4.99 - $12.99"},
]  # fmt: skip
META_2023 = [
    {
        "parent_asin": "B1", "main_category": "All Beauty", "title": "A brush", "features": ["Soft"], "price": 7,
        "description": ["For", "hair."], "store": "The shop", "categories": ["Beauty", "Brushes"],
        "details": {"Brand": "Acme", "Color": "Red"}, "images": [{"thumb": "x"}], "bought_together": None,
    },
    {"parent_asin": "B2", "main_category": "All Beauty", "categories": [], "store": "The shop", "details": {},
     "price": "from 4.99"},
    {"parent_asin": "B3", "title": None, "description": [], "features": [], "price": "None", "details": None},
]  # fmt: skip


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_metadata_of_2014_are_literals_of_python(tmp_path: Path, packed: str) -> None:
    assert read(write(tmp_path / f"meta_Beauty.json{packed}", META_2014), "amazon_2014") == [
        item(
            0, "B1", title='Bob\'s "Best" café & bar', brand="Bob’s", price=12.99, description=r"Fine, cheap \d",
            categories=["Beauty", "Hair Care", "Tools & More"],
        ),
        item(1, "B2"),
    ]  # fmt: skip


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_metadata_of_2018_are_freed_of_what_their_crawler_brought(tmp_path: Path, packed: str) -> None:
    path = write(tmp_path / f"meta_Beauty.json{packed}", "\n".join(map(json.dumps, META_2018)))
    assert read(path, "amazon_2018") == [
        item(
            0, "B1", title="A bold title", brand="Acme & Sons", categories=["Beauty", "Hair Care"], price=1299.5,
            features=["Washable", "100 % wool"], description="First part. Second part.",
        ),
        item(1, "B2"),
        item(2, "B3", categories=["All Beauty"], price=4.99),
    ]  # fmt: skip


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_metadata_of_2023_name_the_parent_and_prefer_the_brand_to_the_store(tmp_path: Path, packed: str) -> None:
    path = write(tmp_path / f"meta_All_Beauty.jsonl{packed}", "\n".join(map(json.dumps, META_2023)) + "\n")
    assert read(path, "amazon_2023") == [
        item(
            0, "B1", title="A brush", brand="Acme", categories=["Beauty", "Brushes"], features=["Soft"],
            description="For hair.", price=7.0,
        ),
        item(1, "B2", categories=["All Beauty"], brand="The shop", price=4.99),
        item(2, "B3"),
    ]  # fmt: skip


FILMS = [item(0, "1", title="Café: Story (1995)", categories=["Comedy", "Drama"]), item(1, "2", title="Quiz|Show, The")]
FLAGS = "|".join("1" if place in (5, 8) else "0" for place in range(19))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "movies.csv",
            'movieId,title,genres\n1,Café: Story (1995),Comedy|Drama\n2,"Quiz|Show, The",(no genres listed)\n',
        ),
        ("movies.dat", "1::Café: Story (1995)::Comedy|Drama\n2::Quiz|Show, The::(no genres listed)\n"),
        ("movies.dat", "1::Café: Story (1995)::Comedy|Drama\n2::Quiz|Show, The::\n".encode("latin-1")),
        ("movies.dat.gz", "1::Café: Story (1995)::Comedy|Drama\n2::Quiz|Show, The::\n"),
        ("u.item", f"1|Café: Story (1995)|01-Jan-1995||http://x|{FLAGS}\n".encode("latin-1")),
    ],
)
def test_every_film_list_gives_the_same_items(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert read(write(tmp_path / name, content), "movielens") == (FILMS[:1] if name == "u.item" else FILMS)


def test_recbole_items_are_found_by_their_columns(tmp_path: Path) -> None:
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    text = header + "1\tToy Story\t1995\tComedy Children's\n2\t\t\t\n"
    columns = {"title": "movie_title", "categories": "class"}
    assert read(write(tmp_path / "a.item", text), "recbole", columns=columns) == [
        item(0, "1", title="Toy Story", categories=["Comedy", "Children's"]),
        item(1, "2"),
    ]


def test_csv_and_parquet_of_ones_own_are_read_alike(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'sku,title,price,categories\n007,"Two\nlines",3.50,a|b|a\n8,,,\n')
    expected = [item(0, "007", title="Two lines", price=3.5, categories=["a", "b"]), item(1, "8")]
    assert read(path, "csv", columns={"item_id": "sku"}) == expected
    table = {
        "sku": ["007", "8"], "title": ["Two\nlines", None], "price": [Decimal("3.50"), None],
        "categories": [["a", "b", "a"], None],
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "parquet", columns={"item_id": "sku"}) == expected
    pq.write_table(pa.table({"item_id": [7], "title": ["x"]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", "parquet") == [item(0, "7", title="x")]


def test_rows_are_numbered_over_all_files_of_a_glob(tmp_path: Path) -> None:
    for name in "ba":
        write(tmp_path / f"{name}.csv", f"item_id,title\n{name}1,x\n{name}2,y\n")
    rows = read(tmp_path / "*.csv", "csv")
    assert [(row["item_id"], row["source_row"]) for row in rows] == [("a1", 0), ("a2", 1), ("b1", 2), ("b2", 3)]


LITERALS = b"{'asin': 'A', 'title': 't'}\n%s\n{'asin': 'B'}\n"
JSONS = b'{"asin": "A", "title": "t"}\n%s\n{"asin": "B"}\n'
JSONS_2023 = b'{"parent_asin": "A", "title": "t"}\n%s\n{"parent_asin": "B"}\n'
TABLE = b"item_id,title\nA,t\n%s\nB,\n"
DAT = b"A::t::Drama\n%s\nB::::\n"
ITEM = b"A|t|||" + b"|0" * 19 + b"\n%s\nB||||" + b"|0" * 19 + b"\n"

# format, file, its content around the bad row, the bad row, line, kind, what the reason says
BAD_ITEMS = [
    ("amazon_2014", "m.json", LITERALS, b'{"asin": true}', 2, "not_a_literal", "is no Python dict of literals"),
    ("amazon_2014", "m.json", LITERALS, b"{'asin': __import__('os').getcwd()}", 2, "not_a_literal", "a name, a call"),
    ("amazon_2014", "m.json", LITERALS, b"{'asin': [x for x in 'a']}", 2, "not_a_literal", "is no Python dict of"),
    ("amazon_2014", "m.json", LITERALS, b"{'asin': 'A'", 2, "not_a_literal", "'{' was never closed at character 1"),
    ("amazon_2014", "m.json", LITERALS, b"{'asin': 'A}", 2, "not_a_literal", "unterminated string literal"),
    ("amazon_2014", "m.json", LITERALS, b"{['a']: 1}", 2, "not_a_literal", "is no Python dict of literals"),
    ("amazon_2014", "m.json", LITERALS, b"'asin'", 2, "not_a_literal", "is no Python dict but str"),
    ("amazon_2014", "m.json", LITERALS, b"{'asin': 'A', 'x': " + b"[" * 99_999 + b"}", 2, "", ""),
    ("amazon_2014", "m.json", LITERALS, b"", 2, "blank", "holds nothing"),
    ("amazon_2014", "m.json", LITERALS, b"{'title': 't'}", 2, "no_item_id", "field 'asin' is empty; every row needs"),
    ("amazon_2014", "m.json", LITERALS, b"{'asin': '  '}", 2, "no_item_id", "field 'asin' is empty"),
    ("amazon_2014", "m.json", LITERALS, b"{'asin': 7}", 2, "wrong_type", "field 'asin' is 7, expected a string"),
    ("amazon_2014", "m.json", LITERALS, b"{'asin': 'A', 'title': {'a': 1}}", 2, "wrong_type", "'title' holds {'a': 1}"),
    ("amazon_2014", "m.json", LITERALS, b"{'asin': 'A', 'title': True}", 2, "wrong_type", "'title' holds True, "),
    ("amazon_2014", "m.json", LITERALS, b"{'asin': 'A', 'title': b'x'}", 2, "wrong_type", "'title' holds b'x', "),
    ("amazon_2014", "m.json", LITERALS, b"{'asin': '\xff'}", 2, "not_utf8", "is not UTF-8 text"),
    ("amazon_2014", "m.json", LITERALS, b"{'asin': '" + b"x" * 2**20 + b"'}", 2, "too_long", "at most 1048576"),
    ("amazon_2018", "m.json", JSONS, b"{'asin': 'A'}", 2, "not_json", "is no JSON object: Expecting property name"),
    ("amazon_2018", "m.json", JSONS, b'{"asin": "A"', 2, "not_json", "is no JSON object: Expecting ',' delimiter"),
    ("amazon_2018", "m.json", JSONS, b'{"asin": "A"}{"asin": "B"}', 2, "not_json", "Extra data at character 14"),
    ("amazon_2018", "m.json", JSONS, b"null", 2, "not_json", "is no JSON object but NoneType"),
    ("amazon_2018", "m.json", JSONS, b'["asin"]', 2, "not_json", "is no JSON object but list"),
    ("amazon_2018", "m.json", JSONS, b'{"asin": null}', 2, "no_item_id", "field 'asin' is empty"),
    ("amazon_2018", "m.json", JSONS, b'{"asin": "\\ud800"}', 2, "not_utf8", "field 'asin' is not UTF-8 text"),
    ("amazon_2018", "m.json", JSONS, b'{"asin": "A", "category": [{"a": 1}]}', 2, "wrong_type", "holds {'a'"),
    ("amazon_2018", "m.json", JSONS, b'{"asin": "A", "x": ' + b"[" * 99_999 + b"}", 2, "nested_too_deeply", "nested"),
    ("amazon_2018", "m.json", JSONS, b'{"asin": "A", "x": ' + b"9" * 5000 + b"}", 2, "not_json", "is no JSON object: "),
    ("amazon_2023", "m.jsonl", JSONS_2023, b'{"asin": "A"}', 2, "no_item_id", "field 'parent_asin' is empty"),
    ("csv", "m.csv", TABLE, b"C", 3, "wrong_number_of_fields", "has 1 fields, expected 2"),
    ("csv", "m.csv", TABLE, b",t", 3, "no_item_id", "field 'item_id' is empty"),
    ("csv", "m.csv", TABLE, b",", 3, "blank", "holds nothing in 'item_id', 'title'"),
    ("csv", "m.csv", TABLE, b"\xff,t", 3, "not_utf8", "field 'item_id' is not UTF-8 text"),
    ("movielens", "movies.dat", DAT, b"C::t", 2, "wrong_number_of_fields", "has 2 fields, expected 3"),
    ("movielens", "movies.dat", DAT, b"::t::Drama", 2, "no_item_id", "field 'item_id' is empty"),
    ("movielens", "u.item", ITEM, b"C|t|||x|0", 2, "wrong_number_of_fields", "has 6 fields, expected 24"),
    ("movielens", "u.item", ITEM, b"C|t|||x" + b"|0" * 18 + b"|7", 2, "wrong_genre", "genre of '7', expected 0 or 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "around", "row", "line", "kind", "reason"), BAD_ITEMS, ids=range(len(BAD_ITEMS))
)
def test_a_bad_item_is_rejected_with_its_line_and_the_others_are_read(
    tmp_path: Path, name: str, file: str, around: bytes, row: bytes, line: int, kind: str, reason: str
) -> None:
    write(tmp_path / file, around.replace(b"%s", row))
    with RejectedRows(tmp_path / "rejected.parquet") as rejected:
        rows = read(tmp_path / file, name, rejected)
    assert [(row["item_id"], row["title"], row["source_row"]) for row in rows] == [("A", "t", 0), ("B", None, 1)]
    (found,) = pq.read_table(tmp_path / "rejected.parquet").to_pylist()
    assert (found["file"], found["line"]) == (str(tmp_path / file), line)
    assert found["kind"] == kind or not kind
    assert reason in found["reason"]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("csv", "m.csv", b"", "m.csv is empty; pass a file with at least one item"),
        ("csv", "m.csv", b"item_id,title\n", "m.csv has a header and no items; pass a file with at least one row"),
        (
            "csv",
            "m.csv",
            b"sku,title\n1,t\n",
            "m.csv has no column 'item_id'; it has 'sku', 'title'. Name them in data.items",
        ),
        ("csv", "m.csv", b"item_id,name\n1,t\n", "says nothing of its items: it has 'item_id', 'name'; name its title"),
        ("csv", "m.csv", b"item_id,title,title\n1,t,t\n", "column 'title' stands twice; data.items.columns must name"),
        ("csv", "m.csv", b'item_id,title\n1,"t\n2,u\n', "m.csv, line 2: a quote is opened and never closed"),
        ("recbole", "m.item", b"item_id,title\n1,t\n", "has no column 'item_id'; it has 'item_id,title'"),
        ("amazon_2014", "m.jsonl", b"{}", "m.jsonl ends in none of .json \\(or those and .gz\\)"),
        ("amazon_2023", "m.json", b"{}", "m.json ends in none of .jsonl"),
        ("amazon_2018", "m.json", b"\n\n", "m.json has no items; pass a file with at least one row"),
        ("amazon_2018", "m.json.gz", b"{}", "m.json.gz cannot be read: .*check its format"),
        ("movielens", "ratings.data", b"1\t2", "ratings.data ends in none of .csv, .dat, .item"),
        ("parquet", "m.parquet", b"PAR1", "m.parquet is no Parquet file .* set data.items.format to what it is"),
    ],
)
def test_metadata_of_wrong_structure_stop_at_once(
    tmp_path: Path, name: str, file: str, content: bytes, message: str
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / file, name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": [1.5], "title": ["t"]}, "column 'item_id' is double, but ids are strings or integers"),
        ({"item_id": pa.array([], pa.string()), "title": pa.array([], pa.string())}, "has no items"),
        ({"item_id": [None, "b"], "title": ["t", "t"]}, "line 1: field 'item_id' is empty"),
        ({"item_id": ["a"], "title": [{"x": 1}]}, "line 1: field 'title' holds {'x': 1}, expected text"),
    ],
)
def test_parquet_items_are_refused_naming_file_and_row(tmp_path: Path, columns: dict, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "m.parquet", "parquet")


def test_missing_metadata_name_their_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; pass a file, .* as data\.items\.path=\.\.\."):
        read(tmp_path / "nothing.csv", "csv")


def test_literals_made_to_exhaust_the_parser_are_rejected_like_others(tmp_path: Path) -> None:
    hostile = [
        "-" * 99_999 + "1",
        "+".join("1" * 99_999),
        "(" * 9_999,
        "{1:" * 9_999,
        "a" + "()" * 99_999,
        "9" * 99_999,
    ]
    hostile += ["0x" + "f" * 99_999, "\0"]
    path = write(tmp_path / "m.json", "".join(f"{{'asin': {value}}}\n" for value in hostile) + "{'asin': 'A'}\n")
    with RejectedRows(tmp_path / "rejected.parquet") as rejected:
        assert read(path, "amazon_2014", rejected) == [item(0, "A")]
    assert rejected.num_by_kind.total() == len(hostile)
    assert set(rejected.num_by_kind) == {"nested_too_deeply", "not_a_literal", "wrong_type"}


@pytest.mark.parametrize(
    ("value", "price"),
    [
        (0, 0.0), (12, 12.0), ("12", 12.0), ("$ 12.5", 12.5), ("$1,234.56", 1234.56), ("From 3 - $4", 3.0),
        (" $7 ", 7.0),
        (-1, None), (math.nan, None), (math.inf, None), (True, None), ("", None), ("12 EUR", None), ("free", None),
        ("$", None), ([1], None), (10**400, None), (None, None),
    ],
)  # fmt: skip
def test_a_price_is_one_number_or_nothing(tmp_path: Path, value: object, price: float | None) -> None:
    path = write(tmp_path / "m.json", json.dumps({"asin": "A", "price": value}))
    assert read(path, "amazon_2018") == [item(0, "A", price=price)]


def test_blocks_and_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps({"asin": f"B{row}", "title": "x" * (row % 90)}) for row in range(500)]
    rows[7] = rows[400] = "{torn}"
    path = write(tmp_path / "m.json", "\n".join(rows))
    found = []
    for block_bytes, batch_rows in ((2**24, 2**13), (300, 7), (2**24, 7)):
        monkeypatch.setattr("muonrec.data.text._BLOCK_BYTES", block_bytes)
        monkeypatch.setattr("muonrec.data.items._BATCH_ROWS", batch_rows)
        with RejectedRows(tmp_path / "rejected.parquet") as rejected:
            found.append(read(path, "amazon_2018", rejected))
        assert pq.read_table(tmp_path / "rejected.parquet").column("line").to_pylist() == [8, 401]
    assert found[0] == found[1] == found[2] and len(found[0]) == 498


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muonrec.data.text._BLOCK_BYTES", 2**18)
    line = json.dumps({"asin": "B", "title": "t" * 100, "description": ["d" * 900]}) + "\n"
    peaks = []
    for num_items in (1_000, 6_000):
        source = TypeAdapter(FileItems).validate_python(
            {"format": "amazon_2018", "path": str(write(tmp_path / "m.json.gz", line * num_items))}
        )
        tracemalloc.start()
        arrow_before, arrow_peak, num_rows = pa.total_allocated_bytes(), 0, 0
        for batch in read_items(source):
            num_rows += len(batch)
            arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - arrow_before)
        peaks.append(tracemalloc.get_traced_memory()[1] + arrow_peak)
        tracemalloc.stop()
        assert num_rows == num_items
    assert peaks[1] < 1.5 * peaks[0] < 20 * 2**20


LINE = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [b'{"asin": "A"}', b"{'asin': 'B'}", b'{"asin": "A", "title": ["\\u0000", 3]}', b"A::t::x", b"A,t", b'"']
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(LINE, min_size=1, max_size=8),
    name=st.sampled_from(["amazon_2014", "amazon_2018", "csv", "movielens"]),
)
def test_any_bytes_give_items_and_rejected_rows_or_a_message(tmp_path: Path, lines: list[bytes], name: str) -> None:
    path = tmp_path / {"csv": "m.csv", "movielens": "movies.dat"}.get(name, "m.json")
    path.write_bytes((b"item_id,title\n" if name == "csv" else b"") + b"\n".join(lines))
    with RejectedRows(tmp_path / "rejected.parquet") as rejected:
        try:
            rows = read(path, name, rejected)
        except pa.ArrowInvalid:
            raise
        except ValueError as error:
            assert str(path) in str(error)
            return
    assert (
        len(rows) + rejected.num_by_kind.total() <= path.read_bytes().count(b"\n") + path.read_bytes().count(b"\r") + 1
    )
