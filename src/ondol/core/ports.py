"""The seams between what decides and what does I/O.  Few methods each; every one says its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Protocol

import msgspec

from ondol.core.identity import ApiKey, Origin, Principal
from ondol.core.inference import Capability, Chunk, Completion, DataClass, InferenceRequest
from ondol.core.usage import UsageRecord


class EngineCall(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at one endpoint.  `deadline_ns` is on the monotonic clock, absolute."""

    request: InferenceRequest
    request_id: str
    attempt: int
    deadline_ns: int
    max_output_tokens: int
    principal: Principal
    data_class: DataClass = DataClass.INTERNAL
    objective: str = ""
    origin: Origin | None = None


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
