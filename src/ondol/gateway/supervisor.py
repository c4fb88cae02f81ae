"""The composition root of a site, and its life: open, serve, reload, drain, close.

Order of an end: stop accepting, drain, stop the engines, flush the ledger, close.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from ondol.adapters.capture import SqliteCapture
from ondol.adapters.clock import SystemClock
from ondol.adapters.keystore import KeyRequest, SqliteKeyStore
from ondol.adapters.ledger import SqliteLedger
from ondol.adapters.lock import lock_directory, must_be_free
from ondol.adapters.observe import Metrics, log_as_json
from ondol.adapters.secrets import first_admin_key, gateway_id, pseudonym, request_ids, secret_file
from ondol.core.catalog import Catalog
from ondol.core.identity import ApiKey
from ondol.core.ports import Clock, Engine
from ondol.engines.pending import PendingEngine
from ondol.errors import ConfigError, OndolError
from ondol.gateway.admin import Admin, NewKey, expires_at
from ondol.gateway.app import App
from ondol.gateway.assembly import Assembly
from ondol.gateway.books import Books, Observer
from ondol.gateway.budget import Budgets
from ondol.gateway.cache import ExactCache
from ondol.gateway.idempotency import IdempotencyStore
from ondol.gateway.member import Gauges, Joined, Member, WithFigures
from ondol.gateway.neighbours import Neighbours
from ondol.gateway.pipeline import Pipeline
from ondol.gateway.quota import Quotas
from ondol.gateway.restore import earliest_ns, spent
from ondol.gateway.upkeep import (
    field_of,
    gauges,
    ignore_late_callbacks,
    in_thread,
    measure_power,
    settle_memory,
    stamp,
)

LOG: Final = logging.getLogger("ondol.site")
HEADER_READ_MS: Final = 10_000
BACKLOG_MIN: Final = 4096
POLL_S: Final = 1.0
HOUSEKEEPING_S: Final = 30.0
NEED_RESTART: Final = (
    "listen", "tls", "data", "limits.connections", "limits.cache_bytes", "limits.idempotency_bytes",
    "limits.ledger_bytes", "limits.semantic_bytes",
)  # fmt: skip
"""Fields of the Gateway document that are read once, when a site starts."""
ENGINE_READY_S, ENGINE_POLL_S = 60.0, 0.02
Load = Callable[[Joined | None], Catalog]


def run_site(*, load: Load, path: Path, data: Path) -> int:
    """Run one site until SIGTERM or Ctrl-C; the exit code (0 stopped, 1 could not start or serve).

    `load` reads and checks the configuration at `path`, with the documents of the fleet where the site has joined
    one; it is called again on SIGHUP, when the file changes, and when the hub says something new.
    """
    log_as_json()
    try:
        with lock_directory(data):
            clock = SystemClock()
            member = Member.open(data, clock)
            catalog = load(None if member is None else member.joined())
            must_be_free(catalog.gateway.listen)
            site = _Site(load=load, path=path, catalog=catalog, data=data, clock=clock, member=member)
            return uvloop.run(site.run())
    except OndolError as error:
        print(f"ondol: {error.message}", file=sys.stderr)
        return 1


class _Site:
    """One running site.  Owns every adapter and every background task."""

    def __init__(
        self, *, load: Load, path: Path, catalog: Catalog, data: Path, clock: Clock, member: Member | None
    ) -> None:
        self._load = load
        self._path = path
        self._catalog = catalog
        self._data = data
        self._clock = clock
        self._member = member
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        self._warm = False

    async def run(self) -> int:
        """Open, serve until told to stop, close."""
        self._open()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._changed.set)
        server = self._server()
        serving = loop.create_task(server.serve())
        try:
            await asyncio.gather(*(self._start_engine(engine) for engine in self._starting))
            self._warm = True
            settle_memory()
            if self._member is not None:
                self._member.start()
            self._spawn(self._poll())
            self._spawn(self._housekeeping())
            self._spawn(self._neighbours.run())
            self._spawn(measure_power(self._assembly.power, self._clock))
            LOG.info(
                "serving",
                extra={"fields": {"site": self._catalog.site.name, "listen": self._catalog.gateway.listen}},
            )
            stopping = loop.create_task(self._stop.wait())
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
        finally:
            code = await self._close(server, serving)
        return code

    def _open(self) -> None:
        catalog, clock, data, member = self._catalog, self._clock, self._data, self._member
        self._gateway_id = gateway_id(data)
        self._ledger = SqliteLedger(
            data / "ledger.db", gateway=self._gateway_id, max_bytes=catalog.gateway.limits.ledger_bytes,
            loop=asyncio.get_running_loop(), site=catalog.site.name,
            pruning=None if member is None else member.pruning(catalog.gateway, self._needed_ns),
        )  # fmt: skip
        self._keys = SqliteKeyStore(data / "keys.db")
        first_admin_key(self._keys, data, clock.wall_ns())
        self._captures = SqliteCapture(data / "capture.db")
        self._metrics = Metrics(self._gauges, log_requests=catalog.gateway.log_requests)
        self._assembly = Assembly(
            folder=self._path.parent,
            store=self._path.parent / catalog.gateway.models,
            clock=clock,
            seed=secrets.randbits(64),
            member=member,
        )
        subject_key = secret_file(data / "subject.key")
        self._books = Books(
            gateway=self._gateway_id, quotas=Quotas(), budgets=self._budgets(catalog),
            cache=ExactCache(catalog.gateway.limits.cache_bytes), ledger=self._ledger, clock=clock,
            observer=self._observer(), pseudonym=lambda tenant, user: pseudonym(subject_key, tenant, user),
            capture=self._capture, clock_offset=(lambda: None) if member is None else member.clock_offset,
        )  # fmt: skip
        self._begin_member()
        view, self._starting, _ = self._assembly.view(catalog)
        self._recall = self._assembly.recall(self._books, catalog)
        self._pipeline = Pipeline(
            view=view, books=self._books, keys=self._keys, pepper=self._keys.pepper, clock=clock,
            new_id=request_ids(), recall=self._recall, fleet=(lambda: None) if member is None else member.trust,
        )  # fmt: skip
        self._neighbours = Neighbours(
            lambda: self._catalog, lambda: "draining" if self._app.draining else self._not_ready(),
            None if member is None else member.tls,
        )  # fmt: skip
        admin = Admin(
            pipeline=self._pipeline, books=self._books, keys=self._keys, issue=self._issue, clock=clock,
            reload=self.reload, captures=self._captures, last_used=self._keys.last_used,
            fleet=(lambda: None) if member is None else member.sync.status, neighbours=self._neighbours,
            recall=self._recall,
        )  # fmt: skip
        self._idempotency: IdempotencyStore[asyncio.Future[None]] = IdempotencyStore(
            catalog.gateway.limits.idempotency_bytes
        )
        self._app = App(
            pipeline=self._pipeline, admin=admin, idempotency=self._idempotency, clock=clock,
            metrics=self._metrics.render, refused=self._metrics.refused, ready=self._not_ready,
            crashed=self._metrics.crashed, files=None if member is None else member.files,
        )  # fmt: skip

    def _begin_member(self) -> None:
        """Make what a joined site runs beside answering."""
        if self._member is None:
            return
        gateway = self._catalog.gateway
        self._member.begin(
            ledger=self._ledger, budgets=self._books.budgets, catalog=lambda: self._catalog,
            view=lambda: self._pipeline.view, gateway=gateway, store=self._path.parent / gateway.models,
            activate=self._activate, arrived=self._rebuild,
        )  # fmt: skip

    def _observer(self) -> Observer:
        return self._metrics if self._member is None else WithFigures(self._metrics, self._member.seen)

    def _needed_ns(self) -> int:
        """The records from this arrival time on are needed to restore budgets."""
        return earliest_ns(self._catalog.budgets, ZoneInfo, self._clock.wall_ns())

    def _budgets(self, catalog: Catalog) -> Budgets:
        used, leases = self._spent(catalog, catalog.budgets)
        return Budgets(catalog.budgets, catalog.exchange, zone=ZoneInfo, spent=used, leases=leases)

    def _spent(
        self, catalog: Catalog, names: Iterable[str]
    ) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
        """What the named budgets have spent and leased by (budget, period), read from the ledger; blocks."""
        docs = {name: catalog.budgets[name] for name in names}
        if not docs:
            return {}, self._ledger.leases()
        since = earliest_ns(docs, ZoneInfo, self._clock.wall_ns())
        return spent(self._ledger.spent(since), docs, catalog.exchange, ZoneInfo), self._ledger.leases()

    def _server(self) -> Server:
        gateway = self._catalog.gateway
        host, _, port = gateway.listen.rpartition(":")
        tls = gateway.tls
        folder = self._path.parent
        return Server(
            self._app, address=host.strip("[]"), port=int(port), interface=Interfaces.RSGI, http=HTTPModes.http1,
            websockets=False, backlog=max(BACKLOG_MIN, gateway.limits.connections),
            backpressure=gateway.limits.connections, log_enabled=False,
            http1_settings=HTTP1Settings(header_read_timeout=HEADER_READ_MS),
            ssl_cert=None if tls is None else folder / tls.cert, ssl_key=None if tls is None else folder / tls.key,
        )  # fmt: skip

    async def _start_engine(self, engine: Engine) -> None:
        """Start an engine and wait until it can answer, within bounds: a dead one must not stop a site."""
        await engine.start()
        deadline = time.monotonic() + ENGINE_READY_S
        # One that waits for its model may wait for hours.
        waits = isinstance(engine, PendingEngine)
        while not waits and engine.problem() is not None and time.monotonic() < deadline:
            try:
                async with asyncio.timeout(ENGINE_POLL_S):
                    await self._stop.wait()
                return
            except TimeoutError:
                continue

    def _not_ready(self) -> str | None:
        """None when every engine has started once, and every route has an endpoint that can answer."""
        if not self._warm:
            return "engines are starting"
        for name, endpoints in self._pipeline.view.routes.items():
            problems = [one.engine.problem() for one in endpoints]
            if None not in problems:
                return f"route {name} has no endpoint that can answer: {problems[0]}"
        return self._ledger.problem()

    # ---- reload

    async def reload(self) -> str:
        """Read the configuration again; a bad one keeps the old and says why."""
        return await self._activate(None if self._member is None else self._member.joined())

    async def _activate(self, joined: Joined | None) -> str:
        """Run what the file, or the file and the fleet's documents, say now; a mistake keeps the old."""
        try:
            catalog = await asyncio.to_thread(self._load, joined)
        except ConfigError as error:
            LOG.error("reload_refused", extra={"fields": {"why": error.message}})
            raise
        if catalog.digest == self._catalog.digest:
            return "unchanged"
        async with self._changing:
            return await self._switch(catalog)

    async def _rebuild(self) -> None:
        """A model came: deployments that waited for it get their engines."""
        async with self._changing:
            await self._switch(self._catalog)

    async def _switch(self, catalog: Catalog) -> str:
        old = self._catalog
        view, started, gone = self._assembly.view(catalog, self._pipeline.view)
        await asyncio.gather(*(self._start_engine(engine) for engine in started))
        used, leases = await asyncio.to_thread(
            self._spent, catalog, self._books.budgets.brought(catalog.budgets)
        )
        self._books.budgets.reload(catalog.budgets, catalog.exchange, spent=used, leases=leases)
        self._pipeline.view = view
        self._catalog = catalog
        if self._member is not None:
            self._member.models.want(catalog)
        self._books.cache.purge(catalog.digest)
        self._recall.keep_house(catalog.digest)
        self._metrics.log_requests = catalog.gateway.log_requests
        self._app.configure()
        for engine in gone:
            self._spawn(self._retire(engine))
        fixed = [name for name in NEED_RESTART if field_of(old, name) != field_of(catalog, name)]
        if fixed:
            LOG.warning("restart_needed", extra={"fields": {"changed": fixed}})
        LOG.info("reloaded", extra={"fields": {"catalog": catalog.digest[:12]}})
        return "reloaded"

    async def _retire(self, engine: Engine) -> None:
        """Close an engine that no route uses any more, once its requests had time to end."""
        await asyncio.sleep(self._catalog.gateway.drain_s)
        await engine.close()

    # ---- background

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _poll(self) -> None:
        """See changes of the file and of the keys, every second; SIGHUP at once."""
        seen = stamp(self._path)
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._keys.refresh()
            now = stamp(self._path)
            if self._changed.is_set() or now != seen:
                self._changed.clear()
                seen = now
                try:
                    await self.reload()
                except OndolError as error:
                    LOG.error("kept_old_configuration", extra={"fields": {"why": error.message}})

    async def _housekeeping(self) -> None:
        """Let what is too old go, so that content does not outlive its time."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            now_ns = self._clock.now_ns()
            self._books.cache.expire(now_ns)
            self._recall.keep_house(self._catalog.digest)
            self._idempotency.expire(now_ns)
            await asyncio.to_thread(self._captures.expire, self._clock.wall_ns())
            await asyncio.to_thread(self._keys.write_last_used)

    def _capture(self, request_id: str, prompt: bytes, answer: bytes, expires_ns: int) -> None:
        self._spawn(in_thread(self._captures.put, request_id, prompt, answer, expires_ns))

    def _issue(self, wanted: NewKey, wall_ns: int) -> tuple[ApiKey, str]:
        request = KeyRequest(
            team=wanted.team, tenant=wanted.tenant, kind=wanted.kind, name=wanted.name, routes=wanted.routes,
            expires_ns=expires_at(wanted, wall_ns), requests_per_min=wanted.requests_per_min,
            tokens_per_min=wanted.tokens_per_min,
        )  # fmt: skip
        return self._keys.issue(request, wall_ns)

    def _gauges(self) -> Gauges:
        own = gauges(
            self._app.running, self._books.cache.stats(), self._pipeline.view.endpoints.values(), self._ledger,
            semantic=self._recall.cache.stats(),
        )  # fmt: skip
        return own if self._member is None else own | self._member.gauges()

    # ---- close

    async def _close(self, server: Server, serving: asyncio.Task[None]) -> int:
        """Stop accepting, drain, stop the engines, flush the ledger, close; each step bounded."""
        failed = serving.done() and not self._stop.is_set()
        if failed and (error := serving.exception()) is not None:
            LOG.error("server_failed", extra={"fields": {"why": str(error)}})
        LOG.info("draining", extra={"fields": {"running": self._app.running}})
        self._app.draining = True
        server.interrupt_signal = True
        server.main_loop_interrupt.set()
        await asyncio.wait({serving}, timeout=self._catalog.gateway.drain_s)
        for task in list(self._background):
            task.cancel()
        engines = [one.engine for one in self._pipeline.view.endpoints.values()]
        await asyncio.gather(*(engine.close() for engine in engines), return_exceptions=True)
        await asyncio.wait({serving}, timeout=1.0)
        await self._books.drain()
        await self._recall.close()
        for lease in self._books.budgets.closing_leases():
            await self._ledger.lease(lease.budget, lease.period, lease.total)
        if self._member is not None:
            await self._member.close()
        await self._ledger.close()
        if self._member is not None:
            self._member.release()
        self._keys.write_last_used()
        self._keys.close()
        self._captures.close()
        # A server that still waits for a client ends with the process; its late callbacks are no news.
        asyncio.get_running_loop().set_exception_handler(ignore_late_callbacks)
        LOG.info("stopped")
        return 1 if failed else 0
