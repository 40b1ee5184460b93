"""Configuration: a YAML file, `key=value` overrides and a frozen pydantic model that refuses what it does not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml


class Config(pydantic.BaseModel):
    """Base of every config class: frozen, unknown keys refused, the class holds the only default."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


ConfigT = TypeVar("ConfigT", bound=Config)


def name_only(value: Any) -> Any:
    """Let ``optimizer: muon`` stand for ``optimizer: {name: muon}`` (a `pydantic.BeforeValidator`)."""
    return {"name": value} if isinstance(value, str) else value


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML mapping and apply ``a.b.c=value`` overrides, each value parsed as YAML.

    Overriding a section that has a ``name`` with a bare word (``dense_optimizer=muon``) picks another choice
    and drops the settings of the one before.

    Raises:
        ValueError: the file is missing or is no mapping, or an override has no ``=``.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config {path} does not exist; pass the path of a YAML file such as configs/demo/sasrec.yaml")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"config {path} holds a {type(tree).__name__}, expected a mapping of sections")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def parse_config(cls: type[ConfigT], tree: Mapping[str, Any], *, source: str) -> ConfigT:
    """Validate ``tree`` as ``cls``; every fault is named by its path in the file.

    Raises:
        ValueError: one line per fault, with the path, what was found and what was expected.
    """
    try:
        return cls.model_validate(tree)
    except pydantic.ValidationError as error:
        faults = [
            f"  {'.'.join(str(part) for part in fault['loc']) or '(top)'}: {_explain(fault)}"
            for fault in error.errors()
        ]
        raise ValueError(f"{source} is not a valid {cls.__name__}:\n" + "\n".join(faults)) from None


def load_config(cls: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read ``path``, apply the overrides and validate the whole as ``cls``. Raises ValueError."""
    return parse_config(cls, read_yaml(path, overrides), source=str(path))


def to_yaml(config: Config) -> str:
    """The resolved config, every default spelled out, as YAML text."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} is not of the form key=value, such as dense_optimizer.lr=0.01")
    *parents, leaf = key.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        child = node.setdefault(parent, {})
        if isinstance(child, str):  # `optimizer: muon` met by `optimizer.lr=0.01`
            child = node[parent] = {"name": child}
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ValueError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is a {type(child).__name__}, not a section"
            )
        node = child
    node[leaf] = yaml.safe_load(text)


def _explain(fault: Mapping[str, Any]) -> str:
    found = fault["input"]
    if fault["type"] == "missing":
        return "is required"
    if fault["type"] == "extra_forbidden":
        return f"is not a known setting (found {found!r})"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{message} (found {found!r})" if not isinstance(found, Mapping) else message
