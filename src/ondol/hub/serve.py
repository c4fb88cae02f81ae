"""The composition root of a hub, and its life: open, serve, drain, close."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import SystemRandom
from typing import Any, Final, Protocol, get_args

import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from ondol.adapters.clock import SystemClock
from ondol.adapters.database_sqlite import SqliteDatabase
from ondol.adapters.durable import replace_file
from ondol.adapters.fleet_models import FleetModels
from ondol.adapters.hub_ca import HubAuthority
from ondol.adapters.lock import lock_directory, must_be_free
from ondol.adapters.observe import log_as_json
from ondol.adapters.secrets import secret_file
from ondol.adapters.uploads import Uploads
from ondol.core import dsse
from ondol.core.catalog import SiteDoc
from ondol.core.fleet import Fleet
from ondol.core.invites import HubPlace
from ondol.core.ports import Database
from ondol.errors import OndolError, StateError
from ondol.hub import audit, freeze, ingest, leases, replicas
from ondol.hub.admin import HubAdmin
from ondol.hub.app import HubApp
from ondol.hub.enrol import Authority
from ondol.hub.files import HubFiles
from ondol.hub.schema import MIGRATIONS
from ondol.hub.service import Hub
from ondol.hub.settings import HubDoc
from ondol.hub.status import State, summary
from ondol.hub.uploads import HubUploads
from ondol.units import NS_PER_S
from ondol.wire.guard import allowed_hosts

LOG: Final = logging.getLogger("ondol.hub")
TICK_S: Final = 1.0
HOUSEKEEPING_S: Final = 600.0
DRAIN_S: Final = 5.0
HEADER_READ_MS: Final = 10_000
BACKLOG_MIN: Final = 4096
LEASES_KEPT_DAYS: Final = 400
CERTIFICATE_S: Final = 6 * 3600.0
"""How often it is looked at whether the hub's certificate is to be issued anew."""
ADMIN_KEY_LEAST: Final = 32
Check = Callable[[Sequence[Mapping[str, Any]], Mapping[str, SiteDoc]], Fleet]


class Store(Database, Protocol):
    """A database that knows how it is."""

    def problem(self) -> str | None:
        """None while commits work, else why the last one did not."""
        ...


def run_hub(doc: HubDoc, *, folder: Path, check: Check, restored: bool = False) -> int:
    """Run one hub until SIGTERM or Ctrl-C; the exit code (0 stopped, 1 could not start or serve).

    Relative paths of the document start at `folder`.  `check` checks the documents of a fleet.  `restored` says that
    the database was put back from an older copy.
    """
    log_as_json()
    try:
        with lock_directory(folder / doc.data):
            must_be_free(doc.listen)
            return uvloop.run(_Running(doc, folder, check, restored).run())
    except OndolError as error:
        print(f"ondol: {error.message}", file=sys.stderr)
        return 1


class _Running:
    """One running hub.  Owns every adapter and every background task."""

    def __init__(self, doc: HubDoc, folder: Path, check: Check, restored: bool) -> None:
        self._doc = doc
        self._restored = restored
        self._data = folder / doc.data
        self._models = folder / doc.models
        self._check = check
        self._clock = SystemClock()
        self._stop = asyncio.Event()
        self._look_at_certificate = asyncio.Event()
        self._metrics = _Metrics()

    async def run(self) -> int:
        """Open, serve until told to stop, close."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._look_at_certificate.set)
        database = await self._database()
        try:
            return await self._serve(database)
        finally:
            await database.close()
            LOG.info("stopped")

    async def _serve(self, database: Store) -> int:
        doc = self._doc
        ca, authority = HubAuthority.open(self._data, doc.name, doc.names), self._authority()
        hub = Hub(
            database=database, authority=authority, place=self._place(ca), clock=self._clock,
            rng=SystemRandom(), certify=ca.certify, note=self._note,
        )  # fmt: skip
        identity = _identity(authority, ca)
        await database.write(lambda tx: replicas.claim(tx, identity))
        await hub.start(restored=self._restored)
        models = FleetModels(self._models)
        uploads = HubUploads(Uploads(models), hub, asyncio.to_thread)
        admin = HubAdmin(hub, self._checked)

        async def metrics() -> bytes:
            return self._metrics.render(hub, summary(await admin.sites_now()))

        app = HubApp(
            hub=hub, admin=admin, admin_key=_admin_key(self._data), ca_pem=ca.ca_pem,
            hosts=allowed_hosts(doc.listen, doc.names), files=HubFiles(models, asyncio.to_thread, uploads),
            metrics=metrics, crashed=self._metrics.crashed, ready=database.problem,
        )  # fmt: skip
        ticking = asyncio.ensure_future(self._tick(hub))
        try:
            while True:
                failed = await self._listen(_server(app, doc, ca), hub, app)
                if failed or self._stop.is_set():
                    return 1 if failed else 0
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)

    async def _listen(self, server: Server, hub: Hub, app: HubApp) -> bool:
        """Serve until told to stop, or until there is a new certificate; True where the server ended by itself."""
        app.draining = False
        serving = asyncio.ensure_future(server.serve())
        stopping = asyncio.ensure_future(self._stop.wait())
        renewing = asyncio.ensure_future(self._new_certificate())
        LOG.info("serving", extra={"fields": {"fleet": self._doc.name, "listen": self._doc.listen}})
        done, _ = await asyncio.wait({serving, stopping, renewing}, return_when=asyncio.FIRST_COMPLETED)
        for task in (stopping, renewing):
            task.cancel()
        await asyncio.gather(stopping, renewing, return_exceptions=True)
        app.draining = True
        hub.wake()  # watches end, and their sites come again
        server.interrupt_signal = True
        server.main_loop_interrupt.set()
        await asyncio.wait({serving}, timeout=DRAIN_S)
        return serving in done and not self._stop.is_set()

    async def _new_certificate(self) -> None:
        """Return when the hub's own certificate was issued anew, in time or on SIGHUP; a server reads it once."""
        path = self._data / "tls.pem"
        used = path.read_bytes()
        while True:
            try:
                async with asyncio.timeout(CERTIFICATE_S):
                    await self._look_at_certificate.wait()
            except TimeoutError:
                pass
            self._look_at_certificate.clear()
            try:
                HubAuthority.open(self._data, self._doc.name, self._doc.names)
                if path.read_bytes() != used:
                    LOG.info("certificate_renewed")
                    return
            except (OSError, OndolError) as error:
                LOG.error("certificate_not_renewed", extra={"fields": {"why": str(error)}})

    async def _checked(self, documents: Sequence[Mapping[str, Any]], invited: Mapping[str, SiteDoc]) -> Fleet:
        return await asyncio.to_thread(self._check, documents, invited)

    async def _database(self) -> Store:
        if self._doc.database:
            from ondol.adapters.database_postgres import PostgresDatabase  # an extra: not everybody has it

            return await PostgresDatabase.open(self._doc.database, migrations=MIGRATIONS)
        return SqliteDatabase(self._data / "hub.db", migrations=MIGRATIONS)

    def _authority(self) -> Authority:
        private = secret_file(self._data / "hub.key")
        public = dsse.public_key(private)
        return Authority(
            fleet=self._doc.name, private=private, keys={dsse.key_id(public): public},
            pepper=secret_file(self._data / "pepper.key"), credential_s=self._doc.credential_hours * 3600,
            stale_s=self._doc.stale_days * 86_400,
        )  # fmt: skip

    def _place(self, ca: HubAuthority) -> HubPlace:
        port = self._doc.listen.rpartition(":")[2]
        urls = self._doc.urls or tuple([f"https://{_host(name)}:{port}" for name in self._doc.names[:1]])
        return HubPlace(urls=urls, ca=ca.fingerprint)

    async def _tick(self, hub: Hub) -> None:
        """What the hub does by itself; a database that is away is said once, and tried again."""
        said, cleaned_ns = "", 0
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await hub.tick()
                if self._clock.now_ns() - cleaned_ns > HOUSEKEEPING_S * NS_PER_S:
                    cleaned_ns = self._clock.now_ns()
                    await self._clean(hub)
                said = ""
            except OndolError as error:
                if error.message != said:
                    LOG.error("tick_failed", extra={"fields": {"why": error.message}})
                said = error.message
            except Exception as error:  # a task's top: logged, counted, and tried again
                self._metrics.crashed(error)

    async def _clean(self, hub: Hub) -> None:
        now_ns, day_ns = self._clock.wall_ns(), 86_400 * NS_PER_S
        before = now_ns - self._doc.telemetry_days * day_ns
        await hub.database.write(lambda tx: ingest.prune_telemetry(tx, before_ns=before))
        long_ago = now_ns - LEASES_KEPT_DAYS * day_ns
        await hub.database.write(lambda tx: leases.forget(tx, heard_before_ns=long_ago))
        await hub.database.write(lambda tx: freeze.forget(tx, now_ns=now_ns))
        audit_before = now_ns - self._doc.audit_days * day_ns
        await hub.database.write(lambda tx: audit.prune(tx, before_ns=audit_before))

    def _note(self, event: str, **fields: str) -> None:
        self._metrics.noted(event)
        LOG.info(event, extra={"fields": fields})


class _Metrics:
    """What operators see of a hub; plain counters."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._events = Counter("ondol_hub_events", "What happened.", ["event"], registry=self._registry)
        self._crashes = Counter("ondol_hub_crashes", "Errors that nobody foresaw.", registry=self._registry)
        self._watches = Gauge("ondol_hub_watches", "Open watches.", registry=self._registry)
        self._sites = Gauge("ondol_hub_sites", "Sites by how they are.", ["state"], registry=self._registry)
        self._generation = Gauge("ondol_hub_generation", "The fleet's generation.", registry=self._registry)

    def noted(self, event: str) -> None:
        self._events.labels(event).inc()

    def crashed(self, error: Exception) -> None:
        self._crashes.inc()
        LOG.error("crashed", exc_info=error)

    def render(self, hub: Hub, sites: Mapping[str, int]) -> bytes:
        for state in get_args(State):
            self._sites.labels(state).set(sites.get(state, 0))
        self._watches.set(hub.watches)
        self._generation.set(hub.numbers.generation)
        return generate_latest(self._registry)


def _server(app: HubApp, doc: HubDoc, ca: HubAuthority) -> Server:
    host, _, port = doc.listen.rpartition(":")
    return Server(
        app, address=host.strip("[]"), port=int(port), interface=Interfaces.RSGI, http=HTTPModes.http1,
        websockets=False, backlog=max(BACKLOG_MIN, doc.connections), backpressure=doc.connections, log_enabled=False,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_READ_MS), ssl_cert=ca.cert_path, ssl_key=ca.key_path,
    )  # fmt: skip


def _host(name: str) -> str:
    return f"[{name}]" if ":" in name else name


def _identity(authority: Authority, ca: HubAuthority) -> dict[str, str]:
    """What all replicas of this hub have in common, as fingerprints."""
    pepper = hashlib.sha256(b"ondol pepper" + authority.pepper).hexdigest()
    return {
        "fleet": authority.fleet, "hub.key": ", ".join(authority.keys), "pepper.key": pepper[:16],
        "ca.pem": ca.fingerprint[:16],
    }  # fmt: skip


def _admin_key(data: Path) -> str:
    """The hub's admin key, made at the first start, in a file that only this user can read.

    Raises:
        StateError: the file has none that is long enough.
    """
    path = data / "admin.key"
    if not path.exists():
        replace_file(path, f"ondolhub_{secrets.token_urlsafe(32)}\n".encode())
        LOG.info("admin_key_made", extra={"fields": {"file": str(path)}})
    key = path.read_text().strip()
    if len(key) < ADMIN_KEY_LEAST:
        raise StateError(
            f"{path}: found a key of {len(key)} characters, expected at least {ADMIN_KEY_LEAST}; remove the file, and "
            "the next start makes a new one"
        )
    return key
