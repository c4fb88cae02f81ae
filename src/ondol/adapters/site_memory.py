"""What a joined site knows without its hub, in `data/fleet.db`: a power cut takes nothing of it.

Holds the desired state with its signature, the list of who is out, the leases, the events that wait to be sent,
and the hub's time.  WAL with `synchronous=FULL`; what is read often is kept in memory as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw
import msgspec

from ondol.adapters.privatedb import open_private
from ondol.core.desired import Desired, Manifest, digest_of
from ondol.core.dsse import Envelope, payload_of
from ondol.core.ports import EventClass, HeldLease, SiteEvent
from ondol.errors import BadSignature, StateError, StateUnavailable
from ondol.units import NS_PER_S

T = TypeVar("T")
_LOG = logging.getLogger("ondol.sync")

FILE: Final = "fleet.db"
TELEMETRY_ROWS: Final = 20_000
"""Samples that wait at most: some 5 MB, two days and a half at one in ten seconds; then every second one goes."""
AUDIT_KEPT: Final = 5_000
"""Audit events that stay after the hub has them, so that one restored from a backup is filled again."""
HUB_TIME_NS: Final = 60 * NS_PER_S
"""How far the hub's time on disk may lag: one write a minute, not one a message."""

_MIGRATIONS: Final = (
    """
    CREATE TABLE value(name TEXT PRIMARY KEY, body BLOB NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE body(digest TEXT PRIMARY KEY, body BLOB NOT NULL) STRICT;
    CREATE TABLE lease(
      budget TEXT NOT NULL, period TEXT NOT NULL, number INTEGER NOT NULL,
      granted TEXT NOT NULL,  -- decimal text: nano-won of a big company pass 63 bits
      until_ns INTEGER NOT NULL,
      PRIMARY KEY(budget, period)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE event(
      class TEXT NOT NULL, id INTEGER NOT NULL, time_ns INTEGER NOT NULL, kind TEXT NOT NULL,
      fields TEXT NOT NULL, offset_ns INTEGER,
      PRIMARY KEY(class, id)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE mark(class TEXT PRIMARY KEY, acknowledged INTEGER NOT NULL, newest INTEGER NOT NULL) STRICT;
    INSERT INTO mark VALUES('audit', 0, 0), ('telemetry', 0, 0);
    """,
)

_THIN: Final = """
DELETE FROM event WHERE class = 'telemetry' AND id IN (
  SELECT id FROM (SELECT id, row_number() OVER (ORDER BY id) AS place FROM event WHERE class = 'telemetry')
  WHERE place % 2 = 0)
"""
_FIELDS: Final = msgspec.json.Decoder(dict[str, str | int | float])


class SqliteSiteMemory:
    """`core.ports.SiteMemory` on one SQLite file.  Opening blocks for some milliseconds.

    Writes run on a thread of its own, in order; `inline` runs them where they are called, for worlds without
    threads.
    """

    def __init__(
        self,
        path: Path,
        *,
        inline: bool = False,
        vfs: str | None = None,
        telemetry_rows: int = TELEMETRY_ROWS,
    ) -> None:
        """Open or make the file, mode 0600, and read what is needed at once.

        Raises:
            StateError: it is damaged.
            StateUnavailable: it cannot be opened or made.
            SchemaTooNew: a newer Ondol wrote it.
        """
        self._path = path
        self._telemetry_rows = telemetry_rows
        try:
            self._db = open_private(
                path, pragmas=("journal_mode=WAL", "synchronous=FULL"), migrations=_MIGRATIONS, vfs=vfs
            )
        except (apsw.NotADBError, apsw.CorruptError) as error:
            raise StateError(
                f"{path}: damaged ({error}). Restore it from a copy, or move it away and join again."
            ) from error
        except (apsw.Error, OSError) as error:
            raise StateUnavailable(
                f"{path}: {error}. Check that the disk has room and that we may write there."
            ) from error
        self._executor = None if inline else ThreadPoolExecutor(1, thread_name_prefix="ondol-fleet")
        self._load()

    def _load(self) -> None:
        values = {str(name): body for name, body in self._db.execute("SELECT name, body FROM value")}
        self._epoch = _envelope(values.get("epoch"))
        self._hub_ns = self._hub_ns_on_disk = int(values.get("hub_ns", b"0"))
        self._thinned = int(values.get("thinned", b"0"))
        self._desired = self._stored(_envelope(values.get("manifest")))
        self._leases = {
            (budget, period): HeldLease(
                budget=budget, period=period, number=number, granted=int(granted), until_ns=until_ns
            )
            for budget, period, number, granted, until_ns in self._db.execute("SELECT * FROM lease")
        }
        self._marks: dict[EventClass, tuple[int, int]] = {
            name: (acknowledged, newest)
            for name, acknowledged, newest in self._db.execute("SELECT * FROM mark")
        }
        self._samples = int(self._db.execute("SELECT count(*) FROM event WHERE class = 'telemetry'").get)

    def _stored(self, envelope: Envelope | None) -> Desired | None:
        """The desired state as it lies there.  Its signature is checked by who uses it, its digests are here."""
        if envelope is None:
            return None
        bodies = {str(digest): bytes(body) for digest, body in self._db.execute("SELECT * FROM body")}
        try:
            manifest = msgspec.json.decode(payload_of(envelope), type=Manifest)
        except (BadSignature, msgspec.MsgspecError) as error:
            _LOG.error(
                "%s: the desired state there is damaged (%s); the hub is asked again", self._path, error
            )
            return None
        for one in manifest.documents:
            if digest_of(bodies.get(one.digest, b"")) != one.digest:
                _LOG.error("%s: %s/%s is damaged; the hub is asked again", self._path, one.kind, one.name)
                return None
        return Desired(envelope=envelope, manifest=manifest, bodies=bodies)

    # ---- desired state, and who is out

    def desired(self) -> Desired | None:
        """The desired state that was activated last; None before the first, or where the file was damaged."""
        return self._desired

    async def keep_desired(self, desired: Desired) -> None:
        """Keep it whole, instead of the one before."""
        wanted = {one.digest: desired.bodies[one.digest] for one in desired.manifest.documents}

        def work() -> None:
            known = self._desired  # None where what lies there is damaged: then all of it is replaced
            have = {str(one) for (one,) in self._db.execute("SELECT digest FROM body")}
            if known is None:
                self._run("DELETE FROM body")
                have = set()
            self._db.executemany(
                "DELETE FROM body WHERE digest = ?", [(one,) for one in have - wanted.keys()]
            )
            self._db.executemany(
                "INSERT INTO body VALUES(?,?)", [(one, wanted[one]) for one in wanted.keys() - have]
            )
            self._put("manifest", msgspec.json.encode(desired.envelope))

        await self._write(
            work, lambda _: setattr(self, "_desired", msgspec.structs.replace(desired, bodies=wanted))
        )

    def epoch(self) -> Envelope | None:
        """The newest list of who is out, signed; None before the first."""
        return self._epoch

    async def keep_epoch(self, epoch: Envelope) -> None:
        """Keep it instead of the one before."""
        await self._write(
            lambda: self._put("epoch", msgspec.json.encode(epoch)), lambda _: setattr(self, "_epoch", epoch)
        )

    # ---- the hub's time

    @property
    def hub_seen_ns(self) -> int:
        """The latest time that the hub said; after a restart up to a minute less."""
        return self._hub_ns

    async def saw_hub(self, hub_ns: int) -> None:
        """Note that the hub said this time; on disk once a minute."""
        self._hub_ns = max(self._hub_ns, hub_ns)
        if self._hub_ns - self._hub_ns_on_disk >= HUB_TIME_NS:
            said = self._hub_ns
            self._hub_ns_on_disk = said
            await self._write(lambda: self._put("hub_ns", str(said).encode()))

    # ---- leases

    def leases(self) -> tuple[HeldLease, ...]:
        """Every lease that is held."""
        return tuple(self._leases.values())

    async def keep_lease(self, lease: HeldLease) -> None:
        """Keep it instead of the one of the same budget and period."""
        row = (lease.budget, lease.period, lease.number, str(lease.granted), lease.until_ns)
        await self._write(
            lambda: self._run("INSERT OR REPLACE INTO lease VALUES(?,?,?,?,?)", row),
            lambda _: self._leases.update({(lease.budget, lease.period): lease}),
        )

    async def drop_leases(self, ended: Iterable[tuple[str, str]]) -> None:
        """Forget the leases of these (budget, period)."""
        gone = list(ended)

        def forget(_: object) -> None:
            self._leases = {name: lease for name, lease in self._leases.items() if name not in gone}

        await self._write(
            lambda: self._db.executemany("DELETE FROM lease WHERE budget = ? AND period = ?", gone), forget
        )

    # ---- events

    async def note(self, event_class: EventClass, event: SiteEvent) -> int:
        """Keep an event to be sent, under a new id which is given.  Telemetry at its bound is thinned, audit never."""

        def work() -> tuple[int, int, int]:
            dropped, samples = 0, self._samples
            if event_class == "telemetry" and samples >= self._telemetry_rows:
                self._run(_THIN)
                dropped = self._db.changes()
                self._put("thinned", str(self._thinned + dropped).encode())
            self._run("UPDATE mark SET newest = newest + 1 WHERE class = ?", (event_class,))
            number = int(self._db.execute("SELECT newest FROM mark WHERE class = ?", (event_class,)).get)
            fields = msgspec.json.encode(event.fields).decode()
            self._run(
                "INSERT INTO event VALUES(?,?,?,?,?,?)",
                (event_class, number, event.time_ns, event.kind, fields, event.offset_ns),
            )
            return number, dropped, samples - dropped + (event_class == "telemetry")

        def then(done: tuple[int, int, int]) -> None:
            number, dropped, self._samples = done
            self._thinned += dropped
            self._marks[event_class] = (self._marks[event_class][0], number)

        return (await self._write(work, then))[0]

    async def events_after(self, event_class: EventClass, after: int, *, rows: int) -> tuple[SiteEvent, ...]:
        """At most `rows` events with an id above `after`, in order."""

        def work() -> tuple[SiteEvent, ...]:
            found = self._db.execute(
                "SELECT id, time_ns, kind, fields, offset_ns FROM event WHERE class = ? AND id > ?"
                " ORDER BY id LIMIT ?",
                (event_class, after, rows),
            )
            return tuple(
                SiteEvent(
                    id=number, time_ns=time_ns, kind=kind, fields=_FIELDS.decode(fields), offset_ns=offset_ns
                )
                for number, time_ns, kind, fields, offset_ns in found
            )

        return await self._in_order(work)

    async def events_acknowledged(self, *, audit: int, telemetry: int) -> None:
        """The hub has the events up to these ids.  Of audit the last AUDIT_KEPT stay: a lower id is taken too."""
        said: dict[EventClass, int] = {"audit": audit, "telemetry": telemetry}
        if all(self._marks[name][0] == seq for name, seq in said.items()):
            return

        def work() -> int:
            for name, seq in said.items():
                self._run("UPDATE mark SET acknowledged = min(?, newest) WHERE class = ?", (seq, name))
            self._run("DELETE FROM event WHERE class = 'telemetry' AND id <= ?", (telemetry,))
            self._run("DELETE FROM event WHERE class = 'audit' AND id <= ?", (audit - AUDIT_KEPT,))
            return int(self._db.execute("SELECT count(*) FROM event WHERE class = 'telemetry'").get)

        def then(samples: int) -> None:
            self._samples = samples
            for name, seq in said.items():
                self._marks[name] = (min(seq, self._marks[name][1]), self._marks[name][1])

        await self._write(work, then)

    def event_marks(self) -> Mapping[EventClass, tuple[int, int]]:
        """Of each class the id that was acknowledged, and the newest id."""
        return dict(self._marks)

    @property
    def thinned(self) -> int:
        """How many samples of telemetry were dropped for want of disk since the site joined."""
        return self._thinned

    # ---- life

    def begin_anew(self, epoch: Envelope, *, hub_ns: int) -> None:
        """The site has joined a fleet, perhaps another than before: nothing of the old one counts.  Blocks."""

        def work() -> None:
            for table in ("value", "body", "lease", "event"):
                self._run(f"DELETE FROM {table}")  # noqa: S608  # names of ours
            self._run("UPDATE mark SET acknowledged = 0, newest = 0")
            self._put("epoch", msgspec.json.encode(epoch))
            self._put("hub_ns", str(hub_ns).encode())

        self._transaction(work)
        self._load()

    def close(self) -> None:
        """Finish what is being written, and close; blocks for a moment."""
        if self._executor is not None:
            self._executor.shutdown()
        self._db.close()

    def __enter__(self) -> SqliteSiteMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- below

    async def _in_order(self, work: Callable[[], T]) -> T:
        if self._executor is None:
            return self._guarded(work)
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._guarded, work)

    async def _write(self, work: Callable[[], T], then: Callable[[T], None] | None = None) -> T:
        """Run `work` in a transaction; `then` keeps what is in memory in step, whether or not somebody still waits."""

        def whole() -> T:
            result = self._transaction(work)
            if then is not None:
                then(result)
            return result

        return await self._in_order(whole)

    def _transaction(self, work: Callable[[], T]) -> T:
        def whole() -> T:
            self._run("BEGIN IMMEDIATE")
            try:
                result = work()
                self._run("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._run("ROLLBACK")
                raise
            return result

        return self._guarded(whole)

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except apsw.Error as error:
            raise StateUnavailable(
                f"{self._path} cannot be used now ({error}). Check that the disk has room and is writable."
            ) from error

    def _run(self, sql: str, params: tuple[Any, ...] = ()) -> None:
        self._db.execute(sql, params)

    def _put(self, name: str, body: bytes) -> None:
        self._run("INSERT OR REPLACE INTO value VALUES(?,?)", (name, body))


def open_memory(data: Path) -> SqliteSiteMemory:
    """The memory of the site with this data directory.

    Raises: as `SqliteSiteMemory`.
    """
    return SqliteSiteMemory(data / FILE)


def _envelope(raw: bytes | None) -> Envelope | None:
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=Envelope)
    except msgspec.MsgspecError:
        return None
