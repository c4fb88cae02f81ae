"""What is wrong with a file, collected: all of it is said at once, each with its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

from ondol.config.text import Node
from ondol.errors import ConfigError

PROBLEMS_SHOWN: Final = 20
_NAMES_SHOWN: Final = 12
_FOUND_CHARS: Final = 60
_SECRET_STARTS: Final = (
    "sk-", "sk_", "ondol_", "gsk_", "ghp_", "hf_", "xoxb-", "AIza", "AKIA", "Bearer ", "eyJ",
)  # fmt: skip
_SECRET_CHARS: Final = 20


class Report:
    """The problems found so far; owned by one reading of one file."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._problems: list[tuple[int, str]] = []

    def add(self, line: int, message: str) -> None:
        """Note a problem at a line (from 1)."""
        self._problems.append((line, message))

    def wrong(self, node: Node, where: str, allowed: str) -> None:
        """Note that the value of a node is not what is allowed there."""
        self.add(node.line, f"{where}: found {found(node)}; allowed: {allowed}")

    def unknown(self, node: Node, where: str, name: str, names: Iterable[str]) -> None:
        """Note a reference to a name that does not exist, with the nearest that does."""
        self.add(node.line, f"{where}: found {quoted(name)}; allowed: {choices(name, names)}")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is wrong so far."""
        return not self._problems

    def raise_any(self) -> None:
        """Raise what was noted.

        Raises:
            ConfigError: something was.
        """
        if not self._problems:
            return
        lines = [f"{self._file}:{line}: {message}" for line, message in sorted(self._problems)]
        if len(lines) > PROBLEMS_SHOWN:
            more = len(lines) - PROBLEMS_SHOWN
            lines[PROBLEMS_SHOWN:] = [f"{self._file}: and {more} more; mend these first"]
        raise ConfigError("\n".join(lines))


def choices(name: str, names: Iterable[str]) -> str:
    """The names that may be written, the one that was probably meant first."""
    known = sorted(names)
    if not known:
        return "none is defined in this file"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    shown = ", ".join(known[:_NAMES_SHOWN]) + (", …" if len(known) > _NAMES_SHOWN else "")
    return f"{shown} (did you mean {near[0]}?)" if near else shown


def found(node: Node) -> str:
    """A value for a message: short, and never a secret."""
    match node.value:
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case None:
            return "nothing"
        case str():
            return quoted(node.value)
        case _:
            return node.text


def quoted(text: str) -> str:
    """Text for a message, in quotes: short, one line, and never a secret."""
    if is_secret(text):
        return "a secret (not shown)"
    short = text if len(text) <= _FOUND_CHARS else text[: _FOUND_CHARS - 1] + "…"
    return f'"{short if short.isprintable() else ascii(short)[1:-1]}"'


def is_secret(text: str) -> bool:
    """Whether a text looks like a key of a vendor, or one of ours."""
    return len(text) >= _SECRET_CHARS and text.startswith(_SECRET_STARTS)
