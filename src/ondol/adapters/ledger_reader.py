"""Reading a ledger file from outside: verify its chain, list its records.

Works while a gateway writes.  Never writes, and never holds a read open for long, which would keep the
writer's WAL from restarting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import apsw
import msgspec

from ondol.adapters.ledger_pruning import check_signature
from ondol.adapters.ledger_schema import anchor, check_row, connect_readonly, rows_after, scan
from ondol.core.usage import UsageRecord
from ondol.errors import LedgerUnavailable


class VerifyResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a walk along the chain found.

    `rows` were good.  `start_seq` is the number after which the chain starts: 0, or a checkpoint's.
    `broken_seq` is the first record that does not hold, and `why` the reason; both None when all hold.
    `last_seq` and `last_hash` are those of the last good record; compare them with a copy kept elsewhere,
    because the chain alone cannot show that records were cut off its end.
    """

    rows: int
    start_seq: int
    last_seq: int
    last_hash: str
    broken_seq: int | None = None
    why: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every record holds."""
        return self.broken_seq is None


def verify(
    path: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    keys: Mapping[str, bytes] | None = None,
) -> VerifyResult:
    """Walk the whole chain in constant memory, about 100,000 records a second.

    `progress` is called every 512 records with how many are done and how many there are.  With `keys` (id to
    public key, those of the site) the checkpoint at which a pruned chain starts must be signed by one of them.

    Raises:
        LedgerUnavailable: there is no such file, or it cannot be read.
        LedgerBroken, SchemaTooNew: it is no ledger, or a newer one.
    """
    connection = connect_readonly(path)
    try:
        start, previous = anchor(connection)
        seq = start
        total = max(0, connection.execute("SELECT coalesce(max(seq), 0) FROM usage").get - start)
        why = None if keys is None or start == 0 else _unsigned(connection, start, previous, keys)
        while why is None:
            try:
                rows = rows_after(connection, seq, 512)
            except (apsw.CorruptError, apsw.NotADBError) as error:
                why = f"the file is damaged after record {seq} ({error})"
                break
            if not rows:
                break
            for row in rows:
                _, why = check_row(row, seq + 1, previous)
                if why is not None:
                    break
                seq, previous = row.seq, row.hash
            if progress is not None:
                progress(seq - start, total)
    except apsw.Error as error:
        raise LedgerUnavailable(f"{path}: cannot be read ({error}).") from error
    finally:
        connection.close()
    return VerifyResult(
        rows=seq - start,
        start_seq=start,
        last_seq=seq,
        last_hash=previous.hex(),
        broken_seq=None if why is None else seq + 1,
        why=why,
    )


def _unsigned(connection: apsw.Connection, seq: int, hash_: bytes, keys: Mapping[str, bytes]) -> str | None:
    signature = connection.execute("SELECT signature FROM checkpoint WHERE seq = ?", (seq,)).get
    gateway = connection.execute("SELECT value FROM meta WHERE key = 'gateway'").get
    return check_signature(signature, keys, gateway=str(gateway), seq=seq, hash_=hash_)


def records(path: Path, since_ns: int | None = None, until_ns: int | None = None) -> Iterator[UsageRecord]:
    """The records with since <= arrival < until, by number; constant memory; None means no bound.

    Raises:
        LedgerUnavailable, LedgerBroken, SchemaTooNew: as `verify`.
        msgspec.DecodeError: a record cannot be decoded; `verify` says which.
    """
    connection = connect_readonly(path)
    try:
        yield from scan(connection, since_ns, until_ns)
    except apsw.Error as error:
        raise LedgerUnavailable(f"{path}: cannot be read ({error}).") from error
    finally:
        connection.close()
