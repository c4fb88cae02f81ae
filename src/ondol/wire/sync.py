"""What a site and its hub say to each other: values, and their bytes.  Version 1 of the format.

Every message is one MessagePack map with named fields.  A field that a receiver does not know is ignored, one
that a sender does not know has a default: so a hub serves sites of older releases, and a field is never renamed
or given another meaning.  `tests/unit/wire/test_sync_versions.py` holds recorded messages of every release.

All calls are POST, dialled by the site, below `PREFIX`; the answers are the `…Reply` beside each.  A call that
fails is answered with an `Error`.  Times are wall-clock nanoseconds of whoever says them.
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from ondol.core.dsse import Envelope
from ondol.errors import InvalidRequest

PREFIX: Final = "/v1/sync/"
CONTENT_TYPE: Final = "application/vnd.ondol.sync.v1+msgpack"
VERSION: Final = 1
OLDEST: Final = 1
"""The oldest version that a hub of this release serves."""

RANGE_ROWS_MAX: Final = 4096
RANGE_BYTES_MAX: Final = 4 * 1024 * 1024
HEARTBEAT_S: Final = 5.0
"""How often a watch says that it lives."""
SILENCE_S: Final = 12.0
"""A watch that says nothing for so long is dead, though nothing was reset."""
REPORT_S: Final = 10.0
"""How often a site says how it is."""
STALE_S: Final = 30.0
"""A site that was not heard for so long is shown as stale, never as current."""

M = TypeVar("M")


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What all messages share: unknown fields are ignored."""


class Error(Message, frozen=True, kw_only=True):
    """Why a call was refused: a stable code, a sentence, and when trying again may help.

    `hub_ns` is the hub's time: a site whose clock is far off is let in nowhere, and must learn it from this.
    """

    code: str
    message: str
    retry_after_s: float | None = None
    hub_ns: int = 0


# ---- joining


class Join(Message, frozen=True, kw_only=True):
    """`join`, the one call without a credential: a token that was invited, and the site's own public key.

    `site` is asked for only with a factory key, which may name new sites; a single-use token names its own.
    `address` is where other sites reach this one; `csr` (PEM) asks for a TLS certificate for that address.
    """

    token: str
    key: bytes
    site: str = ""
    address: str = ""
    csr: bytes = b""
    software: str = ""
    version: int = VERSION


class JoinReply(Message, frozen=True, kw_only=True):
    """Who the site is now.  `hub_keys` are the public keys that sign for this fleet, by id."""

    fleet: str
    site: str
    credential: Envelope
    epoch: Envelope
    hub_keys: dict[str, bytes]
    hub_ns: int
    certificate: bytes = b""


class Renew(Message, frozen=True, kw_only=True):
    """`renew`: a new credential for the same key, before the old one ends."""

    csr: bytes = b""


class RenewReply(Message, frozen=True, kw_only=True):
    """The new credential, and the hub's present keys."""

    credential: Envelope
    hub_keys: dict[str, bytes]
    certificate: bytes = b""


# ---- a session


class Hello(Message, frozen=True, kw_only=True):
    """`hello`: a process of a site begins to speak.

    `boot` counts the starts of its data directory, durably; `instance` is random for each start.  Two machines
    that were made from one disk image are seen by it: both say the same site, and both keep speaking.

    A hub that was restored from a backup learns from it: `lease_ns` is `LeaseReply.hub_ns` of the last answer that
    the process took, `era` the last one that it heard (None: of a release that knows none).
    """

    boot: int
    instance: str
    gateway: str
    generation: int
    epoch: int
    acknowledged: int
    wall_ns: int
    software: str = ""
    versions: tuple[int, ...] = (VERSION,)
    answer: str = ""
    lease_ns: int = 0
    era: int | None = None


class HelloReply(Message, frozen=True, kw_only=True):
    """`wait_s` > 0: another process of this site was heard a moment ago; ask again after that.

    A `challenge` that is not empty: another process has taken over since; say hello again at once, with it.

    `mark` is the last number of this gateway's ledger that the hub has durably, `mark_hash` its hash.  `era` is a new
    one whenever the hub wants to hear again what each site holds of every budget.
    """

    hub_ns: int
    generation: int
    epoch: int
    mark: int
    mark_hash: bytes
    wait_s: float = 0.0
    challenge: str = ""
    version: int = VERSION
    era: int = 0


class Watch(Message, frozen=True, kw_only=True):
    """`watch`: answered by a stream of `Announcement`s, one JSON object a line, until either side ends it."""

    instance: str
    generation: int = 0


class Announcement(Message, frozen=True, kw_only=True):
    """One line of a watch: the newest numbers.  A line without news is the heartbeat.

    `changes` is another number whenever the site would be sent something else than before (a new key, say).  `era` is
    as in `HelloReply`.
    """

    generation: int
    epoch: int
    hub_ns: int
    changes: int = 0
    era: int = 0


# ---- down


class Fetch(Message, frozen=True, kw_only=True):
    """`desired`: what shall this site be?  `have` are the digests of the bodies that it has already."""

    instance: str
    have: tuple[str, ...] = ()


class FetchReply(Message, frozen=True, kw_only=True):
    """The signed manifest and the bodies that were not in `have`; the newest list of who is out."""

    manifest: Envelope | None
    bodies: tuple[bytes, ...]
    epoch: Envelope


# ---- up


class Range(Message, frozen=True, kw_only=True):
    """`usage`: rows `first` … `first + len(rows) - 1` of a gateway's ledger, each as it is stored.

    `previous` is the hash before the first row; the hub computes the chain again.  `head` is a signed statement
    (`HEAD_TYPE`) of the site over the number and hash of the last row.
    """

    instance: str
    gateway: str
    first: int
    previous: bytes
    rows: tuple[bytes, ...]
    head: Envelope


HEAD_TYPE: Final = "application/vnd.ondol.ledger-head.v1"


class Head(Message, frozen=True, kw_only=True):
    """What a site signs of its ledger: the hash of a row covers all rows before it."""

    site: str
    gateway: str
    seq: int
    hash: bytes


class RangeReply(Message, frozen=True, kw_only=True):
    """The hub's durable mark after this call: what comes after it is asked for next."""

    mark: int
    mark_hash: bytes


class Event(Message, frozen=True, kw_only=True):
    """One audit event or one sample of telemetry: `id` rises by one within a site and a class.

    `offset_ns` is the measured offset of the site's clock to the hub's when it was written, None if unknown.
    """

    id: int
    time_ns: int
    kind: str
    fields: dict[str, str | int | float]
    offset_ns: int | None = None


class Events(Message, frozen=True, kw_only=True):
    """`events`: audit, then telemetry, each in order.  `thinned`: samples that were dropped for want of disk."""

    instance: str
    audit: tuple[Event, ...] = ()
    telemetry: tuple[Event, ...] = ()
    thinned: int = 0


class EventsReply(Message, frozen=True, kw_only=True):
    """The last id of each class that the hub has durably."""

    audit: int
    telemetry: int


class DeploymentState(Message, frozen=True, kw_only=True):
    """One deployment as it is: `ready` or why not yet."""

    name: str
    ready: bool
    why: str = ""


class Figures(Message, frozen=True, kw_only=True):
    """What a rollout is judged by: one route or deployment of one site under one generation, since it began.

    `latency_ms` is a bounded random sample (at most 200) of times to the first token, or to the whole answer.
    `quality` are scores in [0, 1] where something scores answers.  `latency_at` and `quality_at` say of each value to
    which request it belongs, counted as `requests` counts: so that the hub can tell what was seen since a time.
    """

    generation: int
    requests: int
    errors: int
    latency_ms: tuple[float, ...] = ()
    quality: tuple[float, ...] = ()
    latency_at: tuple[int, ...] = ()
    quality_at: tuple[int, ...] = ()


class Report(Message, frozen=True, kw_only=True):
    """`report`: how the site is.  Replaces the report before; nothing adds up over reports.

    `refused` says why a generation that was fetched is not the one that runs.  `offset_ns` is the site's clock less
    the hub's.  `gave_back` and leases travel in `Lease`.
    """

    instance: str
    generation: int
    epoch: int
    last_seq: int
    acknowledged: int
    wall_ns: int
    offset_ns: int | None = None
    refused: str = ""
    refused_generation: int = 0
    ledger: str = ""
    deployments: tuple[DeploymentState, ...] = ()
    figures: tuple[Figures, ...] = ()
    notes: tuple[str, ...] = ()


class ReportReply(Message, frozen=True, kw_only=True):
    """The hub's time, and sentences for the site's operator (a clock that is off, a hub that went back)."""

    hub_ns: int
    notes: tuple[str, ...] = ()


class Lease(Message, frozen=True, kw_only=True):
    """`lease`: a site's share of a budget in one period, amounts in scaled units of `currency`, as decimal text.

    `granted` is what the site holds by its own books, with what it gives back taken off already; `spent` what of
    it is spent, written off or reserved.  `want` is how much more it would like, `least` the smallest part that
    helps a request which waits ("0": none does).  `give_back` says how much came off `granted` with this call.
    Totals, never differences, and `number` only rises: a message that arrives twice, or late, changes nothing.
    `era` is the last that the site had heard when it made the call (None: of a release that knows none).
    """

    instance: str
    budget: str
    period: str
    number: int
    spent: str
    want: str
    give_back: str = "0"
    granted: str = ""
    least: str = "0"
    currency: str = ""
    era: int | None = None


class LeaseReply(Message, frozen=True, kw_only=True):
    """The site's whole grant in this period after this call, and how many seconds it may be used from now.

    `number` is that of the call it answers, or of a later one that came before it: then the site goes on from that
    number and ignores the rest.  `left` is what the fleet's budget has not granted to anybody.  `frozen` says why
    nothing was granted though it may be there; `hub_ns` when the hub wrote this down.
    """

    budget: str
    period: str
    number: int
    granted: str
    term_s: float
    left: str
    frozen: str = ""
    hub_ns: int = 0


_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    return _ENCODER.encode(message)


def decode(raw: bytes, kind: type[M]) -> M:
    """The message of some bytes.

    Raises:
        InvalidRequest: they are no such message.
    """
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(
            f"sync: expected a {kind.__name__.lower()} of version {VERSION}: {error}"
        ) from error
