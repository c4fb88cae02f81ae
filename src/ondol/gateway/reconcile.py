"""What a site makes of what its hub says: fetch or not, take or refuse, how much to send at once.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from ondol.core.desired import Desired, assemble, read_manifest
from ondol.core.dsse import Envelope
from ondol.core.trust import Epoch, Trust, read_epoch
from ondol.errors import BadSignature, GenerationRefused
from ondol.wire.sync import RANGE_BYTES_MAX, RANGE_ROWS_MAX, Announcement, DeploymentState, Figures

RANGE_AIM_S: Final = 0.15
"""What a range should take: long enough to be worth its round trip, short enough for others between two of them."""
ROWS_FIRST: Final = 256
ROWS_MIN: Final = 16
BUSY_BYTES: Final = 64 * 1024
"""A range at most while requests run: about a quarter of a millisecond of the event loop."""
BUSY_BYTES_PER_S: Final = 5 * 1024 * 1024
"""What goes up at most while requests run: some 13,000 records a second."""
WAIT_S: Final = (3.0, 30.0)
"""Bounds on how long the answer to a range is waited for; ten times what ranges take, within them."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """How the site is at one moment, as whoever runs it says: goes into reports and telemetry.

    `ledger` is the ledger's problem or empty.  `notes` are sentences for the operator of the fleet.  `telemetry`
    holds figures by name: requests and errors since start, latencies in ms, queue length, memory in bytes.
    """

    deployments: tuple[DeploymentState, ...] = ()
    figures: tuple[Figures, ...] = ()
    ledger: str = ""
    notes: tuple[str, ...] = ()
    telemetry: dict[str, int | float] = {}


class Have(msgspec.Struct, frozen=True, kw_only=True):
    """What a site has: the generation that it runs, the newest one that it refused, the epoch that it knows."""

    generation: int
    epoch: int
    refused: int = 0


def shall_fetch(said: Announcement, before: Announcement | None, have: Have) -> bool:
    """Whether what a watch announces is worth a fetch.

    A hub that offers less than the site runs was restored from a backup; it has nothing for us.  What was refused is
    asked for again by the periodic fetch alone, else a bad generation would be fetched with every heartbeat.
    """
    if before is not None and said.changes != before.changes:
        return True
    return said.generation > max(have.generation, have.refused) or said.epoch > have.epoch


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with a manifest that was sent.

    same     it is what runs; nothing
    renewed  the same documents of the same generation, with other keys: keep it
    take     activate it, then keep it
    refuse   keep the old one, and say why; `generation` is 0 where it is not known whose word it is
    """

    what: Literal["same", "renewed", "take", "refuse"]
    generation: int
    desired: Desired | None = None
    why: str = ""


def judge(
    manifest: Envelope, bodies: Iterable[bytes], *, kept: Desired | None, trust: Trust, site: str
) -> Verdict:
    """What to do with a manifest and the bodies beside it, given what the site has."""
    try:
        generation = read_manifest(manifest, trust, site=site).generation
    except BadSignature as error:
        return Verdict(what="refuse", generation=0, why=error.message)
    try:
        found = assemble(
            manifest, trust, site=site, known={} if kept is None else kept.bodies, sent=bodies,
            least=0 if kept is None else kept.manifest.generation,
        )  # fmt: skip
    except (BadSignature, GenerationRefused) as error:
        return Verdict(what="refuse", generation=generation, why=error.message)
    if kept is not None and kept.manifest == found.manifest:
        return Verdict(what="same", generation=generation, desired=kept)
    if kept is not None and (generation, found.manifest.documents) == (
        kept.manifest.generation,
        kept.manifest.documents,
    ):
        return Verdict(what="renewed", generation=generation, desired=found)
    return Verdict(what="take", generation=generation, desired=found)


def newer_epoch(envelope: Envelope, trust: Trust) -> Epoch | None:
    """The list of who is out, if it is newer than the one known; None where it is the same.

    Raises:
        BadSignature: it is not this hub's, or older than the one known: that one stays.
    """
    epoch = read_epoch(envelope, trust)
    known = trust.epoch
    if known is not None and (epoch.number, epoch.issued_ns) <= (known.number, known.issued_ns):
        return None
    return epoch


class RangePace:
    """How many rows a range shall have, and how long to wait for its answer.  Mutable; owned by one shipper."""

    def __init__(self) -> None:
        """Begin small: a line may be thin."""
        self.rows = ROWS_FIRST
        self.wait_s = WAIT_S[0]

    def size(self, busy: bool) -> int:
        """Bytes that a range may have; less while requests run."""
        return BUSY_BYTES if busy else RANGE_BYTES_MAX // 2

    def took(self, seconds: float, *, full: bool) -> None:
        """A range was answered; `full`: it had as many rows as it might."""
        factor = RANGE_AIM_S / max(seconds, 1e-3)
        if factor < 1 or full:
            self.rows = int(self.rows * min(2.0, max(0.5, factor)))
        self.rows = min(RANGE_ROWS_MAX, max(ROWS_MIN, self.rows))
        self.wait_s = min(WAIT_S[1], max(WAIT_S[0], 10 * seconds))

    def failed(self) -> None:
        """A range was not answered in time, or was too large: less of it, and more patience."""
        self.rows = max(ROWS_MIN, self.rows // 4)
        self.wait_s = min(WAIT_S[1], self.wait_s * 2)
