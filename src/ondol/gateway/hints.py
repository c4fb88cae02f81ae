"""What the caller wishes, from the `x-ondol-*` request headers.  A wrong value is refused, never guessed."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Final
from urllib.parse import unquote

from ondol.core.identity import Hints
from ondol.core.inference import DataClass, Objective
from ondol.errors import InvalidRequest

TAGS_MAX: Final = 16
TAG_CHARACTERS_MAX: Final = 512
LATENCY_MS_MAX: Final = 24 * 3600 * 1000
AMOUNT_MAX: Final = 10**15
AMOUNT_PLACES_MAX: Final = 30

TRACE: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""A `traceparent` of W3C Trace Context, level 1."""

NO_HINTS: Final = Hints()


def parse_hints(header: Callable[[str], str | None]) -> Hints:
    """The hints of a request, `header` giving a header's value by its lower-case name.

    Raises:
        InvalidRequest: a header has a value that is not allowed; `param` names the header.
    """
    data_class = header("x-ondol-data-class")
    objective = header("x-ondol-objective")
    allows = "x-ondol-max-latency-ms"
    latency = header(allows)
    if latency is None:
        allows = "x-ondol-remaining-ms"
        latency = header(allows)
    cost = header("x-ondol-max-cost")
    tags = header("x-ondol-tags")
    control = header("cache-control")
    no_cache = control is not None and ("no-cache" in control or "no-store" in control)
    trace = _trace(header("traceparent"))
    if not no_cache and not trace and data_class is objective is latency is cost is tags is None:
        return NO_HINTS
    return Hints(
        data_class=None
        if data_class is None
        else DataClass(_one_of("x-ondol-data-class", data_class, DataClass)),
        objective=None if objective is None else _one_of("x-ondol-objective", objective, Objective),
        max_latency_ms=None if latency is None else _milliseconds(allows, latency),
        max_cost=None if cost is None else _amount(cost),
        tags=() if tags is None else _tags(tags),
        no_cache=no_cache,
        trace=trace,
    )


def _trace(found: str | None) -> str:
    """One that is malformed counts as none (W3C Trace Context, level 1, section 3.2)."""
    return found if found is not None and TRACE.fullmatch(found) else ""


def _one_of(name: str, value: str, allowed: type[DataClass] | type[Objective]) -> str:
    text = value.strip().lower()
    names = [one.value for one in allowed]
    if text not in names:
        raise InvalidRequest(
            f"'{name}': found '{value[:40]}', expected one of {', '.join(names)}", param=name
        )
    return text


def _milliseconds(name: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 12 or not 1 <= int(value) <= LATENCY_MS_MAX:
        raise InvalidRequest(
            f"'{name}': found '{value[:40]}', expected whole milliseconds from 1 to a day", param=name
        )
    return int(value)


def _amount(value: str) -> str:
    """Decimal text and an ISO currency, such as `0.002 USD`; the currency is checked where it is used."""
    parts = value.split()
    try:
        amount = Decimal(parts[0])
    except (InvalidOperation, IndexError):
        amount = Decimal(-1)
    # Exponents are bounded too: 1e999999 is short to write, and a million digits to compute with.
    if (
        len(parts) != 2
        or not amount.is_finite()
        or not 0 <= amount <= AMOUNT_MAX
        or amount.adjusted() < -AMOUNT_PLACES_MAX
        or not (len(parts[1]) == 3 and parts[1].isalpha())
    ):
        raise InvalidRequest(
            f"'x-ondol-max-cost': found '{value[:40]}', expected an amount and a currency, such as 0.002 USD",
            param="x-ondol-max-cost",
        )
    return f"{parts[0]} {parts[1].upper()}"


def _tags(value: str) -> tuple[tuple[str, str], ...]:
    pairs = [item for item in value.split(",") if item.strip()]
    if len(pairs) > TAGS_MAX:
        raise InvalidRequest(
            f"'x-ondol-tags': found {len(pairs)} tags, at most {TAGS_MAX}", param="x-ondol-tags"
        )
    found = []
    for pair in pairs:
        key, equals, text = pair.strip().partition("=")
        if not equals or not key or len(pair) > TAG_CHARACTERS_MAX:
            raise InvalidRequest(
                f"'x-ondol-tags': found '{pair[:40]}', expected k=v, comma separated, percent-encoded",
                param="x-ondol-tags",
            )
        found.append((unquote(key), unquote(text)))
    return tuple(found)
