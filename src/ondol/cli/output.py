"""How the commands print: figures as people read them, and JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text


def console(*, stderr: bool = False) -> Console:
    """A console that keeps numbers and names uncoloured, and plain where it is not a terminal."""
    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout, indented."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    sys.stdout.write(text.decode() + "\n")


def table(columns: Sequence[tuple[str, bool]], *, gap: int = 2) -> Table:
    """An empty table without lines; each column is its heading and whether it holds numbers.

    Numbers are never broken over lines; words are, where the terminal is narrow.
    """
    made = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for heading, is_number in columns:
        made.add_column(heading, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    return made


class Paragraph:
    """Text that comes in pieces, printed word by word within the terminal's width, indented.

    At most the word that is not finished yet is held back.
    """

    def __init__(self, screen: Console, *, indent: int) -> None:
        """Start a paragraph; nothing is printed yet."""
        self._screen = screen
        self._indent = indent
        self._column = 0
        self._word = ""

    def write(self, text: str) -> None:
        """Print what is whole of the text so far."""
        for one in text:
            if not one.isspace():
                self._word += one
                continue
            self._flush()
            if one == "\n":
                self._break()

    def end(self) -> None:
        """Print the rest, and end the line."""
        self._flush()
        self._break()

    def _flush(self) -> None:
        word = Text(self._word)
        self._word = ""
        if not word.cell_len:
            return
        if self._column and self._column + 1 + word.cell_len > self._screen.width - 1:
            self._break()
        lead = " " if self._column else " " * self._indent
        self._column = (self._column or self._indent - 1) + 1 + word.cell_len
        self._screen.print(Text(lead) + word, end="", soft_wrap=True)

    def _break(self) -> None:
        if self._column:
            self._screen.print()
        self._column = 0


def significant(value: float | None, digits: int = 3) -> str:
    """A figure with that many significant digits, never in powers of ten; a dash where it is unknown."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    rounded = Decimal(f"{value:.{digits - 1}e}")
    text = format(rounded, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float | None) -> str:
    """Milliseconds below a second, else seconds."""
    if seconds is None:
        return "–"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
