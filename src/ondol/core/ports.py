"""The seams between what decides and what does I/O.  Few methods each; every one says its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from ondol.core.desired import Desired
from ondol.core.dsse import Envelope
from ondol.core.identity import ApiKey, Origin, Principal
from ondol.core.inference import Capability, Chunk, Completion, DataClass, InferenceRequest
from ondol.core.trust import Epoch, Trust
from ondol.core.usage import UsageRecord

T = TypeVar("T")


class EngineCall(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at one endpoint.  `deadline_ns` is monotonic, absolute; `trace` a W3C `traceparent`, or empty."""

    request: InferenceRequest
    request_id: str
    attempt: int
    deadline_ns: int
    max_output_tokens: int
    principal: Principal
    data_class: DataClass = DataClass.INTERNAL
    objective: str = ""
    origin: Origin | None = None
    trace: str = ""


class Engine(Protocol):
    """What answers.

    Cancelling the awaiting task (or closing the iterator) cancels the work in the engine, at once.
    """

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it can do beyond its task."""
        ...

    async def start(self) -> None:
        """Make ready, in the background where that takes long; calls before that are unavailable."""
        ...

    def problem(self) -> str | None:
        """None when it can take a request now, else a sentence that says why not and until when."""
        ...

    async def complete(self, call: EngineCall) -> Completion:
        """The whole answer.

        Raises:
            EngineUnavailable: it could not be reached, is not ready, is limited, or answered nonsense.
            EngineRejected: it says that the request is wrong.
            DeadlineExceeded: the deadline passed.
        """
        ...

    def stream(self, call: EngineCall) -> AsyncIterator[Chunk]:
        """The answer's chunks as they come, without holding any back.

        A normal end means that the answer is complete (`[DONE]` came, or the last choice finished).

        Raises (from the iterator): as `complete` does before the first chunk; after it
            EngineFailed: the stream broke, or said an error.
            DeadlineExceeded: the deadline passed.
        """
        ...

    async def close(self) -> None:
        """Cancel what runs, end every child, release everything; returns when that is done."""
        ...


class Clock(Protocol):
    """Time, as an argument.  Monotonic for durations and deadlines, wall for records."""

    def now_ns(self) -> int:
        """Nanoseconds of a clock that never goes back."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since 1970-01-01 UTC."""
        ...


class Ledger(Protocol):
    """The append-only record of what happened and what it cost."""

    def submit(self, record: UsageRecord) -> Awaitable[int]:
        """Queue the record now; awaiting gives its sequence number once it is durable, never before.

        Cancelling the waiter does not take the record back.

        Raises (also when awaited):
            LedgerUnavailable: it could not be committed; nothing of it is kept.
        """
        ...

    def problem(self) -> str | None:
        """None while billable work may be taken, else why not (full, or not writable)."""
        ...

    @property
    def full(self) -> bool:
        """Whether the problem is that the ledger is at its bound."""
        ...

    async def find(self, request_id: str) -> UsageRecord | None:
        """The record of a request, or None."""
        ...

    async def lease(self, budget: str, period: str, amount: int) -> None:
        """Write durably that `amount` (scaled units, in total) of a budget's period may be spent."""
        ...


class KeyStore(Protocol):
    """API keys at rest, with a read-only view that costs nothing to use."""

    def snapshot(self) -> dict[str, ApiKey]:
        """The keys by id, as of now; a new dict after every change, never mutated."""
        ...

    def create(self, key: ApiKey) -> None:
        """Store a key durably."""
        ...

    def revoke(self, key_id: str, now_ns: int) -> bool:
        """Revoke durably; False when there is no such key."""
        ...

    def touch(self, key_id: str, wall_ns: int) -> None:
        """Note that a key was used now; in memory, written later."""
        ...

    def all(self) -> Sequence[ApiKey]:
        """Every key, revoked and expired ones too, oldest first."""
        ...


class LedgerRange(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of a ledger as they are stored: numbers `first` and on, and the hash before the first."""

    first: int
    previous: bytes
    rows: tuple[bytes, ...]
    last_hash: bytes


class Outbox(Protocol):
    """The ledger as what is sent from: ranges go out, acknowledgements come back, nothing is taken away early."""

    async def range_after(self, seq: int, *, rows: int, size: int) -> LedgerRange | None:
        """At most `rows` committed rows after `seq`, of about `size` bytes; None where there are none.

        Raises:
            LedgerUnavailable: the file cannot be read, or rows after `seq` were pruned.
        """
        ...

    async def acknowledged(self, seq: int, hash_: bytes, *, hub_ns: int) -> None:
        """Note durably that the hub has all rows up to `seq`, at this time of its clock.

        A lower number than before is a hub that went back: it counts as well.

        Raises:
            LedgerUnavailable: it could not be written.
            RangeRefused: row `seq` has another hash here, or there is no such row yet: a fork.
        """
        ...

    @property
    def acknowledged_seq(self) -> int:
        """The number that `acknowledged` noted last; 0 before that."""
        ...

    async def grown(self, seq: int) -> None:
        """Return once a row after `seq` is committed; for one waiter at a time."""
        ...

    @property
    def last_seq(self) -> int:
        """The number of the newest committed row; 0 where there is none."""
        ...


class HubLink(Protocol):
    """The way to the hub.  Every call is bounded in time and size."""

    async def call(self, name: str, body: bytes, *, timeout_s: float) -> bytes:
        """POST `/v1/sync/<name>`: the answer's body.

        Raises:
            LinkDown: the hub was not reached, or did not answer in time.
            HubRefused: it answered with an error.
        """
        ...

    def watch(self, body: bytes, *, silence_s: float) -> AsyncIterator[bytes]:
        """POST `/v1/sync/watch`: each line as it comes.

        Raises (from the iterator): as `call`; LinkDown also when nothing came for `silence_s`.
        """
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class Tx(Protocol):
    """One transaction of a `Database`.  SQL is the common part of SQLite and PostgreSQL, parameters are `?`."""

    def run(self, sql: str, params: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run one statement; its rows, if it has any."""
        ...

    def many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Run one statement for each row of parameters."""
        ...


class Database(Protocol):
    """The hub's durable state.  Transactions are serialisable: as if each ran alone."""

    async def write(self, work: Callable[[Tx], T]) -> T:
        """Run `work` in one transaction; returns once that is durable.

        `work` may run again where the server says that another transaction came between, so it changes nothing
        outside.  What it raises rolls back and is raised here.

        Raises:
            StateError: the database cannot be written now; nothing of the transaction is kept.
        """
        ...

    async def read(self, work: Callable[[Tx], T]) -> T:
        """Run `work` on one consistent state, without writing."""
        ...

    async def close(self) -> None:
        """Finish what runs, and close."""
        ...


class SiteIdentity(Protocol):
    """Who this site is to its hub and to other sites.  Its private key signs, and is shown to nobody."""

    @property
    def site(self) -> str:
        """The site's name in the fleet."""

    @property
    def fleet(self) -> str:
        """The fleet that it joined."""

    @property
    def gateway(self) -> str:
        """The id of this gateway, which names its ledger at the hub."""

    @property
    def instance(self) -> str:
        """Random, new at every start of the process."""

    @property
    def boot(self) -> int:
        """How often this data directory was started: counted durably before anything is said to the hub."""
        ...

    @property
    def credential_ns(self) -> tuple[int, int]:
        """When the present credential was issued and when it expires, in the hub's wall-clock nanoseconds."""

    def trust(self) -> Trust:
        """What this site judges others by, now: the hub's keys, and the newest list of who is out."""
        ...

    def authorization(self, audience: str, now_ns: int) -> str:
        """The `authorization` header's value for `audience`; `now_ns` is the hub's time, as far as it is known.

        Costs some 70 µs when it is made; the same value is given again while it is good for half a minute more.
        """
        ...

    def sign(self, payload_type: str, payload: bytes) -> Envelope:
        """The statement, signed with the site's key."""
        ...

    def csr(self) -> bytes:
        """A request (PEM) for the site's TLS certificate; empty where it serves without one of the hub's."""
        ...

    def keep_credential(
        self, credential: Envelope, *, hub_keys: Mapping[str, bytes], certificate: bytes = b""
    ) -> None:
        """Check the hub's word and use it from now on, durably.

        Raises:
            BadSignature: it is not of this fleet's hub as it is trusted now, or for another site or key.
        """
        ...

    def take_epoch(self, epoch: Epoch) -> None:
        """Judge others by this list from now on; it was checked, and is durable already (`SiteMemory.keep_epoch`)."""
        ...


EventClass = Literal["audit", "telemetry"]


class SiteEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An audit event or a sample of telemetry as a site keeps it; the fields are those of `wire.sync.Event`."""

    time_ns: int
    kind: str
    fields: Mapping[str, str | int | float]
    offset_ns: int | None = None
    id: int = 0


class HeldLease(msgspec.Struct, frozen=True, kw_only=True):
    """A site's grant of a fleet's budget in one period: scaled units in total, until a time of the hub's clock.

    `number` counts the site's lease calls for it.
    """

    budget: str
    period: str
    number: int
    granted: int
    until_ns: int


class SiteMemory(Protocol):
    """What a joined site must know after a power cut without its hub.  Writes return once they are durable.

    Reads are from memory, or short.  Every write may raise StateError: nothing of it is kept.
    """

    def desired(self) -> Desired | None:
        """The desired state that was activated last; None before the first."""
        ...

    async def keep_desired(self, desired: Desired) -> None:
        """Keep it whole, instead of the one before."""
        ...

    def epoch(self) -> Envelope | None:
        """The newest list of who is out, signed; None before the first."""
        ...

    async def keep_epoch(self, epoch: Envelope) -> None:
        """Keep it instead of the one before."""
        ...

    @property
    def hub_seen_ns(self) -> int:
        """The latest time that the hub said, its wall clock; 0 before the first."""

    async def saw_hub(self, hub_ns: int) -> None:
        """Note that the hub said this time."""
        ...

    def leases(self) -> tuple[HeldLease, ...]:
        """Every lease that is held."""
        ...

    async def keep_lease(self, lease: HeldLease) -> None:
        """Keep it instead of the one of the same budget and period."""
        ...

    async def drop_leases(self, ended: Iterable[tuple[str, str]]) -> None:
        """Forget the leases of these (budget, period)."""
        ...

    async def note(self, event_class: EventClass, event: SiteEvent) -> int:
        """Keep an event to be sent, under a new id which is given.  Telemetry at its bound is thinned, audit never."""
        ...

    async def events_after(self, event_class: EventClass, after: int, *, rows: int) -> tuple[SiteEvent, ...]:
        """At most `rows` events with an id above `after`, in order."""
        ...

    async def events_acknowledged(self, *, audit: int, telemetry: int) -> None:
        """The hub has the events up to these ids.  Audit stays for some days after it: a lower id is taken too."""
        ...

    def event_marks(self) -> Mapping[EventClass, tuple[int, int]]:
        """Of each class the id that was acknowledged, and the newest id."""
        ...

    @property
    def thinned(self) -> int:
        """How many samples of telemetry were dropped for want of disk since the site joined."""
