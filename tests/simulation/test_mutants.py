"""The simulation can fail: code that is broken on purpose is caught within two hundred seeds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.simulation.node import InlineLedger, SimSite
from tests.simulation.test_simulation import play

from ondol.core import desired, dsse
from ondol.core.trust import Credential
from ondol.gateway import reconcile, sync
from ondol.gateway.shipping import Shipper
from ondol.hub import freeze, leases
from ondol.hub.service import Hub
from ondol.wire import sync as messages

SEEDS = 200


def hub_acknowledges_before_it_stores(patch: pytest.MonkeyPatch) -> None:
    async def usage(self: Hub, credential: Credential, body: bytes) -> messages.RangeReply:
        message = messages.decode(body, messages.Range)
        head = messages.decode(dsse.payload_of(message.head), messages.Head)
        if self.rng.random() < 0.2:
            return messages.RangeReply(mark=head.seq, mark_hash=head.hash)
        return await right(self, credential, body)

    right = Hub._usage
    patch.setattr(Hub, "_usage", usage)


def site_takes_a_lower_generation(patch: pytest.MonkeyPatch) -> None:
    right = desired.assemble

    def assemble(*args: Any, **options: Any) -> Any:
        return right(*args, **{**options, "least": 0})

    for module in (desired, reconcile, sync):
        if hasattr(module, "assemble"):
            patch.setattr(module, "assemble", assemble)


def ledger_is_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(InlineLedger, "_synchronous", "NORMAL")


def hub_grants_without_looking_at_others(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leases, "grant", lambda amount, holders, site, *, want, least: want)


def restored_hub_grants_before_all_sites_spoke(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(freeze, "silent", lambda tx, number, budget, period: [])


def hub_does_not_see_that_it_went_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(freeze, "_news", lambda *args, **options: "")


def site_ignores_that_its_hub_went_back(patch: pytest.MonkeyPatch) -> None:
    right = Shipper.take_mark

    async def take_mark(self: Shipper, mark: int, hash_: bytes) -> None:
        if mark >= self._sent_to:
            await right(self, mark, hash_)

    patch.setattr(Shipper, "take_mark", take_mark)


def quiet_site_does_not_fill_a_restored_hub(patch: pytest.MonkeyPatch) -> None:
    async def more_to_send(self: Shipper, sent_to: int) -> None:
        await self._outbox.grown(sent_to)

    patch.setattr(Shipper, "_more_to_send", more_to_send)


def client_is_answered_before_the_record_is_durable(patch: pytest.MonkeyPatch) -> None:
    right = InlineLedger.submit

    def submit(self: InlineLedger, record: Any) -> asyncio.Future[int]:
        right(self, record)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        done.set_result(0)
        return done

    patch.setattr(InlineLedger, "submit", submit)


def cost_is_rounded_on_its_way(patch: pytest.MonkeyPatch) -> None:
    right = SimSite.ask

    async def ask(self: SimSite, number: int, cost: int, budgets: tuple[str, ...]) -> Any:
        record = await right(self, number, cost, budgets)
        return None if record is None else msgspec.structs.replace(record, cost=record.cost // 2 * 2)

    patch.setattr(SimSite, "ask", ask)


Mutant = Callable[[pytest.MonkeyPatch], None]
IN_CI: tuple[Mutant, ...] = (
    ledger_is_not_synced, hub_grants_without_looking_at_others, restored_hub_grants_before_all_sites_spoke
)  # fmt: skip
FOR_LONG: tuple[Mutant, ...] = (
    hub_acknowledges_before_it_stores, site_takes_a_lower_generation, site_ignores_that_its_hub_went_back,
    quiet_site_does_not_fill_a_restored_hub, client_is_answered_before_the_record_is_durable,
    cost_is_rounded_on_its_way, hub_does_not_see_that_it_went_back,
)  # fmt: skip


def _caught(place: Path) -> int | None:
    """The first seed that fails."""
    for seed in range(SEEDS):
        try:
            play(seed, place)
        except AssertionError:
            return seed
    return None


@pytest.mark.parametrize("mutant", IN_CI, ids=lambda one: one.__name__)
def test_a_mutant_is_caught(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    assert _caught(tmp_path) is not None


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", FOR_LONG, ids=lambda one: one.__name__)
def test_more_mutants_are_caught(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    assert _caught(tmp_path) is not None
