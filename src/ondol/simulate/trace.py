"""Traces: what was asked when, by the token, checked row by row.  `trace_files` reads them from files.

Columns: `time_s` (seconds from the start, not falling), `prompt_tokens`, `output_tokens`; and, where there are such,
`class` (data class), `region` (where the caller is), `route` (the model asked for), `session` (a conversation),
`prefix` (ids of the blocks of 512 tokens that the prompt begins with: a list, or in CSV parted by blanks),
`content_id` (the same id is the same request again), `similar_to` (the id of content that means the same) and
`small_ok` (whether the small model's answer would do).  Other columns are left unread.

What is not there is None, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any, Final

import msgspec

from ondol.core.inference import DataClass
from ondol.errors import ConfigError

REQUIRED: Final = ("time_s", "prompt_tokens", "output_tokens")
OPTIONAL: Final = ("class", "region", "route", "session", "prefix", "content_id", "similar_to", "small_ok")
BLOCK_TOKENS: Final = 512
PROMPT_MAX: Final = 10_000_000
OUTPUT_MAX: Final = 1_000_000
TIME_MAX_S: Final = 366 * 86_400.0
PREFIX_MAX: Final = PROMPT_MAX // BLOCK_TOKENS + 1
_TEXT_MAX: Final = 256
_PROBLEMS_MAX: Final = 8
_CLASSES: Final = frozenset(one.value for one in DataClass)
_TRUE, _FALSE = frozenset({"1", "true", "yes"}), frozenset({"0", "false", "no"})


class TraceError(ConfigError):
    """A trace says something wrong: row, column, what was found and what is allowed."""


class Trace(msgspec.Struct, kw_only=True):
    """Requests by column, in the order of their times.  An optional column is None where the trace lacks it.

    `rows` are the numbers of the requests in their file, where some were left out or sorted; `repairs` are
    sentences on what `repair` did.
    """

    name: str
    times: list[float]
    prompts: list[int]
    outputs: list[int]
    classes: list[str | None] | None = None
    regions: list[str | None] | None = None
    routes: list[str | None] | None = None
    sessions: list[str | None] | None = None
    prefixes: list[tuple[int, ...] | None] | None = None
    contents: list[str | None] | None = None
    similar: list[str | None] | None = None
    small_ok: list[bool | None] | None = None
    rows: list[int] | None = None
    repairs: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many requests."""
        return len(self.times)

    def row(self, index: int) -> int:
        """The number of a request in its file, the first is 1."""
        return index + 1 if self.rows is None else self.rows[index]

    def part(self, start: int, stop: int) -> Trace:
        """The requests from `start` to before `stop`, with times from 0."""
        cut = msgspec.structs.replace(
            self,
            **{
                field: column[start:stop]
                for field in _COLUMNS
                if (column := getattr(self, field)) is not None
            },
        )
        first = cut.times[0] if cut.times else 0.0
        cut.times = [time - first for time in cut.times]
        cut.rows = [self.row(index) for index in range(start, min(stop, len(self)))]
        return cut


_COLUMNS: Final = (
    "times", "prompts", "outputs", "classes", "regions", "routes", "sessions", "prefixes", "contents", "similar",
    "small_ok",
)  # fmt: skip
FIELDS: Final = {
    "class": "classes", "region": "regions", "route": "routes", "session": "sessions", "prefix": "prefixes",
    "content_id": "contents", "similar_to": "similar", "small_ok": "small_ok",
}  # fmt: skip


def build(rows: Iterable[Mapping[str, Any]], *, name: str, repair: bool = False) -> Trace:
    """The trace of rows as mappings from column to text or value; the columns are those of the first row.

    Raises:
        TraceError: as `read_trace`.
    """
    builder = _Builder(name, repair=repair)
    for number, row in enumerate(rows, 1):
        builder.add(number, row)
    return builder.done()


class _Bad(Exception):
    """One cell that is not as it must be."""

    def __init__(self, column: str, found: object, allowed: str) -> None:
        shown = repr(found)
        super().__init__(f"column {column}: found {shown[:60]}; allowed: {allowed}")


class _Builder:
    """Checks rows and collects columns; owned by `build`."""

    def __init__(self, name: str, *, repair: bool) -> None:
        self._name = name
        self._repair = repair
        self._columns: tuple[str, ...] = ()
        self._kept: list[tuple[Any, ...]] = []
        self._numbers: list[int] = []
        self._problems: list[str] = []
        self._dropped = 0
        self._first_dropped = ""
        self._unsorted = 0
        self._last = 0.0
        self._seen = False

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        if not self._seen:
            self._seen = True
            self._head(row)
        try:
            values = (*_figures(row), *(_PARSERS[column](row.get(column)) for column in self._columns))
        except _Bad as problem:
            self._drop(f"row {number}, {problem}")
            return
        if values[0] < self._last:
            self._unsorted += 1
            if not self._repair:
                self._problem(
                    f"row {number}, column time_s: found {values[0]:g} after {self._last:g}; allowed: times that do "
                    "not fall"
                )
        self._last = max(self._last, values[0])
        self._kept.append(values)
        self._numbers.append(number)

    def _head(self, row: Mapping[str, Any]) -> None:
        missing = [column for column in REQUIRED if column not in row]
        if missing:
            found = ", ".join(str(key)[:40] for key in list(row)[:12]) or "none"
            raise TraceError(
                f"{self._name}: row 1, column {', '.join(missing)}: missing; found the columns {found}; allowed: "
                f"{', '.join(REQUIRED)}, and optionally {', '.join(OPTIONAL)}"
            )
        self._columns = tuple([column for column in OPTIONAL if column in row])

    def _drop(self, problem: str) -> None:
        self._dropped += 1
        self._first_dropped = self._first_dropped or problem
        if not self._repair:
            self._problem(problem)

    def _problem(self, problem: str) -> None:
        self._problems.append(problem)
        if len(self._problems) >= _PROBLEMS_MAX:
            self._refuse(" (and perhaps more)")

    def _refuse(self, more: str = "") -> None:
        lines = "\n".join(f"{self._name}: {problem}" for problem in self._problems)
        raise TraceError(
            f"{lines}{more}\nmend the trace, or let --repair leave out such rows and sort by time"
        )

    def done(self) -> Trace:
        if self._problems:
            self._refuse()
        if not self._kept:
            dropped = (
                f"; left out: {self._dropped}, the first: {self._first_dropped}" if self._dropped else ""
            )
            raise TraceError(f"{self._name}: found no request; expected at least one row{dropped}")
        repairs = []
        if self._dropped:
            repairs.append(f"left out {self._dropped} rows that were wrong; the first: {self._first_dropped}")
        if self._unsorted:
            order = sorted(range(len(self._kept)), key=lambda index: self._kept[index][0])
            self._kept = [self._kept[index] for index in order]
            self._numbers = [self._numbers[index] for index in order]
            repairs.append(f"sorted by time: {self._unsorted} rows came after a later one")
        columns = [list(column) for column in zip(*self._kept, strict=True)]
        trace = Trace(
            name=self._name, times=columns[0], prompts=columns[1], outputs=columns[2], repairs=tuple(repairs),
            rows=self._numbers if repairs else None,
        )  # fmt: skip
        for column, values in zip(self._columns, columns[3:], strict=True):
            if any(value is not None for value in values):
                setattr(trace, FIELDS[column], values)
        return trace


def _figures(row: Mapping[str, Any]) -> tuple[float, int, int]:
    time = _number("time_s", row.get("time_s"), "seconds from the start, 0 to 31622400")
    if not 0 <= time <= TIME_MAX_S:
        raise _Bad("time_s", row.get("time_s"), "seconds from the start, 0 to 31622400")
    return time, _tokens("prompt_tokens", row, 1, PROMPT_MAX), _tokens("output_tokens", row, 0, OUTPUT_MAX)


def _number(column: str, value: Any, allowed: str) -> float:
    if isinstance(value, bool) or value is None or value == "":
        raise _Bad(column, value, allowed)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _Bad(column, value, allowed) from None
    if not isfinite(number):
        raise _Bad(column, value, allowed)
    return number


def _tokens(column: str, row: Mapping[str, Any], least: int, most: int) -> int:
    allowed = f"a whole number from {least} to {most}"
    number = _number(column, row.get(column), allowed)
    if number != int(number) or not least <= number <= most:
        raise _Bad(column, row.get(column), allowed)
    return int(number)


def _text(column: str) -> Any:
    def parse(value: Any) -> str | None:
        if value is None or value == "":
            return None
        text = str(value)
        if len(text) > _TEXT_MAX:
            raise _Bad(column, value, f"at most {_TEXT_MAX} characters")
        return text

    return parse


def _class(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if value not in _CLASSES:
        raise _Bad("class", value, ", ".join(one.value for one in DataClass))
    return str(value)


def _prefix(value: Any) -> tuple[int, ...] | None:
    if value is None or value == "":
        return None
    parts = value.split() if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if len(parts) > PREFIX_MAX:
        raise _Bad("prefix", value, f"at most {PREFIX_MAX} blocks")
    try:
        return tuple([int(part) for part in parts])
    except (TypeError, ValueError):
        raise _Bad("prefix", value, "whole numbers, the ids of blocks, parted by blanks") from None


def _flag(value: Any) -> bool | None:
    if value is None or value == "":
        return None
    word = str(value).lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise _Bad("small_ok", value, "true, false, 1 or 0")


_PARSERS: Final[dict[str, Any]] = {
    "class": _class, "region": _text("region"), "route": _text("route"), "session": _text("session"),
    "prefix": _prefix, "content_id": _text("content_id"), "similar_to": _text("similar_to"), "small_ok": _flag,
}  # fmt: skip
