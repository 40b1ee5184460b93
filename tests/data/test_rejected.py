"""Bad input: every kind is found at its line, counted, written, and stops the run only above the set share."""

import gzip
import json
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muonrec.data.events import (
    READERS,
    AmazonSource,
    CsvSource,
    JsonSequencesSource,
    MovielensSource,
    ParquetSource,
    RecboleSource,
    SequencesSource,
)
from muonrec.data.rejected import REJECTED_SCHEMA, RejectedRows

SOURCES = {
    "csv": CsvSource,
    "parquet": ParquetSource,
    "recbole": RecboleSource,
    "sequences": SequencesSource,
    "json_sequences": JsonSequencesSource,
    "amazon_2014": AmazonSource,
    "amazon_2018": AmazonSource,
    "amazon_2023": AmazonSource,
    "movielens": MovielensSource,
}
CSV = b"user_id,item_id,timestamp_s\nu,i,5\n%s\nv,j,6\n"  # the bad row stands in line 3
RECBOLE = b"user_id:token\titem_id:token\ttimestamp:float\nu\ti\t5\n%s\nv\tj\t6\n"
RATINGS = b"u,i,5.0,5\nw,k,1.0,5\n%s\nv,j,4.0,6\n"
DAT = b"1::2::5::5\n3::4::5::5\n%s\n3::5::1::6\n"
REVIEW = b'{"reviewerID": "%s", "asin": "i", "unixReviewTime": 5}'
REVIEWS = REVIEW % b"u" + b"\n" + REVIEW % b"w" + b"\n%s\n" + REVIEW % b"v" + b"\n"
OBJECT = b'{"u": [1, 2],\n"w": [1],\n%s\n"v": [3]}'
LINES = b"u 1 2\nw 1\n%s\nv 3\n"

# format, file, its content around the bad row, the bad row, kind, what the reason says
BAD_ROWS = [
    ("csv", "a.csv", CSV, b",i,5", "no_user_id", "column 'user_id' is empty; every event needs a user and an item"),
    ("csv", "a.csv", CSV, b"u,,5", "no_item_id", "column 'item_id' is empty"),
    ("csv", "a.csv", CSV, b"  ,i,5", "no_user_id", "column 'user_id' is empty"),
    ("csv", "a.csv", CSV, b'"",i,5', "no_user_id", "column 'user_id' is empty"),
    ("csv", "a.csv", CSV, b"u,i,", "no_time", "column 'timestamp_s' is empty; drop the row or set columns.timestamp_s"),
    ("csv", "a.csv", CSV, b"u,i,noon", "time_not_a_number", "is 'noon', expected a number of s since 1970"),
    ("csv", "a.csv", CSV, b"u,i,nan", "time_not_a_number", "is 'nan', expected a number"),
    ("csv", "a.csv", CSV, b"u,i,inf", "time_not_a_number", "is 'inf', expected a number"),
    ("csv", "a.csv", CSV, b"u,i,0x10", "time_not_a_number", "is '0x10', expected a number"),
    ("csv", "a.csv", CSV, b"u,i,2020-09-13", "time_not_a_number", "is '2020-09-13', expected a number"),
    ("csv", "a.csv", CSV, b"u,i,1 000", "time_not_a_number", "is '1 000', expected a number"),
    ("csv", "a.csv", CSV, "u,i,٣".encode(), "time_not_a_number", "is '٣', expected a number"),
    ("csv", "a.csv", CSV, b"u,i,--5", "time_not_a_number", "is '--5', expected a number"),
    ("csv", "a.csv", CSV, b"u,i,-4", "time_before_1970", "is '-4', expected a number of s since 1970, not before"),
    ("csv", "a.csv", CSV, b"u,i,1600000000000", "time_too_late", "looks like milliseconds though s was stated; set"),
    ("csv", "a.csv", CSV, b"u,i,99999999999999999999", "time_too_late", "looks like milliseconds"),
    ("csv", "a.csv", CSV, b"u,i,1e999", "time_not_a_number", "is '1e999', expected a number"),
    ("csv", "a.csv", CSV, b"u,i", "wrong_number_of_fields", "has 2 fields, expected 3"),
    ("csv", "a.csv", CSV, b"u,i,5,6", "wrong_number_of_fields", "has 4 fields, expected 3"),
    ("csv", "a.csv", CSV, b'u,"i\nx,i,5\ny,i",5,6', "wrong_number_of_fields", "expected 3; quotes join 3 lines to it"),
    ("csv", "a.csv", CSV, b"u;i;5", "wrong_number_of_fields", "has 1 fields, expected 3"),
    ("csv", "a.csv", CSV, b"", "blank", "holds nothing in 'user_id', 'item_id', 'timestamp_s'"),
    ("csv", "a.csv", CSV, b",,", "blank", "holds nothing in 'user_id', 'item_id', 'timestamp_s'"),
    ("csv", "a.csv", CSV, b"\xff,i,5", "not_utf8", "column 'user_id' is not UTF-8 text"),
    ("csv", "a.csv", CSV, b"u,caf\xe9,5", "not_utf8", "column 'item_id' is not UTF-8 text"),
    ("csv", "a.csv", CSV, b"u,i,\xc3", "not_utf8", "column 'timestamp_s' is not UTF-8 text"),
    ("recbole", "a.inter", RECBOLE, b"u\t\t5", "no_item_id", "column 'item_id' is empty"),
    ("recbole", "a.inter", RECBOLE, b"u\ti", "wrong_number_of_fields", "has 2 fields, expected 3"),
    ("recbole", "a.inter", RECBOLE, b"u,i,5", "wrong_number_of_fields", "has 1 fields, expected 3"),
    ("sequences", "a.txt", LINES, b"lonely", "no_items", "has the user 'lonely' and no item; a line is a user id"),
    ("sequences", "a.txt", LINES, b"u 1 \xff", "not_utf8", "is not UTF-8 text"),
    ("sequences", "a.txt", LINES, b"u 1\x1f2", "wrong_number_of_fields", "has 2 fields, expected 1"),
    ("json_sequences", "a.json", OBJECT, b'"u": 7,', "wrong_json_type", 'user "u" has 7, no list'),
    ("json_sequences", "a.json", OBJECT, b'"u": {"1": 2},', "wrong_json_type", 'user "u" has {"1": 2}, no list'),
    ("json_sequences", "a.json", OBJECT, b'"u": [],', "no_items", 'user "u" has no item'),
    ("json_sequences", "a.json", OBJECT, b'"u": [1.5],', "wrong_json_type", "has the item 1.5, expected text or"),
    ("json_sequences", "a.json", OBJECT, b'"u": [true],', "wrong_json_type", "has the item true, expected text or"),
    ("json_sequences", "a.json", OBJECT, b'"u": [" "],', "no_item_id", "column 'item_id' is empty"),
    ("json_sequences", "a.json", OBJECT, b'"": [1],', "no_user_id", "column 'user_id' is empty"),
    ("json_sequences", "a.json", OBJECT, b'"u": ["\xff"],', "not_utf8", "column 'item_id' is not UTF-8 text"),
    ("json_sequences", "a.json", OBJECT, rb'"u": ["\ud800"],', "not_utf8", "column 'item_id' is not UTF-8 text"),
    ("amazon_2014", "a.csv", RATINGS, b",i,5.0,5", "no_user_id", "column 'user_id' is empty"),
    ("amazon_2018", "a.csv", RATINGS, b",i,5.0,5", "no_item_id", "column 'item_id' is empty"),
    ("amazon_2014", "a.json", REVIEWS, b"{'reviewerID': 'u'}", "not_json", "is no JSON object: Expecting property"),
    ("amazon_2014", "a.json", REVIEWS, REVIEW[:-1] % b"u", "not_json", 'is no JSON object: {"reviewerID": "u"'),
    ("amazon_2018", "a.json", REVIEWS, b"null", "not_json", "is no JSON object: null"),
    ("amazon_2018", "a.json", REVIEWS, b"[]", "not_json", "is no JSON object: []"),
    ("amazon_2018", "a.json", REVIEWS, b"", "not_json", "is no JSON object: "),
    ("amazon_2018", "a.json", REVIEWS, REVIEW % b"u" + REVIEW % b"v", "not_json", "is no JSON object: Extra data at"),
    ("amazon_2018", "a.json", REVIEWS, b"{}", "blank", "holds nothing in 'reviewerID', 'asin', 'unixReviewTime'"),
    ("amazon_2018", "a.json", REVIEWS, b'{"asin": "i", "unixReviewTime": 5}', "no_user_id", "column 'reviewerID' is"),
    ("amazon_2018", "a.json", REVIEWS, REVIEW % b"", "no_user_id", "column 'reviewerID' is empty"),
    (
        "amazon_2018", "a.json", REVIEWS, b'{"reviewerID": 7, "asin": "i", "unixReviewTime": 5}',
        "wrong_json_type", "field 'reviewerID' is 7, expected a string",
    ),
    (
        "amazon_2018", "a.json", REVIEWS, b'{"reviewerID": "u", "asin": ["i"], "unixReviewTime": 5}',
        "wrong_json_type", """field 'asin' is ["i"], expected a string""",
    ),
    (
        "amazon_2018", "a.json", REVIEWS, b'{"reviewerID": "u", "asin": "i", "unixReviewTime": "07 9, 2014"}',
        "wrong_json_type", "field 'unixReviewTime' is \"07 9, 2014\", expected a number",
    ),
    (
        "amazon_2018", "a.json", REVIEWS, b'{"reviewerID": "u", "asin": "i", "unixReviewTime": NaN}',
        "time_not_a_number", "column 'unixReviewTime' is nan, expected a number",
    ),
    (
        "amazon_2018", "a.json", REVIEWS, b'{"reviewerID": "u", "asin": "i", "unixReviewTime": -1}',
        "time_before_1970", "column 'unixReviewTime' is -1, expected a number of s since 1970, not before",
    ),
    (
        "amazon_2018", "a.json", REVIEWS, b'{"asin": "i", "asin": "i", "reviewerID": "u", "unixReviewTime": 5}',
        "not_json", "a field stands twice",
    ),
    ("amazon_2018", "a.json", REVIEWS, REVIEW % rb"\ud800", "not_json", "number or character is out of range"),
    ("amazon_2018", "a.json", REVIEWS, REVIEW % b"\xff", "not_utf8", "is not UTF-8 text"),
    ("movielens", "ratings.dat", DAT, b"1:2:3:4", "wrong_number_of_fields", "has 4 fields, expected 7"),
    ("movielens", "ratings.dat", DAT, b"1::2::5", "wrong_number_of_fields", "has 5 fields, expected 7"),
    ("movielens", "ratings.dat", DAT, b"1::::5::5", "no_item_id", "column 'item_id' is empty"),
]  # fmt: skip


def read(name: str, path: Path, rejected: RejectedRows) -> pa.Table:
    source = SOURCES[name].model_validate({"format": name, "path": str(path)})
    with rejected:
        return READERS[name](source, on_rejected=rejected).read_all()


@pytest.mark.parametrize(("name", "file", "around", "row", "kind", "reason"), BAD_ROWS)
def test_a_bad_row_is_rejected_with_its_line_and_the_others_are_read(
    tmp_path: Path, name: str, file: str, around: bytes, row: bytes, kind: str, reason: str
) -> None:
    (tmp_path / file).write_bytes(around.replace(b"%s", row))
    (tmp_path / f"good-{file}").write_bytes(around.replace(b"%s\n", b""))
    table = read(name, tmp_path / file, RejectedRows(tmp_path / "rejected.parquet"))
    assert table.equals(read(name, tmp_path / f"good-{file}", RejectedRows(tmp_path / "none.parquet")))
    assert not (tmp_path / "none.parquet").exists()
    (found,) = pq.read_table(tmp_path / "rejected.parquet", schema=REJECTED_SCHEMA).to_pylist()
    assert (found["file"], found["line"], found["kind"]) == (str(tmp_path / file), 3, kind)
    assert reason in found["reason"]


PARQUET = {"user_id": ["u", "w", "v"], "item_id": [1, 2, 3], "timestamp_s": [5.0, 6.0, 7.0]}


@pytest.mark.parametrize(
    ("column", "values", "kind", "reason"),
    [
        ("user_id", ["u", None, "v"], "no_user_id", "column 'user_id' is empty"),
        ("item_id", [1, None, 3], "no_item_id", "column 'item_id' is empty"),
        ("timestamp_s", [5.0, None, 7.0], "no_time", "column 'timestamp_s' is empty"),
        ("timestamp_s", [5.0, float("inf"), 7.0], "time_not_a_number", "is inf, expected a number of s since 1970"),
        ("timestamp_s", [5.0, float("nan"), 7.0], "time_not_a_number", "is nan, expected a number of s since 1970"),
        ("timestamp_s", ["5", "soon", "7"], "time_not_a_number", "is 'soon', expected a number"),
        ("timestamp_s", [5, -6, 7], "time_before_1970", "is -6, expected a number of s since 1970, not before"),
        ("timestamp_s", [5, 6 * 10**12, 7], "time_too_late", "looks like milliseconds though s was stated"),
        (
            "timestamp_s",
            [datetime(1970, 1, 1, 0, 0, 5), datetime(1969, 1, 1), datetime(1970, 1, 1, 0, 0, 7)],
            "time_before_1970",
            "is 1969-01-01 00:00:00",
        ),
    ],
)
def test_a_bad_row_of_parquet_is_rejected_with_its_row(
    tmp_path: Path, column: str, values: list, kind: str, reason: str
) -> None:
    pq.write_table(pa.table({**PARQUET, column: values}), tmp_path / "a.parquet")
    rejected = RejectedRows(tmp_path / "rejected.parquet")
    table = read("parquet", tmp_path / "a.parquet", rejected)
    assert table.column("item_id").to_pylist() == ["1", "3"]
    assert table.column("timestamp_s").to_pylist() == [5, 7]
    assert table.column("source_row").to_pylist() == [0, 1]
    (found,) = pq.read_table(tmp_path / "rejected.parquet").to_pylist()
    assert (found["line"], found["kind"]) == (2, kind)
    assert reason in found["reason"]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("csv", "a.csv", b"", "a.csv is empty; pass a file with at least one event"),
        ("csv", "a.csv", b"user_id,item_id,timestamp_s\n", "a.csv has a header and no events"),
        ("csv", "a.csv", b"user_id,item_id,timestamp_s", "a.csv has a header and no events"),
        ("csv", "a.csv", b"u,i,5\n", "has no column 'user_id', 'item_id', 'timestamp_s'; it has 'u', 'i', '5'"),
        ("csv", "a.csv", "user_id,item_id,timestamp_s\nu,i,5\n".encode("utf-16"), "a.csv has no column 'user_id'"),
        ("csv", "a.csv.gz", b"user_id,item_id,timestamp_s\n", "a.csv.gz cannot be read: .*check"),
        (
            "csv",
            "a.csv.gz",
            gzip.compress(b"user_id,item_id,timestamp_s\n" + b"u,i,5\n" * 9999)[:-40],
            "cannot be read",
        ),
        ("csv", "a.csv", CSV % b'u,"i,5', "a.csv, line 3: a quote is opened and never closed; close it, or double it"),
        ("csv", "a.csv", CSV % b'u,i,"5', "a.csv, line 3: a quote is opened and never closed"),
        ("csv", "a.csv", b"user_id,item_id,timestamp_s\ru,i,5\r", "a.csv cannot be read: new-line character seen"),
        ("sequences", "a.txt", b"\n \n", "a.txt has no events: all its lines are blank"),
        ("recbole", "a.inter", b"user_id,item_id\n", "has no column 'user_id', 'item_id', 'timestamp'"),
        ("amazon_2014", "a.txt", b"u,i,5,5\n", "a.txt ends in none of .csv, .json"),
        ("amazon_2014", "a.json", b"\n\n", "a.json has no events; pass a file with at least one row"),
        ("amazon_2023", "a.csv", b"u,i,5,5\n", "a.csv has no column 'user_id', 'parent_asin', 'timestamp'"),
        ("movielens", "ratings.csv", b"user,item\n", "has no column 'userId', 'movieId', 'timestamp'"),
        ("parquet", "a.parquet", b"PAR1", "a.parquet is no Parquet file"),
    ],
)
def test_a_wrong_structure_stops_at_once(tmp_path: Path, name: str, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(name, tmp_path / file, RejectedRows(tmp_path / "rejected.parquet"))
    assert not (tmp_path / "rejected.parquet").exists()


@pytest.mark.parametrize("block_bytes", [64, 1000, 2**24])
def test_lines_are_counted_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    rows = [b"u,i,%d" % row for row in range(300)]
    reviews = [b'{"reviewerID": "u", "asin": "i", "unixReviewTime": %d}' % row for row in range(300)]
    for bad in (7, 8, 150, 299):
        rows[bad], reviews[bad] = b"torn", b"{torn}"
    (tmp_path / "a.csv").write_bytes(b"\n".join([b"user_id,item_id,timestamp_s", *rows]))
    (tmp_path / "a.json").write_bytes(b"\n".join(reviews))
    monkeypatch.setattr("muonrec.data.text._BLOCK_BYTES", block_bytes)
    for name, file, first in (("csv", "a.csv", 2), ("amazon_2018", "a.json", 1)):
        table = read(name, tmp_path / file, RejectedRows(tmp_path / "rejected.parquet"))
        assert table.column("timestamp_s").to_pylist() == [t for t in range(300) if t not in (7, 8, 150, 299)]
        lines = pq.read_table(tmp_path / "rejected.parquet").column("line").to_pylist()
        assert lines == [first + bad for bad in (7, 8, 150, 299)]


def test_the_share_stops_with_the_three_commonest_kinds_and_an_example_of_each(tmp_path: Path) -> None:
    rows = ["u,i,5"] * 90 + ["u,i,noon"] * 4 + ["u,,5"] * 3 + [",i,5"] * 2 + ["u,i"]
    (tmp_path / "a.csv").write_text("\n".join(["user_id,item_id,timestamp_s", *rows]))
    rejected = RejectedRows(tmp_path / "rejected.parquet")
    num_events = len(read("csv", tmp_path / "a.csv", rejected))
    assert rejected.num_by_kind == {
        "time_not_a_number": 4, "no_item_id": 3, "no_user_id": 2, "wrong_number_of_fields": 1
    }  # fmt: skip
    with pytest.raises(ValueError) as error:
        rejected.check(num_events, max_share=0.099)
    file = tmp_path / "a.csv"
    assert str(error.value).splitlines() == [
        "10 of 100 rows are no events, more than max_rejected_share 0.099 allows; all are listed in "
        f"{tmp_path / 'rejected.parquet'}. The commonest:",
        f"  4 time_not_a_number, such as {file}, line 92: column 'timestamp_s' is 'noon', "
        "expected a number of s since 1970",
        f"  3 no_item_id, such as {file}, line 96: column 'item_id' is empty; every event needs a user and an item",
        f"  2 no_user_id, such as {file}, line 99: column 'user_id' is empty; every event needs a user and an item",
        "Correct the source or data.source; raise data.max_rejected_share only if the log can do without these rows",
    ]
    assert rejected.check(num_events, max_share=0.1).keys() == {
        "time_not_a_number", "no_item_id", "no_user_id", "wrong_number_of_fields"
    }  # fmt: skip
    assert not rejected.num_by_kind, "the next source is counted for itself"


def test_a_run_without_rejected_rows_removes_the_list_of_the_run_before(tmp_path: Path) -> None:
    (tmp_path / "rejected.parquet").write_text("old")
    (tmp_path / "a.json").write_text(json.dumps({"reviewerID": "u", "asin": "i", "unixReviewTime": 5}))
    assert len(read("amazon_2014", tmp_path / "a.json", RejectedRows(tmp_path / "rejected.parquet"))) == 1
    assert not (tmp_path / "rejected.parquet").exists()


LINE = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [REVIEW % b"u", REVIEW % b"v", b"{}", b"null", b'{"asin": {}}', b"u,i,5", b'"', b"u 1", b"1::2::3::4"]
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(LINE, min_size=1, max_size=8), name=st.sampled_from(["csv", "sequences", "amazon_2018", "movielens"])
)
def test_any_bytes_give_events_and_rejected_rows_or_a_message(tmp_path: Path, lines: list[bytes], name: str) -> None:
    suffix = {"csv": "csv", "sequences": "txt", "amazon_2018": "json", "movielens": "dat"}[name]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes((b"user_id,item_id,timestamp_s\n" if name == "csv" else b"") + b"\n".join(lines))
    rejected = RejectedRows(tmp_path / "rejected.parquet")
    try:
        table = read(name, path, rejected)
    except pa.ArrowInvalid:
        raise
    except ValueError as error:
        assert str(path) in str(error)
        return
    table.validate(full=True)
    if rejected.num_by_kind:
        assert (
            max(pq.read_table(tmp_path / "rejected.parquet").column("line").to_pylist())
            <= path.read_bytes().count(b"\n") + path.read_bytes().count(b"\r") + 1
        )
