"""The columns of the Parquet copy: one record, flat.

Amounts of money are DECIMAL(38,0) in the currency's scaled units: Parquet has no larger integer that is exact, and
the sum of a big company's nano-won passes 63 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from ondol.core.costs import own_energy
from ondol.core.usage import UsageRecord

_TEXT: Final = "VARCHAR"
_COUNT: Final = "BIGINT"
_AMOUNT: Final = "DECIMAL(38,0)"

_FIELDS: Final[dict[str, tuple[str, Callable[[UsageRecord], Any]]]] = {
    "gateway": (_TEXT, lambda record: record.gateway),
    "request_id": (_TEXT, lambda record: record.request_id),
    "time_ns": (_COUNT, lambda record: record.time_ns),
    "clock_offset_ns": (_COUNT, lambda record: record.clock_offset_ns),
    "site": (_TEXT, lambda record: record.site),
    "answered_by": (_TEXT, lambda record: record.answered_by or record.site),
    "origin_site": (_TEXT, lambda record: record.origin.site if record.origin else None),
    "origin_request": (_TEXT, lambda record: record.origin.request_id if record.origin else None),
    "tenant": (_TEXT, lambda record: record.tenant),
    "team": (_TEXT, lambda record: record.team),
    "key_id": (_TEXT, lambda record: record.key_id),
    "subject": (_TEXT, lambda record: record.user),
    "route": (_TEXT, lambda record: record.route),
    "task": (_TEXT, lambda record: record.task),
    "model": (_TEXT, lambda record: record.model),
    "deployment": (_TEXT, lambda record: record.deployment),
    "outcome": (_TEXT, lambda record: record.outcome),
    "status": (_COUNT, lambda record: record.status),
    "error": (_TEXT, lambda record: record.error),
    "data_class": (_TEXT, lambda record: record.data_class),
    "cache": (_TEXT, lambda record: record.cache),
    "stream": ("BOOLEAN", lambda record: record.stream),
    "reason": (_TEXT, lambda record: record.decision.code if record.decision else None),
    "attempts": (_COUNT, lambda record: len(record.attempts)),
    "input_tokens": (_COUNT, lambda record: record.usage.input_tokens),
    "output_tokens": (_COUNT, lambda record: record.usage.output_tokens),
    "cached_tokens": (_COUNT, lambda record: record.usage.cached_tokens),
    "reasoning_tokens": (_COUNT, lambda record: record.usage.reasoning_tokens),
    "cost": (_AMOUNT, lambda record: str(record.cost)),
    "currency": (_TEXT, lambda record: record.currency),
    "unpriced": ("BOOLEAN", lambda record: record.unpriced),
    "energy_uj": (_AMOUNT, lambda record: _text(own_energy(record)[0])),
    "carbon_ng": (_AMOUNT, lambda record: _text(own_energy(record)[1])),
    "ttft_ns": (_COUNT, lambda record: record.ttft_ns),
    "total_ns": (_COUNT, lambda record: record.total_ns),
    "overhead_ns": (_COUNT, lambda record: record.overhead_ns),
    "tags": ("MAP(VARCHAR, VARCHAR)", lambda record: dict(record.tags)),
}

COLUMNS: Final[tuple[str, ...]] = ("seq", *_FIELDS)
"""The columns of `usage`.  Tokens are of requests: leave rows with an `origin_site` out of their sum, as
`core.costs` does; cost, energy and carbon are what the row's own site booked, so they add up over all rows."""

JSON_TYPES: Final[dict[str, str]] = {
    "seq": _COUNT,
    **{name: _TEXT if kind == _AMOUNT else kind for name, (kind, _) in _FIELDS.items()},
}

SELECT: Final = ", ".join(
    f"CAST({name} AS {_AMOUNT}) AS {name}" if name in _FIELDS and _FIELDS[name][0] == _AMOUNT else name
    for name in COLUMNS
)

EMPTY: Final = "SELECT {} WHERE false".format(
    ", ".join(
        f"CAST(NULL AS {_FIELDS[name][0] if name in _FIELDS else _COUNT}) AS {name}" for name in COLUMNS
    )
)
"""The same columns without a row: before the first record."""

_READERS: Final = tuple((name, read) for name, (_, read) in _FIELDS.items())
_ENCODER: Final = msgspec.json.Encoder()


def line_of(seq: int, record: UsageRecord) -> bytes:
    """The record as one line of JSON, for DuckDB to read; about 12 µs."""
    line: dict[str, Any] = {"seq": seq}
    for name, read in _READERS:
        line[name] = read(record)
    return _ENCODER.encode(line) + b"\n"


def _text(amount: int | None) -> str | None:
    return None if amount is None else str(amount)
