"""Spark and DuckDB run the same SQL to the same bytes."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muonrec.data.engines import _mebibytes
from muonrec.data.manifest import Manifest, read_manifest
from pipeline.data import DataConfig, build_dataset

needs_spark = [
    pytest.mark.spark,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("pyspark") is None, reason="pip install 'muonrec[spark]'"),
    pytest.mark.skipif(
        shutil.which("java") is None and "JAVA_HOME" not in os.environ, reason="apt install openjdk-17-jre-headless"
    ),
]

# Names whose order by bytes is not that of any language, nor that of UTF-16.
_NAMES = ["", " ", "'", "A", "Z", "a", "b'", "z", "\\", "ä", "é", "Ω", "語", "￮", "𐍈", "😀"]


def write_log(path: Path, seed: int, *, num_events: int = 2500, timed: bool = True) -> None:
    """Ties, duplicates, repeats, and users and items below any core."""
    generator = np.random.default_rng(seed)
    users = [f"{_NAMES[n % len(_NAMES)]}{n}" for n in generator.integers(150, size=num_events)]
    items = [f"{_NAMES[n % len(_NAMES)]}{n % 7}" for n in generator.zipf(1.3, size=num_events) % 80]
    columns = {"user_id": users, "item_id": items}
    if timed:
        columns["timestamp_s"] = generator.integers(0, 450, size=num_events)
    log = pa.table(columns)
    pq.write_table(pa.concat_tables([log, log.slice(0, 100)]), path)


def build(tmp_path: Path, engine: str, log: str, **settings: Any) -> Manifest:
    columns = {"timestamp_s": None} if log == "untimed" else {}
    source = {"format": "parquet", "path": str(tmp_path / f"{log}.parquet"), "columns": columns}
    extends = {"extends": tmp_path / engine / settings.pop("extends")} if "extends" in settings else {}
    output = tmp_path / engine / settings.pop("name")
    tree = {"source": source, "output": output, "engine": engine, "num_shards": 3, "memory_limit": "1GiB"}
    return build_dataset(DataConfig.model_validate({**tree, **settings, **extends}))


def comparable(manifest: Manifest) -> dict[str, Any]:
    """All but when, where and by what it was made."""
    tree = manifest.model_dump(mode="json")
    for name in ("engine", "output", "extends"):
        del tree["config"][name]
    del tree["rates"]
    return tree


CASES: list[dict[str, Any]] = [
    {"name": "first", "log": "old", "k_core": 5},
    {"name": "more", "log": "new", "extends": "first", "repeats": "drop_later", "split": "global_time"},
    {"name": "ratio", "log": "new", "k_core": 3, "split": "ratio", "ties": "file_order", "num_shards": 1},
    {"name": "untied", "log": "old", "ties": "drop", "split": {"name": "ratio"}},
    {"name": "untimed", "log": "untimed", "k_core": 4},
]


class TestParity:
    pytestmark = needs_spark

    def test_both_engines_write_the_same_bytes_and_the_same_manifest(self, tmp_path: Path) -> None:
        write_log(tmp_path / "old.parquet", 1)
        write_log(tmp_path / "new.parquet", 2)
        write_log(tmp_path / "untimed.parquet", 3, timed=False)
        for case in CASES:
            ours, theirs = (build(tmp_path, engine, **case) for engine in ("duckdb", "spark"))
            assert ours.num_duplicates_dropped >= (100 if case["log"] != "untimed" else 0)
            assert comparable(theirs) == comparable(ours), case
            for name in ours.files:  # hashes are equal; and that they are of these files
                one, other = (pq.read_table(tmp_path / engine / case["name"] / name) for engine in ("duckdb", "spark"))
                assert one.equals(other), (case, name)
            assert not list((tmp_path / "spark" / case["name"]).glob("work"))

    def test_what_the_reader_finds_wrong_is_said_as_with_the_other_engine(self, tmp_path: Path) -> None:
        (tmp_path / "log.csv").write_text("user_id,item_id,timestamp_s\na,x,1\na,y,soon\n")
        messages = []
        for engine in ("duckdb", "spark"):
            tree = {"source": {"format": "csv", "path": str(tmp_path / "log.csv")}, "output": tmp_path / "data"}
            with pytest.raises(ValueError) as error:
                build_dataset(DataConfig.model_validate({**tree, "engine": engine, "memory_limit": "1GiB"}))
            messages.append(str(error.value))
        assert messages[0] == messages[1]
        assert not (tmp_path / "data").exists()


def test_the_engine_does_not_decide_what_the_data_are(tmp_path: Path) -> None:
    write_log(tmp_path / "old.parquet", 1)
    first = build(tmp_path, "duckdb", "old", name="data", k_core=5)
    # Recognised as up to date, so Spark is not even asked.
    again = build_dataset(DataConfig.model_validate({**first.config, "engine": "spark", "work": str(tmp_path)}))
    assert again == first == read_manifest(tmp_path / "duckdb" / "data")


@pytest.mark.parametrize(("size", "mebibytes"), [("4GiB", 4096), ("512 MiB", 512), ("1.5GB", 1430), ("2TiB", 2**21)])
def test_sizes_are_read_as_duckdb_reads_them(size: str, mebibytes: int) -> None:
    assert _mebibytes(size) == mebibytes
