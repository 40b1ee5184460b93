"""Readers: one schema from every format, and errors that name file and row."""

import gzip
import json
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muonrec.data.events import (
    EVENT_SCHEMA,
    READERS,
    AmazonSource,
    CsvSource,
    JsonSequencesSource,
    MovielensSource,
    ParquetSource,
    RecboleSource,
    SequencesSource,
    read_amazon,
    read_csv,
    read_json_sequences,
    read_movielens,
    read_parquet,
    read_recbole,
    read_sequences,
)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def csv_source(tmp_path: Path, text: str, **settings: object) -> CsvSource:
    return CsvSource(format="csv", path=write(tmp_path / "log.csv", text), **settings)


def test_sequence_file_gives_a_row_per_item_in_order_without_times(tmp_path: Path) -> None:
    path = write(tmp_path / "log.txt", "ann 7 8 7\n\nbob  9\t8 \n")
    table = read_sequences(SequencesSource(format="sequences", path=path)).read_all()
    assert table.schema == EVENT_SCHEMA
    assert table.column("user_id").to_pylist() == ["ann", "ann", "ann", "bob", "bob"]
    assert table.column("item_id").to_pylist() == ["7", "8", "7", "9", "8"]
    assert table.column("timestamp_s").null_count == 5
    assert table.column("source_row").to_pylist() == [0, 1, 2, 3, 4]


def test_sequence_file_keeps_quotes_and_leading_zeros(tmp_path: Path) -> None:
    path = write(tmp_path / "log.txt", 'u,1 "007" 007')
    table = read_sequences(SequencesSource(format="sequences", path=path)).read_all()
    assert table.column("user_id").to_pylist() == ["u,1", "u,1"]
    assert table.column("item_id").to_pylist() == ['"007"', "007"]


def test_a_json_object_of_sequences_gives_the_same_events_as_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write(tmp_path / "log.txt", "ann 7 008 7\n9 9 \u00e9\nann 5\n")
    as_lines = read_sequences(SequencesSource(format="sequences", path=lines)).read_all()
    text = '\ufeff{"ann": [7, "008", 7], "9": [9, "\u00e9"], "ann": ["5"]}'
    monkeypatch.setattr("muonrec.data.json_sequences._BATCH_USERS", 2)
    for path in (tmp_path / "log.json", tmp_path / "log.json.gz"):
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        shares: list[float] = []
        reader = read_json_sequences(
            JsonSequencesSource(format="json_sequences", path=str(path)), on_share=shares.append
        )
        assert reader.read_all().equals(as_lines)
        assert shares == [2 / 3, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "log.json is empty; pass a file with at least one event"),
        ("{}", "log.json has no event: its object is empty"),
        ('{"u": [1], ', "log.json is not JSON: .*; check that the file is whole"),
        ("[" * 100_000, "log.json is not JSON: .*recursion"),
        ('[["u", 1]]', "log.json holds a list, expected a JSON object of user id -> list of item ids"),
        ('{"u": [1], "v": {"1": 2}}', 'log.json, line 2: user "v" has .*, no list'),
    ],
)
def test_json_sequences_refuse_naming_the_entry(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "log.json", text)
    with pytest.raises(ValueError, match=message):
        read_json_sequences(JsonSequencesSource(format="json_sequences", path=path)).read_all()


def test_recbole_reads_typed_headers_and_float_times(tmp_path: Path) -> None:
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n01\t2\t5\t8.8e8\n"
    table = read_recbole(RecboleSource(format="recbole", path=write(tmp_path / "a.inter", text))).read_all()
    assert table.schema == EVENT_SCHEMA
    assert table.column("user_id").to_pylist() == ["196", "01"]
    assert table.column("timestamp_s").to_pylist() == [881250949, 880000000]


def test_csv_reads_named_columns_and_floors_milliseconds(tmp_path: Path) -> None:
    columns = {"user_id": "who", "item_id": "what", "timestamp_s": "when"}
    text = 'when;note;who;what\n1600000000999;"two\nlines";u;i\n'
    source = csv_source(tmp_path, text, columns=columns, timestamp_unit="ms", delimiter=";")
    assert read_csv(source).read_all().to_pylist() == [
        {"user_id": "u", "item_id": "i", "timestamp_s": 1_600_000_000, "source_row": 0}
    ]


def test_csv_without_times_says_so_in_the_columns(tmp_path: Path) -> None:
    source = csv_source(tmp_path, "user_id,item_id\nu,i\n", columns={"timestamp_s": None})
    assert read_csv(source).read_all().column("timestamp_s").to_pylist() == [None]


def test_csv_reads_gzip(tmp_path: Path) -> None:
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(b"user_id,item_id,timestamp_s\nu,i,5\n"))
    assert read_csv(CsvSource(format="csv", path=str(path))).read_all().column("timestamp_s").to_pylist() == [5]


def test_source_rows_are_unique_over_all_files_of_a_glob(tmp_path: Path) -> None:
    for name in ("b", "a"):
        pq.write_table(
            pa.table({"user_id": [1, 2], "item_id": [name, name], "timestamp_s": [1, 2]}), tmp_path / f"{name}.parquet"
        )
    table = read_parquet(ParquetSource(format="parquet", path=str(tmp_path / "*.parquet"))).read_all()
    assert table.schema == EVENT_SCHEMA
    assert table.column("item_id").to_pylist() == ["a", "a", "b", "b"]
    assert table.column("user_id").to_pylist() == ["1", "2", "1", "2"]
    assert table.column("source_row").to_pylist() == [0, 1, 2, 3]


def test_parquet_takes_arrow_timestamps_and_dictionaries(tmp_path: Path) -> None:
    times = pa.array([datetime(2020, 9, 13, 12, 26, 40)], type=pa.timestamp("us"))
    users = pa.array(["u"]).dictionary_encode()
    pq.write_table(pa.table({"user_id": users, "item_id": ["i"], "timestamp_s": times}), tmp_path / "a.parquet")
    table = read_parquet(ParquetSource(format="parquet", path=str(tmp_path / "a.parquet"))).read_all()
    assert table.to_pylist() == [{"user_id": "u", "item_id": "i", "timestamp_s": 1_600_000_000, "source_row": 0}]


def test_readers_are_named_by_format() -> None:
    assert set(READERS) == {
        "sequences", "json_sequences", "recbole", "csv", "parquet", "amazon_2014", "amazon_2018", "amazon_2023",
        "movielens",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "log.csv is empty; pass a file with at least one event"),
        ("user_id,item_id,timestamp_s\n", "log.csv has a header and no events"),
        (
            "user,item_id,time\na,b,1\n",
            "log.csv has no column 'user_id', 'timestamp_s'; it has 'user', 'item_id', 'time'",
        ),
        ("user_id,user_id,item_id,timestamp_s\na,b,c,1\n", "column 'user_id' stands twice"),
        ("user_id,item_id,timestamp_s\nu,i,1\n,i,2\n", "log.csv, line 3: column 'user_id' is empty"),
        ("user_id,item_id,timestamp_s\nu,,1\n", "log.csv, line 2: column 'item_id' is empty"),
        (
            "user_id,item_id,timestamp_s\nu,i,1\nu,i,noon\n",
            "log.csv, line 3: column 'timestamp_s' is 'noon', expected a number",
        ),
        (
            "user_id,item_id,timestamp_s\nu,i,1.5\nu,i,nan\n",
            "log.csv, line 3: column 'timestamp_s' is 'nan', expected a number",
        ),
        ("user_id,item_id,timestamp_s\nu,i,\n", "log.csv, line 2: column 'timestamp_s' is empty; drop the row"),
        ("user_id,item_id,timestamp_s\nu,i,-4\n", "log.csv, line 2: column 'timestamp_s' is '-4', .* not before"),
        (
            "user_id,item_id,timestamp_s\nu,i,1600000000000\n",
            "line 2: .* looks like milliseconds though s was stated; set data.source.timestamp_unit: ms",
        ),
        ("user_id,item_id,timestamp_s\nu,i\n", "log.csv, line 2: has 2 fields, expected 3"),
    ],
)
def test_csv_refuses_naming_file_and_row(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_csv(csv_source(tmp_path, text)).read_all()


def test_microseconds_stated_as_milliseconds_are_refused(tmp_path: Path) -> None:
    source = csv_source(tmp_path, "user_id,item_id,timestamp_s\nu,i,1600000000000000\n", timestamp_unit="ms")
    with pytest.raises(ValueError, match="looks like microseconds though ms was stated; divide by 1000"):
        read_csv(source).read_all()


def test_missing_files_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source .*nothing.txt does not exist; pass a file"):
        read_sequences(SequencesSource(format="sequences", path=str(tmp_path / "nothing.txt")))
    with pytest.raises(ValueError, match=r"is a folder; pass a file, or a glob"):
        read_parquet(ParquetSource(format="parquet", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "log.txt is empty"),
        ("\n \n", "log.txt has no events: all its lines are blank"),
        ("\na 1 2\nb\n", "log.txt, line 3: has the user 'b' and no item"),
    ],
)
def test_sequence_files_refuse_naming_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sequences(SequencesSource(format="sequences", path=write(tmp_path / "log.txt", text))).read_all()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"user_id": [1.5], "item_id": ["i"], "timestamp_s": [1]},
            "column 'user_id' is double, but ids are strings or integers",
        ),
        ({"user_id": [None, "u"], "item_id": ["i", "i"], "timestamp_s": [1, 1]}, "line 1: column 'user_id' is empty"),
        (
            {"user_id": ["u", "u"], "item_id": ["i", "i"], "timestamp_s": [1, None]},
            "line 2: column 'timestamp_s' is empty",
        ),
        ({"user_id": ["u"], "item_id": ["i"]}, "has no column 'timestamp_s'; it has 'user_id', 'item_id'"),
        (
            {"user_id": pa.array([], pa.string()), "item_id": pa.array([], pa.string()), "timestamp_s": []},
            "has no events",
        ),
    ],
)
def test_parquet_refuses_naming_file_and_row(tmp_path: Path, columns: dict, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        read_parquet(ParquetSource(format="parquet", path=str(tmp_path / "a.parquet"))).read_all()


def test_a_text_file_is_no_parquet_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no Parquet file .* set data.source.format to what it is"):
        read_parquet(ParquetSource(format="parquet", path=write(tmp_path / "a.parquet", "user_id,item_id\n" * 3)))


EVENTS = [("A1", "0205616461", 1_369_699_200), ("A2", "B00", 1_355_443_200), ("A1", "B01", 1_404_691_200)]


def events_of(reader: pa.RecordBatchReader) -> list[tuple]:
    table = reader.read_all()
    assert table.schema == EVENT_SCHEMA
    return [tuple(row.values())[:3] for row in table.to_pylist()]


def json_lines(user: str, item: str, time: str, unit: int = 1) -> str:
    # Reviews carry more than is read, nested fields and non-ASCII text among it.
    more = {"style": {"Size:": "5\u2033"}, "image": ["a.jpg"], "overall": 5.0, "reviewText": "d\u00e9j\u00e0 {vu}\n"}
    return "".join(json.dumps({user: u, **more, item: i, time: t * unit}) + "\n" for u, i, t in EVENTS)


AMAZON_FILES = {
    ("amazon_2014", "ratings_Beauty.csv"): "".join(f"{u},{i},5.0,{t}\n" for u, i, t in EVENTS),
    ("amazon_2014", "reviews_Beauty_5.json"): json_lines("reviewerID", "asin", "unixReviewTime"),
    ("amazon_2018", "All_Beauty.csv"): "".join(f"{i},{u},5.0,{t}\n" for u, i, t in EVENTS),
    ("amazon_2018", "All_Beauty_5.json"): json_lines("reviewerID", "asin", "unixReviewTime"),
    ("amazon_2023", "All_Beauty.csv"): "user_id,parent_asin,rating,timestamp\n"
    + "".join(f"{u},{i},5.0,{t * 1000 + 7}\n" for u, i, t in EVENTS),
    ("amazon_2023", "All_Beauty.jsonl"): json_lines("user_id", "parent_asin", "timestamp", 1000),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("year", "name"), AMAZON_FILES)
def test_every_amazon_file_gives_the_same_events(tmp_path: Path, year: str, name: str, packed: bool) -> None:
    content = AMAZON_FILES[year, name].encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert events_of(read_amazon(AmazonSource(format=year, path=str(path)))) == EVENTS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n15,1029,3.0,1260759179\n"),
        ("ratings.dat", "1::31::2.5::1260759144\n15::1029::3::1260759179\n"),
        ("u.data", "1\t31\t3\t1260759144\n15\t1029\t3\t1260759179"),
    ],
)
def test_every_movielens_file_gives_the_same_events(tmp_path: Path, name: str, text: str) -> None:
    source = MovielensSource(format="movielens", path=write(tmp_path / name, text))
    assert events_of(read_movielens(source)) == [("1", "31", 1_260_759_144), ("15", "1029", 1_260_759_179)]


def test_a_file_whose_name_says_nothing_is_refused(tmp_path: Path) -> None:
    source = MovielensSource(format="movielens", path=write(tmp_path / "ratings.txt.gz", "1::2::3::4\n"))
    with pytest.raises(ValueError, match=r"ratings.txt.gz ends in none of \.csv, \.dat, \.data"):
        read_movielens(source)


@pytest.mark.parametrize("block_bytes", [16, 64, 2**24])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, ends: str) -> None:
    rows = [f'u{row % 7},"note {row}{ends}and ""more""",i{row},{row}' for row in range(200)]
    path = tmp_path / "log.csv"
    path.write_bytes(ends.join(["user_id,note,item_id,timestamp_s", *rows]).encode("utf-8-sig"))
    monkeypatch.setattr("muonrec.data.text._BLOCK_BYTES", block_bytes)
    found = events_of(read_csv(CsvSource(format="csv", path=str(path))))
    assert found == [(f"u{row % 7}", f"i{row}", row) for row in range(200)]


def test_a_time_means_the_same_whatever_stands_beside_it(tmp_path: Path) -> None:
    texts = ["5", "0005", "5.9", "5e0", "123456789"]
    alone = [
        events_of(read_csv(csv_source(tmp_path, f"user_id,item_id,timestamp_s\nu,i,{text}\n")))[0][2] for text in texts
    ]
    together = csv_source(tmp_path, "user_id,item_id,timestamp_s\n" + "".join(f"u,i,{text}\n" for text in texts))
    assert [time for _, _, time in events_of(read_csv(together))] == alone == [5, 5, 5, 5, 123456789]


@pytest.mark.parametrize("block_bytes", [64, 2**24])
def test_a_quote_inside_a_field_is_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    rows = [f"u{row},{'5 inch screen' if row % 50 else chr(34) + 'x' + chr(34)},i{row},{row}" for row in range(200)]
    rows[20] = 'u20,5" screen,i20,20'
    path = write(tmp_path / "log.csv", "\n".join(["user_id,note,item_id,timestamp_s", *rows]))
    monkeypatch.setattr("muonrec.data.text._BLOCK_BYTES", block_bytes)
    monkeypatch.setattr("muonrec.data.text._MAX_LINE_BYTES", 1000)
    found = events_of(read_csv(CsvSource(format="csv", path=path)))
    assert found == [(f"u{row}", f"i{row}", row) for row in range(200)]
