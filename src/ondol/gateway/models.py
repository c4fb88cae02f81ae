"""Which models this site must have, fetch and may let go, and the loop that sees to it.

A deployment that runs here wants its model by digest; what no deployment wants is evicted when room is needed
(`adapters.fleet_models.make_room`, which is handed what is wanted).
The fetching itself (`adapters.model_transfer`) is behind a Protocol.  One fetch runs at a time: on a thin link two
would make both later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from ondol.core.catalog import Catalog, DeploymentDoc
from ondol.errors import OndolError, StateError

LOCAL: Final = frozenset({"llamacpp"})
"""Engines that read a model file on this site."""
RETRY_S: Final = 5.0
RETRY_MAX_S: Final = 300.0
CHECK_S: Final = 60.0
"""How often the store is looked at again where nothing said that anything changed."""


class Fetching(Protocol):
    """What brings one model here, whole and verified; where `say` is called with how far it is."""

    async def fetch(
        self, digest: str, *, wanted: Collection[str], say: Callable[[int, int, float, str], None]
    ) -> None:
        """Return once the model is in the store.

        `say` takes the bytes here, in all, a second, and from whom.

        Raises:
            OndolError: not now, with the reason; `retry_after_s` where it knows when.
        """
        ...

    def held(self) -> Sequence[str]:
        """The digests of the models that are in the store, whole."""
        ...

    def used(self, digests: Collection[str]) -> None:
        """Note that these are in use, so that they are evicted last."""
        ...


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """A model that some deployment here needs."""

    digest: str
    name: str
    deployments: tuple[str, ...]


class State(msgspec.Struct, frozen=True, kw_only=True):
    """How one model is on its way.  `total` is 0 until its manifest is here."""

    done: int = 0
    total: int = 0
    bytes_per_s: float = 0.0
    source: str = ""
    problem: str = ""


def wanted(catalog: Catalog) -> dict[str, Want]:
    """The models that the deployments on this site need, by digest, in the catalogue's order.

    A model with a `file` of its own lies where its document says and is no business of the store.
    """
    found: dict[str, Want] = {}
    for doc in catalog.deployments.values():
        if not runs_here(catalog, doc):
            continue
        model = catalog.models[doc.model]
        if model.digest is None or model.file is not None:
            continue
        before = found.get(model.digest)
        names = (doc.name,) if before is None else (*before.deployments, doc.name)
        found[model.digest] = Want(digest=model.digest, name=model.name, deployments=names)
    return found


def runs_here(catalog: Catalog, doc: DeploymentDoc) -> bool:
    """Whether a deployment reads a model file on this site."""
    return doc.engine in LOCAL and doc.site == catalog.site.name


def to_fetch(wants: Mapping[str, Want], held: Collection[str]) -> list[Want]:
    """What is missing, in the order in which it is fetched: what most deployments wait for first."""
    missing = [one for one in wants.values() if one.digest not in held]
    return sorted(missing, key=lambda one: -len(one.deployments))


def sentence(want: Want, state: State | None) -> str:
    """Why a model is not here yet, for people: `helper: 43 % of 93 MB fetched, 3.1 MB/s from hub`."""
    if state is None:
        return f"{want.name}: its model is not here yet; it is about to be fetched"
    begun = ""
    if state.total:
        begun = f"{100 * state.done // state.total} % of {state.total / 1e6:.3g} MB fetched"
    if state.problem:
        return f"{want.name}: {begun + '; ' if begun else ''}{state.problem}"
    if not begun:
        return f"{want.name}: asks {state.source or 'its sources'} for the model"
    speed = f", {_speed(state.bytes_per_s)}" if state.bytes_per_s else ""
    return f"{want.name}: {begun}{speed}{f' from {state.source}' if state.source else ''}"


def _speed(bytes_per_s: float) -> str:
    if bytes_per_s >= 1e6:
        return f"{bytes_per_s / 1e6:.2g} MB/s"
    return f"{bytes_per_s / 1e3:.2g} kB/s"


class Models:
    """Keeps the models of the catalogue that runs here; owned by the supervisor, on its loop.

    `arrived` is awaited with the digest of each model that came, so that deployments that wait for it are started.
    """

    def __init__(
        self, fetching: Fetching, *, arrived: Callable[[str], Awaitable[None]], note: Callable[[str], None]
    ) -> None:
        """`note` takes a sentence for the log, once a problem begins and once it ends."""
        self._fetching = fetching
        self._arrived = arrived
        self._note = note
        self._wants: dict[str, Want] = {}
        self._states: dict[str, State] = {}
        self._failures: dict[str, int] = {}
        self._here: set[str] = set()
        self._changed = asyncio.Event()
        self._look_again = False

    def want(self, catalog: Catalog) -> None:
        """A new catalogue is active, or is about to be: fetch what it needs."""
        self._wants = wanted(catalog)
        self._states = {digest: one for digest, one in self._states.items() if digest in self._wants}
        self._failures = {}
        self._changed.set()

    def say(self, digest: str) -> str:
        """Why a model is not here yet: what `engines.pending` says."""
        want = self._wants.get(digest)
        if want is None:
            return f"no deployment here wants {digest[:23]}…"
        if digest in self._here:
            return f"{want.name}: the model is here, and is about to be loaded"
        return sentence(want, self._states.get(digest))

    def states(self) -> dict[str, str]:
        """The sentence of each model that is not here yet, by its name: for the site's report."""
        return {
            want.name: sentence(want, self._states.get(digest))
            for digest, want in self._wants.items()
            if digest in self._states
        }

    async def run(self) -> None:
        """Fetch what is wanted, one model after the other, until cancelled."""
        while True:
            self._changed.clear()
            pause_s = await self._round()
            try:
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _round(self) -> float:
        """One pass over what is missing; how long to wait before the next."""
        try:
            held = set(await asyncio.to_thread(self._fetching.held))
            await asyncio.to_thread(self._fetching.used, [one for one in self._wants if one in held])
        except (OSError, StateError) as error:
            self._note(f"the model store cannot be read: {error}")
            return CHECK_S
        self._here = held
        for digest in held:
            self._states.pop(digest, None)
        pause_s = CHECK_S
        for want in to_fetch(self._wants, held):
            pause_s = min(pause_s, await self._one(want))
            if self._changed.is_set() or self._look_again:
                self._look_again = False
                return 0.0
        return pause_s

    async def _one(self, want: Want) -> float:
        """Fetch one model; how long to wait before trying again."""

        def say(done: int, total: int, bytes_per_s: float, source: str) -> None:
            self._states[want.digest] = State(done=done, total=total, bytes_per_s=bytes_per_s, source=source)

        before = self._states.get(want.digest, State())
        self._states[want.digest] = msgspec.structs.replace(before, problem="", bytes_per_s=0.0)
        fetch = asyncio.create_task(self._fetching.fetch(want.digest, wanted=tuple(self._wants), say=say))
        try:
            await self._until_done_or_unwanted(fetch, want.digest)
        except OndolError as error:
            return self._failed(want, before, error)
        except OSError as error:
            why = error.strerror or type(error).__name__
            return self._failed(want, before, StateError(f"the model store cannot be written: {why}"))
        finally:
            fetch.cancel()
            await asyncio.wait((fetch,))
        if want.digest not in self._wants:
            return 0.0
        self._here.add(want.digest)
        self._states.pop(want.digest, None)
        self._failures.pop(want.digest, None)
        self._note(f"{want.name}: the model is here")
        await self._arrived(want.digest)
        return CHECK_S

    async def _until_done_or_unwanted(self, fetch: asyncio.Task[None], digest: str) -> None:
        """Wait for the fetch, and leave it where a new catalogue no longer wants the model."""
        while not fetch.done():
            changed = asyncio.create_task(self._changed.wait())
            try:
                await asyncio.wait((fetch, changed), return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
            if self._changed.is_set():
                # Where it is still wanted it goes on, and the rest is looked at afterwards.
                self._changed.clear()
                self._look_again = True
                if digest not in self._wants:
                    fetch.cancel()
                    await asyncio.wait((fetch,))
                    return
        fetch.result()

    def _failed(self, want: Want, before: State, error: OndolError) -> float:
        now = self._states.get(want.digest, before)
        self._states[want.digest] = msgspec.structs.replace(now, problem=error.message, bytes_per_s=0.0)
        if before.problem != error.message:
            self._note(f"{want.name}: {error.message}")
        count = self._failures[want.digest] = self._failures.get(want.digest, 0) + 1
        if error.retry_after_s is not None:
            return min(max(error.retry_after_s, 1.0), RETRY_MAX_S)
        return min(RETRY_S * (1 << min(count - 1, 10)), RETRY_MAX_S)
