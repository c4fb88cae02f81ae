"""Fetches a model: from whom it can be had, from the byte where it stopped, no byte that is here already.

The state is on disk (`staging`): the bytes that came, and which chunks are good.  A link that is cut costs the bytes
that were on the wire; a process that is killed costs at most the chunk that it was in.  Nothing is a model before the
hub's signature, every chunk, the whole digest and the header hold.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import tzinfo
from typing import Final

import msgspec

from ondol.adapters.fleet_models import FleetModels, Held
from ondol.adapters.model_sources import FetchFailed
from ondol.adapters.staging import Staged
from ondol.adapters.transfer_sources import NotThere, Source
from ondol.core import chunks
from ondol.core.chunks import Artifact, Span
from ondol.core.dsse import Envelope
from ondol.core.pace import Bucket, opens_in_s
from ondol.core.ports import Clock
from ondol.errors import BadSignature, DigestMismatch
from ondol.units import NS_PER_S

TRIES: Final = 4
"""Attempts of one source that bring not one byte, before the next one is asked."""
BAD_CHUNKS_MAX: Final = 3
PAUSE_S: Final = 0.2
PAUSE_MAX_S: Final = 5.0
_REPAIRS: Final = 3


class OutsideHours(FetchFailed):
    """It is not the hour for transfers; what came is kept."""

    code = "outside_hours"


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a fetch is: bytes here and in all, the speed of the last seconds, and from whom it comes."""

    done: int
    total: int
    bytes_per_s: float
    source: str


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """What a fetch did.  `received` are bytes of bodies that came over the wire, `reused` those found on this disk."""

    held: Held
    received: int
    reused: int
    requests: int
    evicted: tuple[str, ...] = ()


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Under which terms this site fetches: a cap in bytes a second, hours as `22:00-06:00`, in its time zone."""

    bytes_per_s: int | None = None
    hours: str | None = None
    zone: tzinfo


class ModelTransfer:
    """Fetches models into one store, one at a time for each digest.  Lives on one event loop."""

    def __init__(
        self,
        models: FleetModels,
        *,
        keys: Callable[[], Mapping[str, bytes]],
        clock: Clock,
        terms: Callable[[], Terms],
    ) -> None:
        """`keys` are the hub's public keys of now; `terms` are asked before every piece, so they may change."""
        self._models = models
        self._keys = keys
        self._clock = clock
        self._terms = terms

    async def fetch(
        self,
        digest: str,
        sources: Sequence[Source],
        *,
        wanted: Collection[str] = (),
        progress: Callable[[Progress], None] | None = None,
    ) -> Fetched:
        """The model, whole and verified, from the first of `sources` that has it, going on with the next.

        `wanted` are the digests that must not be evicted for it.

        Raises:
            OutsideHours: not now; the message says when.
            FetchFailed: no source gave it; what came is kept, and the next call goes on from there.
            BadSignature: what every source says of it is not signed by this fleet's hub.
            BadModelFile: it is signed, and still no model that native code may see.
            StateError: no room, or the disk fails.
        """
        self._check_hours()
        envelope, artifact = await self._manifest(digest, sources)
        evicted: list[str] = []
        staged = await asyncio.to_thread(self._models.stage, artifact, envelope)
        run = _Run(staged, self._clock, progress)
        try:
            reused = staged.done
            evicted = await asyncio.to_thread(
                self._models.make_room, artifact.size - reused, keep={*wanted, digest}
            )
            for repair in range(_REPAIRS):
                await self._fill(run, sources)
                try:
                    held = await asyncio.to_thread(self._models.add_verified, staged, envelope)
                except DigestMismatch:
                    if repair == _REPAIRS - 1 or not staged.missing:
                        raise
                else:
                    return Fetched(
                        held=held, received=run.received, reused=reused, requests=run.requests,
                        evicted=tuple(evicted),
                    )  # fmt: skip
            raise AssertionError("the last repair returns or raises")
        finally:
            staged.close()

    async def _manifest(self, digest: str, sources: Sequence[Source]) -> tuple[Envelope, Artifact]:
        """The manifest, from whoever has one that the hub signed."""
        problems: list[str] = []
        forged: BadSignature | None = None
        for source in sources:
            try:
                envelope = _envelope(await source.manifest(digest), source.name)
                return envelope, chunks.read(envelope, dict(self._keys()), digest=digest)
            except FetchFailed as error:
                problems.append(error.message)
            except BadSignature as error:
                forged = BadSignature(f"{source.name}: {error.message}")
                problems.append(forged.message)
        if forged is not None and len(problems) == 1:
            raise forged
        raise FetchFailed(
            f"no source has {digest[:23]}…: {'; '.join(problems)[:600] or 'none is known'}. Publish it with "
            "`ondol models publish`, or import it from a file."
        )

    async def _fill(self, run: _Run, sources: Sequence[Source]) -> None:
        """Get what is missing."""
        problems: dict[str, str] = {}
        for source in sources:
            if not run.staged.missing:
                return
            problem = await self._from(run, source)
            if problem is not None:
                problems[source.name] = problem
        if run.staged.missing:
            raise FetchFailed(
                f"{run.staged.done} of {run.staged.artifact.size} bytes of {run.staged.artifact.digest[:23]}… are "
                f"here; {'; '.join(problems.values())[:600] or 'no source is known'}"
            )

    async def _from(self, run: _Run, source: Source) -> str | None:
        """Everything that this source has to give; why it gave up, None once nothing is missing."""
        idle = bad = 0
        problem = ""
        while run.staged.missing:
            before = run.received
            try:
                await self._span(run, source, run.next_span())
            except DigestMismatch as error:
                bad, problem = bad + 1, f"{source.name}: {error.message}"
                if bad >= BAD_CHUNKS_MAX:
                    return problem
            except NotThere as error:
                return error.message
            except FetchFailed as error:
                if isinstance(error, OutsideHours):
                    raise
                problem = error.message
                idle = 0 if run.received > before else idle + 1
                if idle >= TRIES:
                    return problem
                await asyncio.sleep(min(PAUSE_MAX_S, PAUSE_S * 2**idle))
        return None

    async def _span(self, run: _Run, source: Source, span: Span) -> None:
        """One request: its bytes go to the disk as they come, under the cap."""
        index = span.first
        offsets = run.offsets
        position = span.offset
        run.requests += 1
        stream = source.data(run.staged.artifact.digest, span.offset, span.length)
        async with contextlib.aclosing(stream):
            async for block in stream:
                run.received += len(block)
                view = memoryview(block)
                while view:
                    part, view = view[: offsets[index + 1] - position], view[offsets[index + 1] - position :]
                    await asyncio.to_thread(run.staged.feed, index, bytes(part))
                    position += len(part)
                    index += position == offsets[index + 1]
                run.tell(source.name)
                await self._pace(run, len(block))
        if position < span.offset + span.length:
            raise FetchFailed(f"{source.name}: it sent {position - span.offset} of {span.length} bytes")

    async def _pace(self, run: _Run, size: int) -> None:
        self._check_hours()
        rate = self._terms().bytes_per_s
        if run.rate != rate:
            run.rate, run.bucket = rate, Bucket(rate)
        wait_ns = run.bucket.take(size, self._clock.now_ns())
        if wait_ns > 0:
            await asyncio.sleep(wait_ns / NS_PER_S)

    def _check_hours(self) -> None:
        terms = self._terms()
        wait_s = opens_in_s(terms.hours, self._clock.wall_ns(), terms.zone)
        if wait_s and terms.hours is not None:
            raise OutsideHours(
                f"models are fetched here from {terms.hours.partition('-')[0]}", retry_after_s=float(wait_s)
            )


class _Run:
    """One fetch under way; mutable, owned by it."""

    def __init__(self, staged: Staged, clock: Clock, progress: Callable[[Progress], None] | None) -> None:
        self.staged = staged
        self.offsets = staged.artifact.offsets()
        self.received = 0
        self.requests = 0
        self.rate: int | None = None
        self.bucket = Bucket(None)
        self._clock = clock
        self._progress = progress
        self._since_ns = clock.now_ns()
        self._before = 0
        self._speed = 0.0

    def next_span(self) -> Span:
        """What to ask for next: from the byte where the last answer stopped."""
        span = chunks.plan(self.staged.artifact, self.staged.have)[0]
        chunk, here = self.staged.resume
        if chunk != span.first:
            return span
        return Span(span.first, span.last, span.offset + here, span.length - here)

    def tell(self, source: str) -> None:
        """Say how far it is, and how fast over the last second or more."""
        now_ns = self._clock.now_ns()
        if now_ns - self._since_ns >= NS_PER_S:
            self._speed = (self.received - self._before) * NS_PER_S / (now_ns - self._since_ns)
            self._since_ns, self._before = now_ns, self.received
        if self._progress is not None:
            self._progress(
                Progress(
                    done=self.staged.done,
                    total=self.staged.artifact.size,
                    bytes_per_s=self._speed,
                    source=source,
                )
            )


def _envelope(raw: bytes, source: str) -> Envelope:
    try:
        return msgspec.json.decode(raw, type=Envelope)
    except msgspec.MsgspecError as error:
        raise FetchFailed(f"{source}: what it sent is no signed manifest ({str(error)[:100]})") from error
