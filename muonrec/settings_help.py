"""The help of a command: every setting of its config, with its default and what the docstring of its class says."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

import pydantic
import yaml
from pydantic_core import PydanticUndefined

from muonrec.config import Config, choices_of, sections_in

_COLUMNS = 110
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)", re.DOTALL)


def settings_help(cls: type[Config], *, prefix: str = "", leave_out: Sequence[str] = ()) -> str:
    """The settings of ``cls``, then those of its sections, in lines of 110 columns.

    A setting is a line of its path, as an override spells it, default and other choices; below stands what it means. A
    section that is one of several, by its ``name`` or ``format``, is listed for each of them. The settings of one that
    stands in several places are listed at the first.

    Args:
        cls: of the config. Its docstring, and those of its sections, say what the settings mean, in lines ``name: ...``
            under ``Attributes:``; settings that follow each other may share one (``low, high: ...``).
        prefix: of the paths, such as ``data.`` for a section.
        leave_out: settings of ``cls`` that are not listed.
    """
    return "\n".join(_block(cls, prefix, leave_out, owner="", chosen=None, listed={}))


def meanings(cls: type[Config]) -> tuple[list[str], dict[tuple[str, ...], str]]:
    """What the docstring of ``cls`` says of the whole, by paragraphs, and of its settings, by their names."""
    prose, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    entries = re.split(r"\n(?=\S)", textwrap.dedent(attributes).strip("\n"))
    found = [entry for entry in map(_ENTRY.fullmatch, entries) if entry]
    return (
        [_plain(paragraph) for paragraph in prose.strip().split("\n\n")],
        {tuple(entry[1].split(", ")): _plain(entry[2]) for entry in found},
    )


def _block(
    cls: type[Config],
    prefix: str,
    leave_out: Sequence[str],
    *,
    owner: str,
    chosen: Config | None,
    listed: dict[type[Config], tuple[str, dict[str, Any]]],
) -> Iterator[str]:
    """Lines of ``cls`` and of what is below it.

    Args:
        cls: of the section.
        prefix: of its settings.
        leave_out: its settings that are not listed.
        owner: its name, where it is one of several.
        chosen: what is there by default; None: nothing, or something else.
        listed: headings of the sections that are, and the defaults they were listed with; they are added.
    """
    fields = {name: field for name, field in cls.model_fields.items() if name not in leave_out}
    defaults = {name: value for name, value in _defaults(chosen or cls).items() if name in fields}
    listed[cls] = (listed.get(cls, (prefix.removesuffix("."), {}))[0], defaults)
    meaning_after = {
        names[-1]: f"{', '.join(names)}: {meaning}" if len(names) > 1 else meaning
        for names, meaning in meanings(cls)[1].items()
    }
    width = max((len(prefix + name) for name in fields), default=0)
    for name, field in fields.items():
        first, *further = textwrap.wrap(_value(field.annotation, defaults[name]), _COLUMNS - width - 4) or [""]
        yield f"  {prefix + name:<{width}}  {first}".rstrip()
        yield from (f"  {'':<{width}}  {line}" for line in further)
        if name in meaning_after:
            yield from _indented(meaning_after[name], 6)
    for name, field in fields.items():
        path, kinds = _path_below(prefix + name, field.annotation), sections_in(field.annotation)
        for kind in kinds:
            key, names = choices_of(kind) if len(kinds) > 1 else ("", ())
            name_here = ", ".join(names)
            heading = path + f" of {owner}" * bool(owner) + f": {name_here}" * bool(names)
            there = defaults[name] if isinstance(defaults[name], kind) else None
            yield ""
            if kind in listed:
                yield from _indented(f"{heading}: {_as_listed(*listed[kind], _defaults(there or kind))}", 0)
            else:
                listed[kind] = (heading, {})
                yield heading
                for paragraph in meanings(kind)[0]:
                    yield from _indented(paragraph, 4)
                yield from _block(kind, f"{path}.", (key,), owner=name_here, chosen=there, listed=listed)


def _defaults(section: Config | type[Config]) -> dict[str, Any]:
    """By name; what has none is `PydanticUndefined`."""
    if isinstance(section, Config):
        return {name: getattr(section, name) for name in type(section).model_fields}
    return {name: field.get_default(call_default_factory=True) for name, field in section.model_fields.items()}


def _as_listed(heading: str, listed: dict[str, Any], defaults: dict[str, Any]) -> str:
    other = {name: defaults[name] for name in listed if defaults[name] != listed[name]}
    return f"as under '{heading}'" + (f", but for {_as_yaml(other)[1:-1]}" if other else "")


def _path_below(path: str, annotation: Any) -> str:
    """Where the settings of a section are; those of ``dict[str, Section]`` are a name deeper."""
    if get_origin(annotation) is not dict:
        return path
    names = get_args(get_args(annotation)[0])
    return f"{path}.{{{','.join(names)}}}" if names else f"{path}.NAME"


def _value(annotation: Any, default: Any) -> str:
    """The default, of a section its name, and what else the setting may be."""
    choices = _choices_in(annotation)
    if isinstance(default, Config):
        shown = str(getattr(default, choices_of(type(default))[0])) if len(choices) > 1 else "see below"
    else:
        shown = "required" if default is PydanticUndefined else _as_yaml(default)
    others = [choice for choice in choices if choice != shown]
    if not others or len(choices) == 1:
        return shown
    return f"{shown}: {', '.join(others)}" if shown == "required" else f"{shown} (or {', '.join(others)})"


def _as_yaml(value: Any) -> str:
    plain = pydantic.RootModel(value).model_dump(mode="json")
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _choices_in(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if annotation is bool:
        return ["true", "false"]
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return list(choices_of(annotation)[1])
    if get_origin(annotation) in (dict, list, tuple):
        return []
    return [choice for part in get_args(annotation) for choice in _choices_in(part)]


def _indented(text: str, columns: int) -> list[str]:
    indent = " " * columns
    return textwrap.wrap(text, _COLUMNS, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _plain(text: str) -> str:
    """A paragraph of a docstring without its marks and line breaks."""
    return " ".join(text.replace("``", "").replace("`", "").split())
