"""Taking the oldest rows out of a ledger that the hub has had for long enough, a few at a time.

Each step is one transaction: a checkpoint, signed by the site, that says number and hash of the last row that
goes, and the rows.  So the chain always starts at a row or at a checkpoint, wherever power was cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

import apsw
import msgspec

from ondol.adapters.ledger_schema import SPAN_ROWS
from ondol.core import dsse
from ondol.core.dsse import Envelope
from ondol.errors import BadSignature

CHECKPOINT_TYPE: Final = dsse.TYPE_PREFIX + "ledger-checkpoint.v1"
STEP_ROWS: Final = 128
"""Rows a step: some milliseconds, which a commit may have to wait."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a site signs when it prunes: all rows up to `seq` were there, and `hash` was the last one's."""

    site: str
    gateway: str
    seq: int
    hash: bytes
    time_ns: int


def _all() -> int:
    return 1 << 62


class Pruning(msgspec.Struct, frozen=True, kw_only=True):
    """What a ledger may let go, and who signs for it.

    `keep_ns` is how long the hub must have had a row.  Records that arrived at or after `needed_ns()` stay in any
    case, because budgets are restored from them; it is called on the ledger's thread.
    """

    site: str
    gateway: str
    keep_ns: int
    sign: Callable[[str, bytes], Envelope]
    needed_ns: Callable[[], int] = _all


def take_step(cursor: apsw.Cursor, pruning: Pruning, upto: int) -> int:
    """Take out up to STEP_ROWS rows whose number is at most `upto`; how many.  One transaction.

    Raises:
        apsw.Error: it could not be written, and nothing of it is kept; the transaction may still be open.
    """
    cursor.execute("BEGIN IMMEDIATE")
    first = cursor.execute("SELECT min(seq) FROM usage").get
    if first is None or first > upto:
        cursor.execute("COMMIT")
        return 0
    last = min(upto, first + STEP_ROWS - 1)
    stays = cursor.execute(
        "SELECT min(seq) FROM usage WHERE seq BETWEEN ? AND ? AND time_ns >= ?",
        (first, last, pruning.needed_ns()),
    ).get
    if stays is not None:
        last = stays - 1
    if last < first:
        cursor.execute("COMMIT")
        return 0
    hash_ = cursor.execute("SELECT hash FROM usage WHERE seq = ?", (last,)).get
    now_ns = time.time_ns()
    said = Checkpoint(site=pruning.site, gateway=pruning.gateway, seq=last, hash=hash_, time_ns=now_ns)
    signed = pruning.sign(CHECKPOINT_TYPE, msgspec.json.encode(said))
    cursor.execute(
        "INSERT OR REPLACE INTO checkpoint(seq, hash, time_ns, signature) VALUES(?,?,?,?)",
        (last, hash_, now_ns, msgspec.json.encode(signed)),
    )
    cursor.execute("DELETE FROM usage WHERE seq <= ?", (last,))
    cursor.execute("DELETE FROM checkpoint WHERE seq < ?", (last,))
    cursor.execute("DELETE FROM span WHERE (block + 1) * ? <= ?", (SPAN_ROWS, last))
    cursor.execute("COMMIT")
    return int(last - first + 1)


def check_signature(
    signature: bytes | None, keys: Mapping[str, bytes], *, gateway: str, seq: int, hash_: bytes
) -> str | None:
    """Why a checkpoint is not what one of these keys (id to public key) has signed; None where it is."""
    if signature is None:
        return f"the checkpoint at record {seq} is not signed"
    try:
        envelope = msgspec.json.decode(signature, type=Envelope)
        said = msgspec.json.decode(dsse.verify(envelope, CHECKPOINT_TYPE, keys), type=Checkpoint)
    except (BadSignature, msgspec.MsgspecError) as error:
        return f"the signature of the checkpoint at record {seq} does not hold: {error}"
    if (said.gateway, said.seq, said.hash) != (gateway, seq, hash_):
        return (
            f"the checkpoint says record {seq} of {gateway}, and what was signed is record {said.seq} of "
            f"{said.gateway[:64]} or has another hash"
        )
    return None
