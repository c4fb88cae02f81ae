"""YAML text to nodes that know their lines.

A small reader of our own over PyYAML's events, because three things of the usual loaders do not fit a
file that people trust: a key that is written twice wins silently, `NO` (Norway) becomes false, and an
alias of an alias grows without bound.  Scalars are resolved by the core schema of YAML 1.2, and a
number keeps the text that it was written with, so that an amount is never rounded.

Source: https://yaml.org/spec/1.2.2/#103-core-schema
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import yaml

FILE_BYTES_MAX: Final = 4 * 1024 * 1024
DEPTH_MAX: Final = 32
NODES_MAX: Final = 200_000  # aliases counted as often as they are used
_INTEGER_DIGITS_MAX: Final = 40

_INTEGER = re.compile(r"[-+]?[0-9]+")
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: Final[dict[str, bool | None]] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNTAGGED: Final = (None, "!")

Scalar = str | int | float | bool | None


class Node(msgspec.Struct, frozen=True):
    """A value with the line (from 1) where it stands.  `text` is a scalar as it was written."""

    line: int
    value: dict[str, Node] | list[Node] | Scalar
    text: str = ""

    def data(self) -> Any:
        """The value without lines, as JSON has it."""
        match self.value:
            case dict():
                return {key: node.data() for key, node in self.value.items()}
            case list():
                return [node.data() for node in self.value]
            case _:
                return self.value

    def at(self, *path: str | int) -> Node:
        """The node at a path, or the last one on the way that exists."""
        node = self
        for step in path:
            inside = node.value
            if isinstance(inside, dict) and isinstance(step, str) and step in inside:
                node = inside[step]
                continue
            if not isinstance(inside, list) or not isinstance(step, int) or step >= len(inside):
                break
            node = inside[step]
        return node


class TextError(ValueError):
    """The text is not YAML that we take; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def documents(text: str) -> list[Node]:
    """The documents of a YAML text, empty ones left out.

    Raises:
        TextError: bad YAML, a key written twice, a tag, or a bound is passed.
    """
    try:
        return list(_Reader(text).documents())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise TextError(line, _plainly(error, text, line)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise TextError(line, "a character that YAML does not allow; write the file as UTF-8 text") from error


def _plainly(error: yaml.MarkedYAMLError, text: str, line: int) -> str:
    written = "".join(text.splitlines()[line - 1 : line])
    if "\t" in written[: len(written) - len(written.lstrip())]:
        return "a tab in the indentation; YAML is indented with spaces only"
    problem = error.problem or "not well formed"
    return f"not YAML: {problem}" + (f" ({error.context})" if error.context else "")


class _Reader:
    """One pass over the events of a text; owns the anchors and the count of what was made."""

    def __init__(self, text: str) -> None:
        self._events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._made = 0

    def documents(self) -> Iterator[Node]:
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                self._anchors.clear()
                node = self._node(next(self._events), 0)
                if node.value is not None:
                    yield node

    def _node(self, event: Any, depth: int) -> Node:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event.anchor, line)
        self._count(1, line)
        if event.tag not in _UNTAGGED:
            raise TextError(line, "a YAML tag (!); values here have none")
        if depth > DEPTH_MAX:
            raise TextError(line, f"nested more than {DEPTH_MAX} deep")
        before = self._made
        if isinstance(event, yaml.ScalarEvent):
            plain = event.implicit[0]
            node = Node(line, _scalar(event.value) if plain else event.value, event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Node(line, self._list(depth))
        else:
            node = Node(line, self._mapping(depth))
        if event.anchor is not None:
            self._anchors[event.anchor] = (node, self._made - before + 1)
        return node

    def _alias(self, anchor: str | None, line: int) -> Node:
        if anchor is None or anchor not in self._anchors:
            raise TextError(line, f"the alias *{anchor} names no anchor before it")
        node, size = self._anchors[anchor]
        self._count(size, line)
        return node

    def _list(self, depth: int) -> list[Node]:
        items = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return items

    def _mapping(self, depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            if isinstance(key.value, (dict, list)) or not key.text:
                raise TextError(key.line, "a key that is not a word")
            if key.text in found:
                raise TextError(
                    key.line, f"the key {key.text} is written twice, first in line {found[key.text].line}"
                )
            found[key.text] = self._node(next(self._events), depth + 1)
        return found

    def _count(self, made: int, line: int) -> None:
        self._made += made
        if self._made > NODES_MAX:
            raise TextError(line, f"more than {NODES_MAX} values, with aliases written out")


def _scalar(text: str) -> Scalar:
    """A plain scalar by the core schema; infinities and NaN stay text, since no field wants them."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) <= _INTEGER_DIGITS_MAX:
        if _INTEGER.fullmatch(text):
            return int(text)
        if _OTHER_BASE.fullmatch(text):
            return int(text, 0)
        if _FLOAT.fullmatch(text):
            return float(text)
    return text
