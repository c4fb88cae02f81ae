"""The tour's last part: the edge is cut off its hub, goes on answering, and loses nothing of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.progress import track

from ondol.cli.asking import Answer, Asker
from ondol.cli.installation import CommandFailed
from ondol.cli.output import table

QUESTIONS: Final = 10
SITE: Final = "edge-seoul"
_LIMIT_S: Final = 30.0
_POLL_S: Final = 0.05
_MAX_TOKENS: Final = 8


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """Records, tokens and cost of the edge, as somebody has them."""

    records: int
    tokens: int
    cost: Decimal

    def less(self, other: Sums) -> Sums:
        """What came since."""
        return Sums(
            records=self.records - other.records, tokens=self.tokens - other.tokens, cost=self.cost - other.cost
        )  # fmt: skip


class HubSwitch(msgspec.Struct, frozen=True, kw_only=True):
    """The edge's line to the hub, and what the hub says of usage."""

    cut: Callable[[], Awaitable[None]]
    join: Callable[[], Awaitable[None]]
    usage: Callable[[], Awaitable[dict[str, Any]]]


async def cut_off(screen: Console, asker: Asker, switch: HubSwitch, model: str) -> None:
    """Cut the line, ask ten questions, join again, and compare what was seen with what the hub has.

    Raises:
        CommandFailed: an answer did not come, or the hub does not have exactly what was seen.
    """
    before = await _settled(asker, switch)
    await switch.cut()
    answers = [
        await _one(asker, number, model)
        for number in track(range(1, QUESTIONS + 1), "   ", console=screen, transient=True)
    ]
    seen = _seen(answers)
    away = _of_edge(await switch.usage()).less(before)
    await switch.join()
    began_s = time.monotonic()
    after = (await _settled(asker, switch)).less(before)
    took_s = time.monotonic() - began_s
    made = table([("", False), ("records", True), ("tokens", True), ("cost USD", True)])
    for who, sums in (
        ("answered by the edge, as this client saw it", seen),
        ("at the hub, while the line was cut", away),
        (f"at the hub, {took_s:.1f} s after it was joined again", after),
    ):
        made.add_row(who, str(sums.records), str(sums.tokens), f"{sums.cost:f}")
    screen.print(made)
    if after != seen:
        raise CommandFailed(f"the hub has {after}, and this client saw {seen}; please report this")
    screen.print("Exactly the same: nothing was lost, and nothing was counted twice.", style="green")


async def _one(asker: Asker, number: int, model: str) -> Answer:
    return await asker.ask(
        f"What is {number} plus {number}?",
        model=model,
        headers={"x-ondol-data-class": "confidential", "cache-control": "no-cache"},
        options={"temperature": 0, "max_completion_tokens": _MAX_TOKENS},
        stream=True,
        on_text=lambda _: None,
    )


def _seen(answers: list[Answer]) -> Sums:
    tokens = sum((one.input_tokens or 0) + (one.output_tokens or 0) for one in answers)
    costs = [Decimal(str(one.ondol.get("cost", "0")).partition(" ")[0]) for one in answers]
    return Sums(records=len(answers), tokens=tokens, cost=sum(costs, Decimal(0)))


def _of_edge(usage: dict[str, Any]) -> Sums:
    rows = [one for one in usage["rows"] if one["key"] == SITE and one["currency"] == "USD"]
    records = sum(one["records"] for one in usage["received"] if one["site"] == SITE)
    tokens = sum(one["input_tokens"] + one["output_tokens"] for one in rows)
    return Sums(records=records, tokens=tokens, cost=sum((Decimal(one["cost"]) for one in rows), Decimal(0)))


async def _settled(asker: Asker, switch: HubSwitch) -> Sums:
    """What the hub has of the edge, once that is all that the edge has."""
    limit_s = time.monotonic() + _LIMIT_S
    while time.monotonic() < limit_s:
        fleet = (await asker.get("/v1/ondol/status"))["fleet"]
        sums = _of_edge(await switch.usage())
        if fleet["state"] == "joined" and sums.records == fleet["records"]:
            return sums
        await asyncio.sleep(_POLL_S)
    raise CommandFailed(
        f"the hub did not have all records of the edge within {_LIMIT_S:.0f} s; see both logs"
    )
