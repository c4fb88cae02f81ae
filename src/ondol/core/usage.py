"""What happened and what it cost: one record a request, chained by hash.

The record is encoded as JSON with its fields in a fixed order, so that a person can read the ledger with
any SQLite tool and the same record always gives the same bytes.
"""

from __future__ import annotations

import hashlib

import msgspec

from ondol.core.identity import Origin
from ondol.core.inference import Usage

GENESIS: bytes = hashlib.sha256(b"ondol ledger, version 1").digest()


class Attempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One try at one endpoint: a fall-back makes two, a cascade or a hedge too.

    `outcome` is ok, unavailable, rejected, failed, cancelled or deadline.  `cost` is what this site
    pays, at the currency's scale; None with `price` None means unpriced.  `peer_*` is what another site
    of ours booked for us (`peer_request` is its request id): a reference, never a cost of this site.
    """

    deployment: str
    engine: str
    site: str
    outcome: str
    model: str = ""
    usage: Usage = Usage()
    price: str | None = None
    cost: int | None = None
    currency: str | None = None
    energy_uj: int | None = None
    energy_method: str | None = None
    carbon_ng: int | None = None
    carbon_source: str | None = None
    ttft_ns: int | None = None
    total_ns: int = 0
    error: str | None = None
    peer_request: str | None = None
    peer_cost: int | None = None
    peer_currency: str | None = None
    peer_energy_uj: int | None = None
    peer_carbon_ng: int | None = None


class Dropped(msgspec.Struct, frozen=True, array_like=True):
    """An endpoint that could not be chosen: its name, a code, and the figure that decided."""

    deployment: str
    code: str
    detail: str = ""


class Decision(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why the answer came from where it came, as codes and figures; sentences are made on reading.

    `code` is an ASCII reason (`x-ondol-reason`).  `lost_on` names the figure on which the runner-up lost
    most (latency, price, carbon, quality, queue), with both values.  `hedge` is who was asked as well, or would have
    been, because the deadline was near.  `recall` is what the semantic cache said, as a code, `similarity` that of the
    nearest question.
    """

    code: str
    objective: str = ""
    chosen: str | None = None
    runner_up: str | None = None
    lost_on: str | None = None
    chosen_value: float | None = None
    runner_up_value: float | None = None
    dropped: tuple[Dropped, ...] = ()
    hedge: str | None = None
    recall: str = ""
    similarity: float | None = None


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request at the site that the client called.

    `outcome` is completed, failed, cancelled or refused.  `time_ns` is the wall clock at arrival,
    durations are monotonic.  `user` is a pseudonym.  `cost` is the sum over attempts that this site
    pays; `unpriced` is true where an attempt used tokens that have no price.  `clock_offset_ns` is how far
    the site's clock was ahead of the hub's, as it was last measured; None where it never was.  `unleased` names
    the fleet's budgets that do not count it: a local answer while the hub was away, as the team allows.
    """

    request_id: str
    time_ns: int
    site: str
    gateway: str
    tenant: str
    team: str
    key_id: str
    route: str
    task: str
    outcome: str
    status: int
    data_class: str = "internal"
    cache: str = "off"
    model: str = ""
    deployment: str = ""
    answered_by: str = ""
    usage: Usage = Usage()
    cost: int = 0
    currency: str = "USD"
    unpriced: bool = False
    energy_uj: int | None = None
    carbon_ng: int | None = None
    ttft_ns: int | None = None
    total_ns: int = 0
    overhead_ns: int = 0
    stream: bool = False
    error: str | None = None
    decision: Decision | None = None
    attempts: tuple[Attempt, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    user: str | None = None
    origin: Origin | None = None
    clock_offset_ns: int | None = None
    unleased: tuple[str, ...] = ()


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(UsageRecord)


def encode_record(record: UsageRecord) -> bytes:
    """The bytes that are stored and hashed."""
    return _ENCODER.encode(record)


def decode_record(payload: bytes) -> UsageRecord:
    """The record of stored bytes.

    Raises:
        msgspec.DecodeError: the bytes are not a record.
    """
    return _DECODER.decode(payload)


def link(previous: bytes, seq: int, payload: bytes) -> bytes:
    """The hash of a record: SHA-256 over the hash before it, its number (8 bytes, big-endian), itself."""
    return hashlib.sha256(previous + seq.to_bytes(8, "big") + payload).digest()
