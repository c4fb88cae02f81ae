"""What sites send up, taken exactly once: ranges of their ledgers, events, reports.

A range is stored in the same transaction as its gateway's **mark** (number and hash of the last row), so a range
that comes twice, late or to two hubs at once changes nothing more.  The chain of hashes is computed again: what
was changed on its way, or does not continue what is here, is refused.

`usage` keeps each row as the site wrote it; `cells` are sums of the rows by day and place, so that a question
about a year need not read them (`hub/usage.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from ondol.core import dsse
from ondol.core.costs import Sums
from ondol.core.ports import Tx
from ondol.core.usage import GENESIS, UsageRecord, decode_record, link
from ondol.errors import BadSignature, Forbidden, InvalidRequest, RangeRefused, TooLarge
from ondol.hub import cells
from ondol.units import CURRENCY_SCALE, NS_PER_S
from ondol.wire import sync

EVENTS_MAX: Final = 4096
INT_MAX: Final = (1 << 63) - 1
NAME_MAX: Final = 200
CLOCK_OFF_NS: Final = 2 * NS_PER_S
"""A site whose clock is further from the hub's is told so."""

SCHEMA: Final[tuple[str, ...]] = (
    "CREATE TABLE marks(gateway TEXT NOT NULL PRIMARY KEY, site TEXT NOT NULL, seq BIGINT NOT NULL,"
    " hash BLOB NOT NULL, taken_ns BIGINT NOT NULL)",
    "CREATE INDEX marks_site ON marks(site)",
    "CREATE TABLE usage(gateway TEXT NOT NULL, seq BIGINT NOT NULL, time_ns BIGINT NOT NULL,"
    " hash BLOB NOT NULL, payload BLOB NOT NULL, PRIMARY KEY(gateway, seq))",
    *cells.SCHEMA,
    "CREATE TABLE events(site TEXT NOT NULL, class TEXT NOT NULL, id BIGINT NOT NULL, time_ns BIGINT NOT NULL,"
    " offset_ns BIGINT, kind TEXT NOT NULL, fields TEXT NOT NULL, taken_ns BIGINT NOT NULL,"
    " PRIMARY KEY(site, class, id))",
    "CREATE INDEX events_taken ON events(class, taken_ns)",
    "CREATE TABLE event_marks(site TEXT NOT NULL, class TEXT NOT NULL, id BIGINT NOT NULL,"
    " asked BIGINT NOT NULL, missing BIGINT NOT NULL, thinned BIGINT NOT NULL, PRIMARY KEY(site, class))",
    "CREATE TABLE reports(site TEXT NOT NULL PRIMARY KEY, taken_ns BIGINT NOT NULL, body BLOB NOT NULL)",
)


class Mark(NamedTuple):
    """How far the hub has a gateway's ledger, and whose it is; `site` is empty before the first row."""

    site: str
    seq: int
    hash: bytes


def mark_of(tx: Tx, gateway: str) -> tuple[int, bytes]:
    """Number and hash of the last row of a gateway that is stored; 0 and GENESIS before the first."""
    mark = _mark(tx, gateway)
    return mark.seq, mark.hash


def take_range(tx: Tx, site: str, message: sync.Range, *, site_key: bytes, now_ns: int) -> sync.RangeReply:
    """Store the rows that are new, with the mark; about 20 µs a row.

    Rows that are here already are skipped.  A range that begins after the next row is answered with the mark,
    and nothing of it is stored.

    Raises:
        InvalidRequest, TooLarge: no rows, or more than a range may have.
        Forbidden: the gateway is another site's.
        RangeRefused: changed on its way, not this site's rows, or a fork of the ledger that is here.
    """
    _check_bounds(message)
    mark = _mark(tx, message.gateway)
    if mark.site not in ("", site):
        raise Forbidden(f"gateway {message.gateway} belongs to site {mark.site}, and {site} sends for it")
    if message.first > mark.seq + 1:
        return sync.RangeReply(mark=mark.seq, mark_hash=mark.hash)
    hashes = _chain(message)
    _check_head(site, message, hashes[-1], site_key)
    _check_continues(tx, message, mark, hashes)
    last = message.first + len(message.rows) - 1
    if last <= mark.seq:
        return sync.RangeReply(mark=mark.seq, mark_hash=mark.hash)
    known = mark.seq + 1 - message.first
    records = _decoded(site, message, known)
    # The mark first: where two replicas take the same range, the second waits here and then runs again.
    tx.run(
        "INSERT INTO marks(gateway, site, seq, hash, taken_ns) VALUES(?,?,?,?,?) ON CONFLICT(gateway)"
        " DO UPDATE SET seq = excluded.seq, hash = excluded.hash, taken_ns = excluded.taken_ns",
        (message.gateway, site, last, hashes[-1], now_ns),
    )
    gateway, first = message.gateway, message.first
    tx.many(
        "INSERT INTO usage(gateway, seq, time_ns, hash, payload) VALUES(?,?,?,?,?)",
        [
            (gateway, first + at, record.time_ns, hashes[at], message.rows[at])
            for at, record in enumerate(records, known)
        ],
    )
    _add_to_cells(tx, records)
    return sync.RangeReply(mark=last, mark_hash=hashes[-1])


def take_events(tx: Tx, site: str, message: sync.Events, *, now_ns: int) -> sync.EventsReply:
    """Store the events above the marks; those at or below are skipped.

    Telemetry may have gaps, because a site thins it.  A gap in audit is answered with the mark, so that the
    site sends what is missing; where the same gap comes again the site has no more, and it is taken and counted.

    Raises:
        InvalidRequest, TooLarge: ids out of order, fields out of range, or too many events.
    """
    if len(message.audit) + len(message.telemetry) > EVENTS_MAX:
        raise TooLarge(
            f"events: found {len(message.audit) + len(message.telemetry)}; allowed: at most {EVENTS_MAX} a call"
        )
    return sync.EventsReply(
        audit=_take_class(tx, site, "audit", message.audit, now_ns=now_ns, thinned=0),
        telemetry=_take_class(
            tx, site, "telemetry", message.telemetry, now_ns=now_ns, thinned=message.thinned
        ),
    )


def take_report(tx: Tx, site: str, message: sync.Report, *, now_ns: int) -> sync.ReportReply:
    """Keep the report instead of the one before; sentences for the site's operator come back."""
    tx.run(
        "INSERT INTO reports(site, taken_ns, body) VALUES(?,?,?) ON CONFLICT(site)"
        " DO UPDATE SET taken_ns = excluded.taken_ns, body = excluded.body",
        (site, now_ns, sync.encode(message)),
    )
    notes = []
    if message.offset_ns is not None and abs(message.offset_ns) > CLOCK_OFF_NS:
        ahead = "ahead of" if message.offset_ns > 0 else "behind"
        notes.append(
            f"the clock of {site} is {abs(message.offset_ns) / NS_PER_S:.1f} s {ahead} the hub's; expected: less "
            f"than {CLOCK_OFF_NS // NS_PER_S} s. Set it by NTP."
        )
    rows = tx.run("SELECT max(seq) FROM marks WHERE site = ?", (site,))
    mark = int(rows[0][0] or 0)
    if message.acknowledged > mark:
        notes.append(
            f"the hub has records of {site} up to {mark}, and had said {message.acknowledged}: it was restored "
            "from an older backup. What is missing is sent again from the site's ledger."
        )
    return sync.ReportReply(hub_ns=now_ns, notes=tuple(notes))


def reports(tx: Tx) -> dict[str, tuple[int, sync.Report]]:
    """The last report of every site, with the hub's time when it came."""
    rows = tx.run("SELECT site, taken_ns, body FROM reports ORDER BY site")
    return {site: (int(taken_ns), sync.decode(bytes(body), sync.Report)) for site, taken_ns, body in rows}


def report_of(tx: Tx, site: str) -> tuple[int, sync.Report] | None:
    """The last report of one site, with the hub's time when it came."""
    rows = tx.run("SELECT taken_ns, body FROM reports WHERE site = ?", (site,))
    return (int(rows[0][0]), sync.decode(bytes(rows[0][1]), sync.Report)) if rows else None


def prune_telemetry(tx: Tx, *, before_ns: int) -> None:
    """Forget telemetry that came before a time of the hub's clock.  Audit and usage are never forgotten."""
    tx.run("DELETE FROM events WHERE class = 'telemetry' AND taken_ns < ?", (before_ns,))


def _mark(tx: Tx, gateway: str) -> Mark:
    rows = tx.run("SELECT site, seq, hash FROM marks WHERE gateway = ?", (gateway,))
    return Mark(rows[0][0], int(rows[0][1]), bytes(rows[0][2])) if rows else Mark("", 0, GENESIS)


def _check_bounds(message: sync.Range) -> None:
    count = len(message.rows)
    if not count or message.first < 1 or message.first + count > INT_MAX:
        raise InvalidRequest(
            f"usage: found {count} rows from number {message.first}; expected some, from 1 on"
        )
    if not 0 < len(message.gateway) <= NAME_MAX or not message.gateway.isprintable():
        raise InvalidRequest(f"usage: expected the gateway's id, 1 to {NAME_MAX} printable characters")
    size = sum(map(len, message.rows))
    # One row may be larger than a range should be: else it could never be sent.
    if count > sync.RANGE_ROWS_MAX or (count > 1 and size > sync.RANGE_BYTES_MAX):
        raise TooLarge(
            f"usage: found {count} rows of {size} bytes; allowed: at most {sync.RANGE_ROWS_MAX} rows and "
            f"{sync.RANGE_BYTES_MAX} bytes a range"
        )


def _chain(message: sync.Range) -> list[bytes]:
    hashes = []
    previous = message.previous
    for seq, row in enumerate(message.rows, message.first):
        previous = link(previous, seq, row)
        hashes.append(previous)
    return hashes


def _check_head(site: str, message: sync.Range, last_hash: bytes, site_key: bytes) -> None:
    """The site's own signature over the last row's hash covers every row of the range, and all before."""
    try:
        payload = dsse.verify(message.head, sync.HEAD_TYPE, {dsse.key_id(site_key): site_key})
        head = sync.decode(payload, sync.Head)
    except (BadSignature, InvalidRequest) as error:
        raise RangeRefused(f"usage of {site}: its signed head does not hold: {error.message}") from error
    last = message.first + len(message.rows) - 1
    if (head.site, head.gateway, head.seq) != (site, message.gateway, last):
        raise RangeRefused(
            f"usage of {site}: the head is of record {head.seq} of {head.gateway[:NAME_MAX]} at "
            f"{head.site[:NAME_MAX]}; expected {last} of {message.gateway} at {site}"
        )
    if head.hash != last_hash:
        raise RangeRefused(
            f"usage of {site}: records {message.first} to {last} of {message.gateway} are not those that the site "
            "signed; they were changed on their way, or in its ledger. Run `ondol ledger verify` at the site."
        )


def _check_continues(tx: Tx, message: sync.Range, mark: Mark, hashes: Sequence[bytes]) -> None:
    """Somewhere the range touches what is here: there, its hash must be ours."""
    last = message.first + len(message.rows) - 1
    if message.first == mark.seq + 1:
        seq, theirs, ours = mark.seq, message.previous, mark.hash
    elif last >= mark.seq:
        seq, theirs, ours = mark.seq, hashes[mark.seq - message.first], mark.hash
    else:
        found = tx.run("SELECT hash FROM usage WHERE gateway = ? AND seq = ?", (message.gateway, last))
        seq, theirs, ours = last, hashes[-1], bytes(found[0][0])
    if theirs != ours:
        raise RangeRefused(
            f"usage: a fork. Record {seq} of gateway {message.gateway} has hash {theirs.hex()[:16]}… there, and "
            f"{ours.hex()[:16]}… is what the hub was given before. Another machine with the same data, or a ledger "
            "that was put back from a copy: keep both files, and give this gateway a new data directory."
        )


def _decoded(site: str, message: sync.Range, known: int) -> list[UsageRecord]:
    """The records of the rows after the first `known`, each checked to be the sender's own."""
    records = []
    seq, gateway = message.first + known, message.gateway
    try:
        for row in message.rows[known:]:
            record = decode_record(row)
            if record.site != site or record.gateway != gateway:
                raise RangeRefused(
                    f"usage: record {seq} is of gateway {record.gateway[:NAME_MAX]!r} at site "
                    f"{record.site[:NAME_MAX]!r}; expected {gateway!r} at {site!r}"
                )
            if record.currency not in CURRENCY_SCALE or not 0 <= record.time_ns <= INT_MAX:
                raise RangeRefused(
                    f"usage: record {seq} has currency {record.currency[:8]!r} and time {record.time_ns}; this hub "
                    f"knows {', '.join(CURRENCY_SCALE)}. A newer site? Upgrade the hub first."
                )
            records.append(record)
            seq += 1
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RangeRefused(f"usage: record {seq} of gateway {gateway} cannot be decoded: {error}") from error
    return records


def _add_to_cells(tx: Tx, records: Sequence[UsageRecord]) -> None:
    fresh: dict[cells.Place, Sums] = {}
    for record in records:
        place = cells.place_of(record)
        sums = fresh.get(place)
        if sums is None:
            sums = fresh[place] = Sums()
        sums.add_request(record)
        sums.add_booked(record)
    cells.add(tx, fresh)


def _take_class(
    tx: Tx, site: str, name: str, events: Sequence[sync.Event], *, now_ns: int, thinned: int
) -> int:
    rows = tx.run(
        "SELECT id, asked, missing, thinned FROM event_marks WHERE site = ? AND class = ?", (site, name)
    )
    mark, asked, missing, before = map(int, rows[0]) if rows else (0, 0, 0, 0)
    _check_events(events)
    fresh = [event for event in events if event.id > mark]
    gap = fresh[0].id if fresh and fresh[0].id > mark + 1 and name == "audit" else 0
    if gap and gap != asked:
        fresh, asked = [], gap
    elif fresh:
        missing += fresh[0].id - mark - 1 if gap else 0
        mark, asked = fresh[-1].id, 0
    elif thinned <= before:
        return mark
    tx.many(
        "INSERT INTO events(site, class, id, time_ns, offset_ns, kind, fields, taken_ns) VALUES(?,?,?,?,?,?,?,?)",
        [
            (site, name, one.id, one.time_ns, one.offset_ns, one.kind, _FIELDS.encode(one.fields).decode(), now_ns)
            for one in fresh
        ],
    )  # fmt: skip
    tx.run(
        "INSERT INTO event_marks(site, class, id, asked, missing, thinned) VALUES(?,?,?,?,?,?)"
        " ON CONFLICT(site, class) DO UPDATE SET id = excluded.id, asked = excluded.asked,"
        " missing = excluded.missing, thinned = excluded.thinned",
        (site, name, mark, asked, missing, max(before, thinned)),
    )
    return mark


_FIELDS: Final = msgspec.json.Encoder()


def _check_events(events: Sequence[sync.Event]) -> None:
    last = 0
    for event in events:
        if not last < event.id <= INT_MAX or not 0 <= event.time_ns <= INT_MAX:
            raise InvalidRequest(
                f"events: id {event.id} after {last}; expected rising ids, and times from 1970"
            )
        if not 0 < len(event.kind) <= NAME_MAX or not event.kind.isprintable():
            raise InvalidRequest(
                f"events: event {event.id} has no printable kind of 1 to {NAME_MAX} characters"
            )
        if event.offset_ns is not None and abs(event.offset_ns) > INT_MAX:
            raise InvalidRequest(f"events: event {event.id} has an offset that is no time")
        last = event.id
