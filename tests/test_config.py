"""Faults are named as an override would spell them."""

from __future__ import annotations

import re

import pytest
import yaml

from muonrec.config import load_config, parse_config, read_yaml
from pipeline.data import DataConfig

SOURCE = {"format": "csv", "path": "log.csv"}


def parse(**tree):
    return parse_config(DataConfig, tree, source="here", prefix="data.")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"source": {"format": "csv"}, "output": "x"}, "data.source.path: is required"),
        ({"source": SOURCE | {"columns": {"user": "u"}}, "output": "x"}, "data.source.columns.user: is not a known"),
        ({"source": SOURCE, "output": "x", "k_cor": 5}, "data.k_cor: is not a known setting (found 5); did you mean"),
        ({"source": SOURCE, "output": "x", "qqq": 5}, "data.qqq: is not a known setting (found 5)"),
        ({"source": SOURCE, "output": "x", "split": {"name": "global_time", "valid": 2}}, "data.split.valid: Input"),
        ({"source": SOURCE}, "data.output: is required"),
        ({"source": SOURCE | {"pth": 1}, "output": "x"}, "pth: is not a known setting (found 1); did you mean path?"),
        ({"source": SOURCE | {"k_core": 5}, "output": "x"}, "data.source.k_core: is not a known setting (found 5)\n"),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_the_path_of_its_override(tree, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        try:
            parse(**tree)
        except ValueError as error:
            raise ValueError(f"{error}\n") from None


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError) as error:
        parse(source=SOURCE, k_cor=5, num_shards=0)
    assert len(str(error.value).splitlines()) == 4


def test_overrides_reach_into_sections(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"a": {"name": "muon", "lr": 1}, "b": "adamw"}))
    tree = read_yaml(path, ["a.lr=0.5", "b.lr=2", "c.d.e=[1, 2]"])
    assert tree == {"a": {"name": "muon", "lr": 0.5}, "b": {"name": "adamw", "lr": 2}, "c": {"d": {"e": [1, 2]}}}
    assert read_yaml(path, ["a=adamw"])["a"] == "adamw", "another choice drops the settings of the one before"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "override 'a' is not of the form key=value"),
        ("a.b=1", "override 'a.b=1': a is a int, not a section"),
        ("b={c: 1", "override 'b={c: 1' is not valid YAML after '='"),
    ],
)
def test_a_faulty_override_is_quoted(tmp_path, override, message):
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_yaml(tmp_path / "config.yaml", [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is a folder; pass the path of a YAML file"),
        (b"a: [1\n", "is not valid YAML"),
        (b"\xe9: 1\n", "is not valid YAML"),
        (b"- 1\n", "holds a list, expected a mapping of sections"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content, message):
    path = tmp_path
    if content is not None:
        path = tmp_path / "config.yaml"
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(DataConfig, path)
