"""What a reply says about itself: the `x-ondol-*` headers, and the field `ondol` that ends a stream."""

from __future__ import annotations

from typing import Final

import msgspec

from ondol.core.money import Money
from ondol.core.usage import UsageRecord
from ondol.gateway.call import Headers
from ondol.gateway.meter import Totals
from ondol.units import NG_PER_G, NS_PER_US, UJ_PER_J

JSON_HEADERS: Final[Headers] = [("content-type", "application/json")]
SSE_HEADERS: Final[Headers] = [("content-type", "text/event-stream"), ("cache-control", "no-cache")]


def place_headers(record: UsageRecord) -> Headers:
    """Where and why, which is known before the first byte."""
    return [
        ("x-ondol-request-id", record.request_id),
        ("x-ondol-site", record.answered_by or record.site),
        ("x-ondol-model", record.model),
        ("x-ondol-deployment", record.deployment),
        ("x-ondol-cache", record.cache),
        ("x-ondol-reason", record.decision.code if record.decision is not None else "none"),
    ]


def cost_text(cost: Money | None) -> str:
    """`0.0000124 USD`, or `unpriced`."""
    return "unpriced" if cost is None else str(cost)


def took_headers(totals: Totals, overhead_ns: int) -> Headers:
    """What the answer took; figures that nobody knows are left out, never zero."""
    headers = [
        ("x-ondol-cost", cost_text(totals.shown_cost)),
        ("x-ondol-overhead-us", str(overhead_ns // NS_PER_US)),
    ]
    if totals.shown_energy_uj is not None:
        headers.append(("x-ondol-energy-j", f"{totals.shown_energy_uj / UJ_PER_J:.6f}"))
    if totals.shown_carbon_ng is not None:
        headers.append(("x-ondol-carbon-g", f"{totals.shown_carbon_ng / NG_PER_G:.9f}"))
    return headers


class Closing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The field `ondol` of a stream's last JSON chunk."""

    request_id: str
    site: str
    model: str
    deployment: str
    cache: str
    reason: str
    cost: str
    energy_j: float | None = None
    carbon_g: float | None = None
    overhead_us: int = 0


def closing(record: UsageRecord, totals: Totals, overhead_ns: int) -> bytes:
    """The JSON of the field `ondol`."""
    energy, carbon = totals.shown_energy_uj, totals.shown_carbon_ng
    return msgspec.json.encode(
        Closing(
            request_id=record.request_id,
            site=record.answered_by or record.site,
            model=record.model,
            deployment=record.deployment,
            cache=record.cache,
            reason=record.decision.code if record.decision is not None else "none",
            cost=cost_text(totals.shown_cost),
            energy_j=None if energy is None else round(energy / UJ_PER_J, 6),
            carbon_g=None if carbon is None else round(carbon / NG_PER_G, 9),
            overhead_us=overhead_ns // NS_PER_US,
        )
    )


def with_closing(chunk: bytes, end: bytes) -> bytes:
    """A JSON chunk with the field `ondol` set.  One that came with its own (from a peer) loses that."""
    text = chunk.rstrip()
    if b'"ondol"' in text or b":" not in text:  # an object without fields takes no comma
        fields = msgspec.json.decode(text)
        fields["ondol"] = msgspec.Raw(end)
        return msgspec.json.encode(fields)
    return text[:-1] + b',"ondol":' + end + b"}"
