"""What makes a site a member of a fleet: identity, memory, the way to the hub, and what runs on it.

The half of the composition root that knows the fleet's adapters.  A site that has not joined has none of this.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import SystemRandom
from typing import Any, Final, NamedTuple

from ondol import __version__
from ondol.adapters.fleet_models import FleetModels
from ondol.adapters.ledger import SqliteLedger
from ondol.adapters.ledger_pruning import Pruning
from ondol.adapters.link import HttpsLink
from ondol.adapters.secrets import gateway_id
from ondol.adapters.site_identity import DiskIdentity, is_member
from ondol.adapters.site_memory import open_memory
from ondol.adapters.site_models import SiteModels
from ondol.core.catalog import Catalog, GatewayDoc
from ondol.core.desired import Desired, assemble
from ondol.core.ports import Clock, SiteEvent
from ondol.core.trust import HUB
from ondol.core.usage import UsageRecord
from ondol.errors import OndolError
from ondol.gateway.books import Observer, View
from ondol.gateway.budget import Budgets
from ondol.gateway.figures import GenerationFigures
from ondol.gateway.fleet_leases import FleetLeases
from ondol.gateway.identity import FleetTrust
from ondol.gateway.meter import Totals
from ondol.gateway.models import Models
from ondol.gateway.reconcile import Snapshot
from ondol.gateway.sync import SiteSync, SyncStatus
from ondol.units import NS_PER_S
from ondol.wire.sync import DeploymentState

LOG: Final = logging.getLogger("ondol.site")
DAY_NS: Final = 86_400 * NS_PER_S
CLOSE_S: Final = 3.0
LAST_RECORDS_S: Final = 1.5
"""How long a stopping site waits for its last records to reach the hub."""
OFFSET_STEP_NS: Final = NS_PER_S
Gauges = dict[str, list[tuple[dict[str, str], float]]]
"""Values by metric and labels, as `adapters.observe.Metrics` takes them."""
AUDITED: Final = frozenset(
    {
        "generation",
        "generation_refused",
        "epoch_refused",
        "shipping_stopped",
        "hub_went_back",
        "key_made",
        "key_revoked",
    }
)


class Joined(NamedTuple):
    """Who the site is, and the bodies of its desired state, for `load`."""

    site: str
    bodies: Sequence[bytes]


class Member:
    """One site's membership.  `open` at start, `begin` once the site's own parts stand, `close` at the end."""

    def __init__(self, data: Path, clock: Clock) -> None:
        """Read who this site is, and what it shall be.

        Raises:
            StateError: the files are damaged.
            BadSignature: what lies on the disk is not what the hub signed for this site.
        """
        self.identity = DiskIdentity(data, gateway_id(data))
        self.memory = open_memory(data)
        self._clock = clock
        self._desired = self._checked()
        self.figures = GenerationFigures(
            0 if self._desired is None else self._desired.manifest.generation, SystemRandom().random
        )
        self._trust: FleetTrust | None = None
        self._tls = ssl.create_default_context(cadata=self.identity.membership.ca_pem)
        self._tasks: list[asyncio.Task[None]] = []
        self._audits: set[asyncio.Task[None]] = set()

    @classmethod
    def open(cls, data: Path, clock: Clock) -> Member | None:
        """The membership of the site with this data directory; None where it has not joined."""
        return cls(data, clock) if is_member(data) else None

    def _checked(self) -> Desired | None:
        kept = self.memory.desired()
        if kept is None:
            return None
        return assemble(
            kept.envelope,
            self.identity.trust(),
            site=self.identity.site,
            known={},
            sent=kept.bodies.values(),
            least=0,
        )

    def joined(self) -> Joined | None:
        """What the site shall be; None where the hub has not said yet, and its own file holds."""
        return None if self._desired is None else Joined(self.identity.site, self._desired.documents())

    def pruning(self, gateway: GatewayDoc, needed_ns: Callable[[], int]) -> Pruning:
        """What the ledger may let go once the hub has it."""
        return Pruning(
            site=self.identity.site, gateway=self.identity.gateway, keep_ns=gateway.limits.ledger_keep_days * DAY_NS,
            sign=self.identity.sign, needed_ns=needed_ns,
        )  # fmt: skip

    def begin(
        self, *, ledger: SqliteLedger, budgets: Budgets, catalog: Callable[[], Catalog], view: Callable[[], View],
        gateway: GatewayDoc, store: Path, activate: Callable[[Joined], Awaitable[object]],
        arrived: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        """Make what runs; nothing runs yet.

        `activate` makes the site run another desired state or raises; `arrived` is awaited after a model came.
        """
        self._view = view
        self._ledger = ledger
        self._activate = activate
        urls = (gateway.hub.url,) if gateway.hub.url else self.identity.membership.hub_urls
        self.link = HttpsLink(
            urls, ca_pem=self.identity.membership.ca_pem, authorization=lambda: self.authorization(HUB),
            proxy=gateway.hub.proxy,
        )  # fmt: skip
        self.sync = SiteSync(
            link=self.link, outbox=ledger, memory=self.memory, identity=self.identity, clock=self._clock,
            rng=SystemRandom(), activate=self._take, trusted=self._retrust, describe=self._describe, note=self._note,
            software=f"ondol {__version__}",
            busy=lambda: sum(one.in_flight for one in self._view().endpoints.values()),
            lease_ns=lambda: self.leases.answered_ns,
        )  # fmt: skip
        self.leases = FleetLeases(
            link=self.link, memory=self.memory, ledger=ledger, budgets=budgets, clock=self._clock,
            instance=self.identity.instance, hub_now_ns=self.sync.hub_now_ns, link_up=lambda: self.sync.connected,
            noted=lambda event, what: self._note(event, what=what), hub_era=self.sync.hub_era,
        )  # fmt: skip
        self.files = FleetModels(store)
        self.models = Models(
            SiteModels(
                self.files, catalog=catalog, keys=lambda: self.identity.trust().keys, clock=self._clock,
                hub=lambda: self.link.url, authorization=self.authorization, tls=lambda _: self._tls,
            ),
            arrived=lambda _: arrived(), note=lambda what: self._note("models", what=what),
        )  # fmt: skip
        self.models.want(catalog())

    def start(self) -> None:
        """Run: the session with the hub, the leases and the models."""
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(work) for work in (self.sync.run(), self.leases.run(), self.models.run())
        ]

    def trust(self) -> FleetTrust | None:
        """What other sites and the fleet's keys are let in by; the same value until something changes."""
        return self._trust

    def authorization(self, audience: str) -> str:
        """The header with which this site speaks to its hub or to another site."""
        return self.identity.authorization(audience, self.sync.hub_now_ns())

    @property
    def tls(self) -> ssl.SSLContext:
        """Trusts the fleet's CA, for other sites of it."""
        return self._tls

    def seen(self, record: UsageRecord) -> None:
        """A request ended."""
        self.figures.add(record)

    def clock_offset(self) -> int | None:
        """This site's clock less the hub's, None before it was measured."""
        return self.sync.offset.ns

    def gauges(self) -> Gauges:
        """What operators see of the link: whether it is up, how old the state is, what was not sent yet."""
        return _gauges(self.sync.status(), self._ledger.last_seq)

    async def close(self) -> None:
        """Give the last records and unused leases to the hub, if it is there; then end everything, in time."""
        if self.sync.connected:
            try:
                async with asyncio.timeout(LAST_RECORDS_S):
                    await self._all_sent()
            except TimeoutError:
                LOG.info("records_stay", extra={"fields": {"from": self._ledger.acknowledged_seq + 1}})
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks[1:], return_exceptions=True)
        await self.leases.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._audits, return_exceptions=True)
        await self.link.close()

    async def _all_sent(self) -> None:
        while self._ledger.acknowledged_seq < self._ledger.last_seq:  # noqa: ASYNC110  # a mark tells nobody
            await asyncio.sleep(0.02)

    def release(self) -> None:
        """Close the files; the last thing."""
        self.memory.close()

    # ---- inside

    async def _take(self, desired: Desired) -> None:
        await self._activate(Joined(self.identity.site, desired.documents()))
        self._desired = desired
        self.figures.begin(desired.manifest.generation)

    def _retrust(self) -> None:
        """A new value where the hub's word on who is in has changed."""
        desired = self.memory.desired()
        keys = () if desired is None else desired.manifest.keys
        self._trust = FleetTrust(
            site=self.identity.site, trust=self.identity.trust(), keys={key.id: key for key in keys},
            pepper=b"" if desired is None else desired.manifest.pepper, offset_ns=-(self.sync.offset.ns or 0),
        )  # fmt: skip

    def _describe(self) -> Snapshot:
        if (
            self._trust is not None
            and abs(self._trust.offset_ns + (self.sync.offset.ns or 0)) > OFFSET_STEP_NS
        ):
            self._retrust()
        endpoints = self._view().endpoints.values()
        problems = [(one.name, one.engine.problem()) for one in endpoints]
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Snapshot(
            deployments=tuple(
                [DeploymentState(name=name, ready=why is None, why=why or "") for name, why in problems]
            ),
            figures=self.figures.figures(),
            ledger=self._ledger.problem() or "",
            telemetry={
                "records": self._ledger.last_seq,
                "not_sent": self._ledger.last_seq - self._ledger.acknowledged_seq,
                "in_flight": sum(one.in_flight for one in endpoints),
                "memory_max_kib": usage.ru_maxrss,
                "processor_s": round(usage.ru_utime + usage.ru_stime, 1),
            },
        )

    def _note(self, event: str, **fields: Any) -> None:
        LOG.info(event, extra={"fields": fields})
        if event in AUDITED:
            said = {name: str(value) for name, value in fields.items()}
            entry = SiteEvent(
                time_ns=self._clock.wall_ns(), kind=event, fields=said, offset_ns=self.sync.offset.ns
            )
            task = asyncio.get_running_loop().create_task(self._audit(entry))
            self._audits.add(task)
            task.add_done_callback(self._audits.discard)

    async def _audit(self, entry: SiteEvent) -> None:
        try:
            await self.memory.note("audit", entry)
        except OndolError as error:
            LOG.error("audit_not_kept", extra={"fields": {"kind": entry.kind, "why": error.message}})


class WithFigures:
    """Metrics, and beside them what a rollout is judged by."""

    def __init__(self, observer: Observer, seen: Callable[[UsageRecord], None]) -> None:
        """Tell both."""
        self._observer = observer
        self._seen = seen

    def finished(self, record: UsageRecord, shown: Totals) -> None:
        """A request ended and is metered."""
        self._observer.finished(record, shown)
        self._seen(record)

    def noted(self, event: str, **fields: str) -> None:
        """Something that an operator should see, without content."""
        self._observer.noted(event, **fields)


def _gauges(status: SyncStatus, last_seq: int) -> Gauges:
    found: Gauges = {
        "ondol_hub_connected": [({}, float(status.state == "joined"))],
        "ondol_generation": [({}, float(status.generation))],
        "ondol_records_not_sent": [({}, float(last_seq - status.acknowledged))],
    }
    if status.state_age_s is not None:
        found["ondol_desired_state_age_seconds"] = [({}, status.state_age_s)]
    if status.clock_offset_s is not None:
        found["ondol_clock_offset_seconds"] = [({}, status.clock_offset_s)]
    return found
