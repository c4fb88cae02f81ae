"""How an engine serves: reading prompts one after the other, writing answers together, step by step.

A request waits for a slot, then its prompt is read alone:

    reading  = overhead + tokens not held in the prefix cache / prefill_tokens_per_s

and its first token is out.  Then it writes with the others; one step gives every one of b sequences a token:

    step(b)  = step_ms + step_ms_per_sequence x (b - 1)

While a prompt is read, writing goes on at `decode_while_prefill` of its pace: 0 where both share the processor (an
engine of one thread), towards 1 where prompts are read in small pieces or elsewhere.

Writing is kept as one clock of tokens for all, so an event costs O(log b) whatever the batch.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from math import inf
from typing import Annotated, Final

import msgspec

from ondol.simulate.prefixes import BlockCache
from ondol.simulate.trace import BLOCK_TOKENS, Trace

Rate = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_LEAST: Final = 1e-9
"""Tokens and milliseconds below this are rounding of floats."""


class Service(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The figures of one engine, with their source.  `slots` None takes the deployment's `parallel`.

    `kv_blocks` is how many blocks of 512 tokens its prefix cache holds.  `elastic` is a service of as many machines as
    it takes: nobody waits there, and each request is served as if alone.
    """

    prefill_tokens_per_s: Rate
    step_ms: Rate
    step_ms_per_sequence: NotNegative = 0.0
    decode_while_prefill: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    overhead_ms: NotNegative = 0.0
    slots: Annotated[int, msgspec.Meta(ge=1)] | None = None
    kv_blocks: Annotated[int, msgspec.Meta(ge=0)] = 0
    elastic: bool = False
    source: str

    def step(self, sequences: int) -> float:
        """Milliseconds of one step that gives each of so many sequences a token."""
        return self.step_ms + self.step_ms_per_sequence * (sequences - 1)

    def tokens_per_ms(self, slots: int) -> float:
        """The most tokens a millisecond that all sequences together can get."""
        # b / (s + p (b - 1)) rises with b where s > p, else it falls: the end points are enough.
        return max(1 / self.step_ms, slots / self.step(slots))


class Engine:
    """One engine at work; the world owns it and hands it the time (milliseconds, never falling).

    `fresh` is the request whose first token came out in the last step, or -1; `busy` counts the milliseconds in which
    it worked.
    """

    __slots__ = (
        "_active", "_cache", "_clock", "_last", "_no_prefixes", "_outputs", "_per_token", "_pace", "_prefixes",
        "_prompts", "_reading", "_reading_end", "_service", "_slots", "_waiting", "blocks", "busy", "cached", "first",
        "fresh", "in_flight", "version",
    )  # fmt: skip

    def __init__(
        self, service: Service, slots: int, trace: Trace, first: list[float], cached: list[int]
    ) -> None:
        """Serve the requests of a trace; `first` and `cached` are filled in by request."""
        self._service = service
        self._slots = slots
        self._prompts, self._outputs, self._prefixes = trace.prompts, trace.outputs, trace.prefixes
        self._no_prefixes = trace.prefixes is None or service.kv_blocks == 0
        self._per_token = 1000 / service.prefill_tokens_per_s
        self._waiting: deque[int] = deque()
        self._active: list[tuple[float, int]] = []
        self._reading, self._reading_end = -1, inf
        self._clock = self._last = self._pace = 0.0
        self.blocks = BlockCache(service.kv_blocks)
        self.first, self.cached = first, cached
        self.in_flight = 0
        self.version = 0
        self.fresh = -1
        self.busy = 0.0

    def arrive(self, request: int, now: float) -> bool:
        """Take a request; whether the time of the next event changed."""
        self._waiting.append(request)
        if self._reading >= 0 or len(self._active) >= self._slots:
            return False
        self._advance(now)
        self._read_next(now)
        self._set_pace()
        return True

    def next_event(self) -> float:
        """When something happens here next; infinity while idle."""
        writing = inf
        if self._active and self._pace > 0:
            writing = self._last + max(self._active[0][0] - self._clock, 0.0) / self._pace
        return min(self._reading_end, writing)

    def step_to(self, now: float) -> list[int]:
        """Do what is due at `now`; the requests that are done."""
        self._advance(now)
        self.fresh = -1
        done: list[int] = []
        if self._reading_end <= now:
            self._end_reading(now, done)
        active, due = self._active, self._clock + _LEAST
        while active and active[0][0] <= due:
            done.append(heappop(active)[1])
        if self._reading < 0:
            self._read_next(now)
        self._set_pace()
        return done

    def _advance(self, now: float) -> None:
        passed = now - self._last
        self._clock += passed * self._pace
        if self._reading >= 0 or self._active:
            self.busy += passed
        self._last = now

    def _end_reading(self, now: float, done: list[int]) -> None:
        request = self._reading
        self._reading, self._reading_end = -1, inf
        self.first[request] = now
        self.fresh = request
        rest = self._outputs[request] - 1
        if rest <= 0:
            done.append(request)
        else:
            heappush(self._active, (self._clock + rest, request))

    def _read_next(self, now: float) -> None:
        if not self._waiting or len(self._active) >= self._slots:
            return
        request = self._waiting.popleft()
        tokens = self._prompts[request]
        if not self._no_prefixes:
            tokens -= self._held(request, tokens)
        self._reading = request
        self._reading_end = now + self._service.overhead_ms + tokens * self._per_token

    def _held(self, request: int, tokens: int) -> int:
        """Tokens of the prompt that the cache holds; the last token is always read, since it gives the first."""
        assert self._prefixes is not None
        blocks = self._prefixes[request]
        if not blocks:
            return 0
        held = min(self.blocks.touch(blocks) * BLOCK_TOKENS, tokens - 1)
        self.cached[request] = held
        return held

    def _set_pace(self) -> None:
        sequences = len(self._active)
        if sequences == 0:
            self._pace = 0.0
            return
        pace = 1 / self._service.step(sequences)
        self._pace = pace if self._reading < 0 else pace * self._service.decode_while_prefill


class ElasticEngine(Engine):
    """A service that nobody waits for: every request is read and written as if alone, at once."""

    __slots__ = ("_due",)

    def __init__(
        self, service: Service, slots: int, trace: Trace, first: list[float], cached: list[int]
    ) -> None:
        """As `Engine`; `slots` bounds nothing here."""
        super().__init__(service, slots, trace, first, cached)
        self._due: list[tuple[float, int, bool]] = []

    def arrive(self, request: int, now: float) -> bool:
        """Take a request; whether the time of the next event changed."""
        tokens = self._prompts[request]
        if not self._no_prefixes:
            tokens -= self._held(request, tokens)
        first = now + self._service.overhead_ms + tokens * self._per_token
        heappush(self._due, (first, request, False))
        return self._due[0][1] == request

    def next_event(self) -> float:
        """When something happens here next; infinity while idle."""
        return self._due[0][0] if self._due else inf

    def step_to(self, now: float) -> list[int]:
        """Do the next thing that is due; the request that is done, if one is."""
        self.fresh = -1
        _, request, is_end = heappop(self._due)
        if is_end:
            return [request]
        self.first[request], self.fresh = now, request
        rest = self._outputs[request] - 1
        if rest <= 0:
            return [request]
        took = rest * self._service.step_ms
        self.busy += took
        heappush(self._due, (now + took, request, True))
        return []


def engine_of(service: Service, slots: int, trace: Trace, first: list[float], cached: list[int]) -> Engine:
    """The engine of a service, idle."""
    kind = ElasticEngine if service.elastic else Engine
    return kind(service, slots, trace, first, cached)
