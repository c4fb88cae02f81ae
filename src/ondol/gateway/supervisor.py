"""The composition root of a site, and its life: open, serve, reload, drain, close.

Order of an end: stop accepting, drain, stop the engines, flush the ledger, close.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable
from operator import attrgetter
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
from ondol.adapters.power import RaplMeter
from ondol.adapters.secrets import first_admin_key, gateway_id, pseudonym, request_ids, secret_file
from ondol.core.catalog import Catalog
from ondol.core.energy import MeasuredPower
from ondol.core.identity import ApiKey
from ondol.core.ports import Engine
from ondol.errors import ConfigError, OndolError
from ondol.gateway.admin import Admin, NewKey, expires_at
from ondol.gateway.app import App
from ondol.gateway.assembly import Assembly
from ondol.gateway.books import Books
from ondol.gateway.budget import Budgets
from ondol.gateway.cache import ExactCache
from ondol.gateway.idempotency import IdempotencyStore
from ondol.gateway.pipeline import Pipeline
from ondol.gateway.quota import Quotas
from ondol.gateway.restore import earliest_ns, spent

LOG: Final = logging.getLogger("ondol.site")
HEADER_READ_MS: Final = 10_000
BACKLOG_MIN: Final = 4096
POLL_S: Final = 1.0
HOUSEKEEPING_S: Final = 30.0
POWER_S: Final = 5.0
NEED_RESTART: Final = (
    "listen", "tls", "data", "limits.connections", "limits.cache_bytes", "limits.idempotency_bytes",
    "limits.ledger_bytes",
)  # fmt: skip
"""Fields of the Gateway document that are read once, when a site starts."""
ENGINE_READY_S: Final = 60.0
ENGINE_POLL_S: Final = 0.02
Load = Callable[[], Catalog]


def run_site(*, load: Load, path: Path) -> int:
    """Run one site until SIGTERM or Ctrl-C; the exit code (0 stopped, 1 could not start or serve).

    `load` reads and checks the configuration at `path`; it is called again on SIGHUP and when the file
    changes.
    """
    log_as_json()
    try:
        catalog = load()
        data = path.parent / catalog.gateway.data
        with lock_directory(data):
            must_be_free(catalog.gateway.listen)
            return uvloop.run(_Site(load, path, catalog, data).run())
    except OndolError as error:
        print(f"ondol: {error.message}", file=sys.stderr)
        return 1


class _Site:
    """One running site.  Owns every adapter and every background task."""

    def __init__(self, load: Load, path: Path, catalog: Catalog, data: Path) -> None:
        self._load = load
        self._path = path
        self._catalog = catalog
        self._data = data
        self._clock = SystemClock()
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
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
            _settle_memory()
            self._spawn(self._poll())
            self._spawn(self._housekeeping())
            meter = RaplMeter.open()
            if meter is not None:
                self._spawn(self._measure_power(meter))
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
        catalog, clock, data = self._catalog, self._clock, self._data
        self._gateway_id = gateway_id(data)
        self._ledger = SqliteLedger(
            data / "ledger.db", gateway=self._gateway_id, max_bytes=catalog.gateway.limits.ledger_bytes,
            loop=asyncio.get_running_loop(), site=catalog.site.name,
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
        )
        view, self._starting, _ = self._assembly.view(catalog)
        subject_key = secret_file(data / "subject.key")
        self._books = Books(
            gateway=self._gateway_id, quotas=Quotas(), budgets=self._budgets(catalog),
            cache=ExactCache(catalog.gateway.limits.cache_bytes), ledger=self._ledger, clock=clock,
            observer=self._metrics, pseudonym=lambda tenant, user: pseudonym(subject_key, tenant, user),
            capture=self._capture,
        )  # fmt: skip
        self._pipeline = Pipeline(
            view=view, books=self._books, keys=self._keys, pepper=self._keys.pepper, clock=clock,
            new_id=request_ids(),
        )  # fmt: skip
        admin = Admin(
            pipeline=self._pipeline, books=self._books, keys=self._keys, issue=self._issue, clock=clock,
            reload=self.reload, captures=self._captures, last_used=self._keys.last_used,
        )  # fmt: skip
        self._idempotency: IdempotencyStore[asyncio.Future[None]] = IdempotencyStore(
            catalog.gateway.limits.idempotency_bytes
        )
        self._app = App(
            pipeline=self._pipeline, admin=admin, idempotency=self._idempotency, clock=clock,
            metrics=self._metrics.render, refused=self._metrics.refused, ready=self._not_ready,
            crashed=self._metrics.crashed,
        )  # fmt: skip

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
        while engine.problem() is not None and time.monotonic() < deadline:
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
        try:
            catalog = await asyncio.to_thread(self._load)
        except ConfigError as error:
            LOG.error("reload_refused", extra={"fields": {"why": error.message}})
            raise
        old = self._catalog
        if catalog.digest == old.digest:
            return "unchanged"
        view, started, gone = self._assembly.view(catalog, self._pipeline.view)
        await asyncio.gather(*(self._start_engine(engine) for engine in started))
        used, leases = await asyncio.to_thread(
            self._spent, catalog, self._books.budgets.brought(catalog.budgets)
        )
        self._books.budgets.reload(catalog.budgets, catalog.exchange, spent=used, leases=leases)
        self._pipeline.view = view
        self._catalog = catalog
        self._books.cache.purge(catalog.digest)
        self._metrics.log_requests = catalog.gateway.log_requests
        self._app.configure()
        for engine in gone:
            self._spawn(self._retire(engine))
        fixed = [name for name in NEED_RESTART if _field(old, name) != _field(catalog, name)]
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
        seen = _stamp(self._path)
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._keys.refresh()
            now = _stamp(self._path)
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
            self._idempotency.expire(now_ns)
            await asyncio.to_thread(self._captures.expire, self._clock.wall_ns())
            await asyncio.to_thread(self._keys.write_last_used)

    async def _measure_power(self, meter: RaplMeter) -> None:
        """Look at the processors' energy counters, so that energy is measured and not modelled."""
        power, before_ns = self._assembly.power, self._clock.now_ns()
        while True:
            await asyncio.sleep(POWER_S)
            now_ns = self._clock.now_ns()
            try:
                package_uj = meter.delta_uj()
            except (OSError, ValueError) as error:
                LOG.warning("power_meter_lost", extra={"fields": {"why": str(error)}})
                power.measured = MeasuredPower()
                return
            power.look(package_uj=package_uj, window_ns=now_ns - before_ns, cpus=os.cpu_count() or 1)
            before_ns = now_ns

    def _capture(self, request_id: str, prompt: bytes, answer: bytes, expires_ns: int) -> None:
        self._spawn(_in_thread(self._captures.put, request_id, prompt, answer, expires_ns))

    def _issue(self, wanted: NewKey, wall_ns: int) -> tuple[ApiKey, str]:
        request = KeyRequest(
            team=wanted.team, tenant=wanted.tenant, kind=wanted.kind, name=wanted.name, routes=wanted.routes,
            expires_ns=expires_at(wanted, wall_ns), requests_per_min=wanted.requests_per_min,
            tokens_per_min=wanted.tokens_per_min,
        )  # fmt: skip
        return self._keys.issue(request, wall_ns)

    def _gauges(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        stats = self._books.cache.stats()
        endpoints = self._pipeline.view.endpoints.values()
        return {
            "ondol_requests_running": [({}, float(self._app.running))],
            "ondol_cache_bytes": [({}, float(stats.bytes))],
            "ondol_cache_hits": [({}, float(stats.hits))],
            "ondol_cache_misses": [({}, float(stats.misses))],
            "ondol_endpoint_in_flight": [({"deployment": e.name}, float(e.in_flight)) for e in endpoints],
            "ondol_endpoint_up": [
                ({"deployment": e.name}, float(e.engine.problem() is None)) for e in endpoints
            ],
            "ondol_ledger_writable": [({}, float(self._ledger.problem() is None))],
        }

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
        for lease in self._books.budgets.closing_leases():
            await self._ledger.lease(lease.budget, lease.period, lease.total)
        await self._ledger.close()
        self._keys.write_last_used()
        self._keys.close()
        self._captures.close()
        # A server that still waits for a client ends with the process; its late callbacks are no news.
        asyncio.get_running_loop().set_exception_handler(_ignore_late_callbacks)
        LOG.info("stopped")
        return 1 if failed else 0


def _settle_memory() -> None:
    """Keep what was loaded at start out of every later garbage collection, and collect less often.

    Requests leave no cycles behind, so a young collection every 700 objects finds nothing to do.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _ignore_late_callbacks(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Drop what the server's threads say to futures that are already cancelled; log the rest."""
    if not isinstance(context.get("exception"), asyncio.InvalidStateError):
        loop.default_exception_handler(context)


async def _in_thread(work: Callable[..., Any], *args: Any) -> None:
    await asyncio.to_thread(work, *args)


def _field(catalog: Catalog, name: str) -> object:
    return attrgetter(name)(catalog.gateway)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
