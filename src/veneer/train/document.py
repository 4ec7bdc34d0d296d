"""A settings file with the line of every key, so that an error can say where it stands."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Loc = tuple[Any, ...]
"""Keys and indices down to a place in nested settings."""


class Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: ``off``, ``no`` and ``y`` are words, and 1e-4 is a number."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":bool", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
NUMBER = re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


@dataclass
class Document:
    """What a settings file and the command line said, and where each said it."""

    name: str = "command line"
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Loc, int] = field(default_factory=dict)
    flags: dict[Loc, str] = field(default_factory=dict)

    def where(self, loc: Loc) -> str:
        """``file:line`` of the nearest enclosing key that was written down, or the flag that set it."""
        for end in range(len(loc), 0, -1):
            if loc[:end] in self.flags:
                return self.flags[loc[:end]]
            if loc[:end] in self.lines:
                return f"{self.name}:{self.lines[loc[:end]]}"
        return self.name

    def line(self, loc: Loc) -> float:
        """The line of the nearest enclosing key; what the file does not hold comes last."""
        return next((self.lines[loc[:end]] for end in range(len(loc), 0, -1) if loc[:end] in self.lines), float("inf"))

    def set(self, loc: Loc, value: Any, flag: str) -> None:
        """Put ``value`` at ``loc``, making the mappings on the way."""
        at = self.values
        for key in loc[:-1]:
            if not isinstance(at.get(key), dict):
                at[key] = {}
            at = at[key]
        at[loc[-1]] = value
        self.flags[loc] = flag


def read(path: str | Path) -> Document:
    """Read YAML, JSON or TOML, by the file's ending.

    Raises:
        ValueError: another ending, broken syntax, a key given twice, or something that is no mapping.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no settings file '{path}'.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"'{path}' ends in '{path.suffix}'; settings are read from .yaml, .yml, .json or .toml files.")
    values, lines = reader(path, path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: settings must be a mapping of keys to values, not a {type(values).__name__}.")
    return Document(str(path), values, lines)


def _yaml(path: Path, text: str) -> tuple[Any, dict[Loc, int]]:
    try:
        tree = yaml.compose(text, Loader=Loader)
        return yaml.load(text, Loader=Loader) or {}, dict(_yaml_lines(path, tree))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ValueError(f"{place}: this is not valid YAML ({error.problem or error.context}).") from None


def _yaml_lines(path: Path, node: yaml.Node | None, loc: Loc = ()) -> Iterable[tuple[Loc, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ValueError(f"{path}:{line}: the key '{key.value}' stands already on line {seen[key.value]}.")
            seen[key.value] = line
            yield (*loc, key.value), line
            yield from _yaml_lines(path, value, (*loc, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*loc, index), value.start_mark.line + 1
            yield from _yaml_lines(path, value, (*loc, index))


def _json(path: Path, text: str) -> tuple[Any, dict[Loc, int]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: this is not valid JSON ({error.msg}).") from None
    try:  # JSON is YAML but for tabs; if some corner is not, the values stand and only the line numbers are lost
        return values, dict(_yaml_lines(path, yaml.compose(text.replace("\t", " "), Loader=Loader)))
    except yaml.YAMLError:
        return values, {}


def _toml(path: Path, text: str) -> tuple[Any, dict[Loc, int]]:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"at line (\d+)", str(error))
        raise ValueError(f"{path}:{found[1] if found else '?'}: this is not valid TOML ({error}).") from None
    lines: dict[Loc, int] = {}
    section: Loc = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([^\[\]]+?)\s*\]\]?", line):
            section = tuple(header[1].split("."))
            lines[section] = number
        elif key := re.match(r"\s*([\w.-]+)\s*=", line):
            lines[(*section, *key[1].split("."))] = number
    return values, lines


READERS = {".yaml": _yaml, ".yml": _yaml, ".json": _json, ".toml": _toml}


def overrides(sets: Iterable[str], rest: list[str]) -> list[tuple[str, Any, str]]:
    """``--set a.b=c`` and ``--a.b c`` as (key, value, the flag as typed); values are read as YAML.

    Raises:
        ValueError: a word that is neither a flag nor a flag's value, or a ``--set`` without ``=``.
    """
    found: list[tuple[str, Any, str]] = []
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set needs the form key=value, and '{item}' has no '='.")
        found.append((key.strip(), _value(value), f"--set {key.strip()}"))
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"'{word}' was not expected here; overrides have the form --key value or --set key=value.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        found.append((key.replace("-", "_"), _value(value), f"--{key}"))
    return found


def _value(text: str) -> Any:
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        return text
