"""Configuration: a YAML file, `key=value` overrides and a frozen pydantic model that refuses what it does not know."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

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
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"config {path} {found}; pass the path of a YAML file such as configs/demo/sasrec.yaml")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"config {path} holds a {type(tree).__name__}, expected a mapping of sections")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def parse_config(cls: type[ConfigT], tree: Mapping[str, Any], *, source: str, prefix: str = "") -> ConfigT:
    """Validate ``tree`` as ``cls``; every fault is named by its path in the file, as an override would spell it.

    Args:
        cls: the config class.
        tree: a mapping as YAML gives it.
        source: where it came from, for the message.
        prefix: of the paths, such as ``data.`` for a section.

    Raises:
        ValueError: one line per fault, with the path, what was found and what was expected.
    """
    try:
        return cls.model_validate(tree)
    except pydantic.ValidationError as error:
        faults = [f"  {prefix}{_path_of(fault, tree)}: {_explain(fault, cls)}" for fault in error.errors()]
        raise ValueError(f"{source} is not a valid {cls.__name__}:\n" + "\n".join(faults)) from None


def load_config(cls: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read ``path``, apply the overrides and validate the whole as ``cls``. Raises ValueError."""
    return parse_config(cls, read_yaml(path, overrides), source=str(path))


def to_yaml(config: Config) -> str:
    """The resolved config, every default spelled out, as YAML text."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by path, ``section.key``; an empty mapping is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves.update(flat(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value})
    return leaves


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, _ = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} is not of the form key=value, such as dense_optimizer.lr=0.01")
    value = parse_value(override)
    try:
        set_at(tree, key, value)
    except ValueError as error:
        raise ValueError(f"override {override!r}: {error}") from None


def set_at(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the setting at the path ``key`` of nested sections, in place; a ``*`` in it stands for every key there.

    Raises:
        ValueError: the path leads through something that is no section.
    """
    *parents, leaf = key.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        if parent == "*":
            for name in list(node):
                set_at(node, ".".join([name, *parents[depth + 1 :], leaf]), value)
            return
        child = node.setdefault(parent, {})
        if isinstance(child, str):  # `optimizer: muon` met by `optimizer.lr=0.01`
            child = node[parent] = {"name": child}
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ValueError(f"{'.'.join(parents[: depth + 1])} is a {type(child).__name__}, not a section")
        node = child
    node[leaf] = value


def parse_value(override: str) -> Any:
    """The value of ``key=value``, parsed as YAML. Raises ValueError."""
    try:
        return yaml.safe_load(override.partition("=")[2])
    except yaml.YAMLError as error:
        fault = " ".join(str(error).split())
        raise ValueError(f"override {override!r} is not valid YAML after '=' ({fault}); quote or close it") from None


def _path_of(fault: Mapping[str, Any], tree: Any) -> str:
    """The path of a fault in the file: pydantic's own also names the choice it validated against."""
    parts, node = [], tree
    for part in fault["loc"]:
        is_choice = part in (node.get("name"), node.get("format")) if isinstance(node, Mapping) else part == node
        if is_choice and not (isinstance(node, Mapping) and part in node):
            continue
        parts.append(str(part))
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
    return ".".join(parts) or "(top)"


def _explain(fault: Mapping[str, Any], cls: type[Config]) -> str:
    found = fault["input"]
    if fault["type"] == "missing":
        return "is required"
    if fault["type"] == "extra_forbidden":
        like = difflib.get_close_matches(str(fault["loc"][-1]), _settings_at(cls, fault["loc"][:-1]), n=1)
        return f"is not a known setting (found {found!r})" + (f"; did you mean {like[0]}?" if like else "")
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{message} (found {found!r})" if not isinstance(found, Mapping) else message


def _settings_at(cls: type[Config], loc: Sequence[int | str]) -> list[str]:
    """The settings of the section at ``loc``, as pydantic names it: by settings, choices and entries."""
    sections = [cls]
    for part in loc:
        below = [section.model_fields[str(part)] for section in sections if part in section.model_fields]
        chosen = [section for section in sections if part in choices_of(section)[1]]
        sections = [found for field in below for found in sections_in(field.annotation)] or chosen or sections
    return [name for section in sections for name in section.model_fields]


def choices_of(section: type[Config]) -> tuple[str, tuple[str, ...]]:
    """The key by which a section says what it is, ``name`` or ``format``, and what it may be; empty without one."""
    for key in ("name", "format"):
        if key in section.model_fields:
            return key, get_args(section.model_fields[key].annotation)
    return "", ()


def sections_in(annotation: Any) -> list[type[Config]]:
    """The config classes that the type of a setting consists of, or is a mapping or list of."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]
