"""One request in flight: what it brought, and what each stage found out about it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import msgspec

from ondol.core.catalog import RouteDoc
from ondol.core.identity import Hints, Principal
from ondol.core.inference import DataClass, InferenceRequest, Objective, Task
from ondol.core.money import Money
from ondol.core.usage import Attempt, Decision
from ondol.gateway.budget import Reservation
from ondol.gateway.flex import is_flex
from ondol.gateway.quota import Granted
from ondol.gateway.semantic import Check, Miss, Question, Serve
from ondol.units import NS_PER_S

Headers = list[tuple[str, str]]


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What came in over HTTP, before anybody has looked at it."""

    task: Task
    raw: bytes
    header: Callable[[str], str | None]
    received_ns: int
    wall_ns: int


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """A reply that is complete."""

    headers: Headers
    body: bytes
    status: int = 200


class Chunks(msgspec.Struct, frozen=True, kw_only=True):
    """A reply that comes in pieces.  Whoever takes it must call `close`, also before the first piece."""

    headers: Headers
    pieces: AsyncIterator[bytes]
    close: Callable[[], None]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A question that was looked up by its meaning: what it was compared as, the verdict, and its vector's number."""

    question: Question
    verdict: Serve | Check | Miss
    number: int


class Call:
    """The mutable context of one request; the pipeline is its only owner."""

    __slots__ = (
        "attempts", "budgets", "cache", "cache_key", "closed", "conversation", "data_class", "deadline_ns", "decision",
        "engine_ns", "flex", "granted", "hints", "max_output_tokens", "objective", "paid", "principal", "raw",
        "recall", "recalled", "received_ns", "request", "request_id", "reservation", "route", "tags", "ttft_ns",
        "wall_ns", "worst",
    )  # fmt: skip

    def __init__(
        self, *, ask: Ask, request_id: str, principal: Principal, request: InferenceRequest, route: RouteDoc,
        hints: Hints, data_class: DataClass, deadline_ns: int,
    ) -> None:  # fmt: skip
        """Start with what authenticate and classify gave."""
        self.request_id = request_id
        self.raw = ask.raw
        self.principal = principal
        self.request = request
        self.route = route
        self.hints = hints
        self.data_class = data_class
        self.objective = Objective(hints.objective) if hints.objective is not None else route.objective
        self.max_output_tokens = request.max_output_tokens or route.max_output_tokens
        self.received_ns = ask.received_ns
        self.wall_ns = ask.wall_ns
        self.deadline_ns = deadline_ns
        self.tags = merged_tags(request.tags, hints.tags)
        self.granted: Granted | None = None
        self.budgets: tuple[str, ...] = ()
        self.reservation: Reservation | None = None
        self.flex = is_flex(request.body, self.tags)
        if self.flex and hints.max_latency_ms is None:
            self.deadline_ns += int(route.flex.wait_s * NS_PER_S)
        self.conversation: tuple[bytes, ...] = ()
        self.recall = ""
        self.recalled: Asked | None = None
        self.paid = 0
        self.cache = "off"
        self.cache_key: bytes | None = None
        self.decision: Decision | None = None
        self.attempts: list[Attempt] = []
        self.engine_ns = 0
        self.ttft_ns: int | None = None
        self.closed = False
        self.worst: dict[str, Money | None] = {}


def merged_tags(
    metadata: tuple[tuple[str, str], ...], hints: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, str], ...]:
    """The tags of the body's `metadata` and of the header, which wins; sorted by key."""
    if not hints:
        return metadata if len(metadata) < 2 else tuple(sorted(metadata))
    return tuple(sorted((dict(metadata) | dict(hints)).items()))
