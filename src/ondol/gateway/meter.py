"""From what an attempt used to what it cost, and from attempts to the record of a request.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ondol.core.catalog import DeploymentDoc, Grid, SiteDoc
from ondol.core.energy import EnergyModel, carbon
from ondol.core.inference import InferenceRequest, Receipt, Usage
from ondol.core.money import Money, Price
from ondol.core.usage import Attempt, UsageRecord
from ondol.errors import OndolError
from ondol.gateway.cache import Entry
from ondol.gateway.call import Call


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """By what an endpoint's answers are metered: its price, its energy model and its grid.

    A peer has neither price nor energy here: it pays, so it accounts, and sends a receipt.
    """

    deployment: DeploymentDoc
    site: SiteDoc
    model: str
    price: Price | None
    energy: EnergyModel | None
    grid: Grid | None
    threads: int = 1


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What one attempt took, as observed."""

    outcome: str
    usage: Usage | None = None
    model: str | None = None
    receipt: Receipt | None = None
    pieces: int = 0
    error: str | None = None
    retry_after_s: float | None = None


def estimated_usage(request: InferenceRequest, pieces: int) -> Usage:
    """The usage of an answer whose engine never said it: a guess for the prompt, a token a piece."""
    return Usage(input_tokens=request.prompt_tokens, output_tokens=pieces, estimated=True)


def attempt(
    terms: Terms, request: InferenceRequest, spent: Spent, *, ttft_ns: int | None = None, total_ns: int = 0,
    concurrency: float = 1.0, measured_uw_per_thread: int | None = None,
) -> Attempt:  # fmt: skip
    """The record of one attempt that took `total_ns`, beside `concurrency` others on average.

    `measured_uw_per_thread` is what the machine's own meter found, where it has one.

    What failed before its first byte used nothing that we know of, so it has no usage; what was
    cancelled or broke later is charged by what was seen of it.
    """
    usage = spent.usage
    if usage is None:
        worked = spent.outcome in ("ok", "failed", "cancelled") or spent.pieces > 0
        usage = estimated_usage(request, spent.pieces) if worked else Usage()
    receipt = spent.receipt
    peer = terms.deployment.engine == "peer"
    cost = None if peer else price_of(terms.price, usage)
    energy = None
    if not peer and terms.energy is not None and total_ns > 0:
        energy = terms.energy.answer_energy(
            busy_ns=total_ns,
            threads=terms.threads,
            concurrency=concurrency,
            output_tokens=usage.output_tokens,
            input_tokens=usage.input_tokens,
            measured_uw_per_thread=measured_uw_per_thread,
        )
    emitted = (
        carbon(energy[0], terms.grid.grams_per_kwh) if energy is not None and terms.grid is not None else None
    )
    grid = terms.grid
    return Attempt(
        deployment=terms.deployment.name,
        engine=terms.deployment.engine,
        site=receipt.site if receipt is not None else terms.site.name,
        outcome=spent.outcome,
        model=(receipt.model if receipt is not None else spent.model) or terms.model,
        usage=usage,
        price=terms.price.id if terms.price is not None and not peer else None,
        cost=cost.amount if cost is not None else None,
        currency=cost.currency if cost is not None else None,
        energy_uj=energy[0] if energy is not None else None,
        energy_method=energy[1] if energy is not None else None,
        carbon_ng=emitted,
        carbon_source=f"{grid.zone} {grid.year}" if emitted is not None and grid is not None else None,
        ttft_ns=ttft_ns,
        total_ns=total_ns,
        error=spent.error,
        peer_request=receipt.request_id if receipt is not None else None,
        peer_cost=receipt.cost.amount if receipt is not None and receipt.cost is not None else None,
        peer_currency=receipt.cost.currency if receipt is not None and receipt.cost is not None else None,
        peer_energy_uj=receipt.energy_uj if receipt is not None else None,
        peer_carbon_ng=receipt.carbon_ng if receipt is not None else None,
    )


def price_of(price: Price | None, usage: Usage) -> Money | None:
    """What a usage costs at a price; None is unpriced."""
    if price is None:
        return None
    return price.cost(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """The sums over a request's attempts.

    `cost`, `energy_uj` and `carbon_ng` are this site's own.  The `shown_*` are what the answer took
    wherever it was paid, which the caller sees and budgets count; None where it cannot be known.
    """

    usage: Usage
    cost: Money
    unpriced: bool
    energy_uj: int | None
    carbon_ng: int | None
    shown_cost: Money | None
    shown_energy_uj: int | None
    shown_carbon_ng: int | None


def _sum(values: Iterable[int | None]) -> int | None:
    """The sum of what is known; None when nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def totals(attempts: Sequence[Attempt], currency: str) -> Totals:
    """Add up the attempts of one request; every price of a site is in the site's `currency`."""
    if len(attempts) == 1 and attempts[0].peer_request is None:
        return _single(attempts[0], currency)
    cost = shown = 0
    unpriced = hidden = False
    for one in attempts:
        if one.cost is not None:
            cost += one.cost
            shown += one.cost
        elif one.peer_cost is not None and one.peer_currency == currency:
            shown += one.peer_cost
        elif one.peer_cost or one.usage.input_tokens or one.usage.output_tokens:
            hidden = True
            unpriced = unpriced or one.engine != "peer"
    return Totals(
        usage=attempts[-1].usage if attempts else Usage(),
        cost=Money(cost, currency),
        unpriced=unpriced,
        energy_uj=_sum(a.energy_uj for a in attempts),
        carbon_ng=_sum(a.carbon_ng for a in attempts),
        shown_cost=None if hidden else Money(shown, currency),
        shown_energy_uj=_sum(v for a in attempts for v in (a.energy_uj, a.peer_energy_uj)),
        shown_carbon_ng=_sum(v for a in attempts for v in (a.carbon_ng, a.peer_carbon_ng)),
    )


def nothing(usage: Usage, currency: str) -> Totals:
    """The totals of a hit of the cache: its tokens, at no cost and no energy."""
    free = Money(0, currency)
    return Totals(
        usage=usage, cost=free, unpriced=False, energy_uj=0, carbon_ng=0, shown_cost=free, shown_energy_uj=0,
        shown_carbon_ng=0,
    )  # fmt: skip


def _single(one: Attempt, currency: str) -> Totals:
    """The usual case without loops: one attempt at an engine that this site pays."""
    used = one.usage.input_tokens or one.usage.output_tokens
    unpriced = one.cost is None and bool(used)
    cost = Money(one.cost or 0, currency)
    return Totals(
        usage=one.usage,
        cost=cost,
        unpriced=unpriced and one.engine != "peer",
        energy_uj=one.energy_uj,
        carbon_ng=one.carbon_ng,
        shown_cost=None if unpriced else cost,
        shown_energy_uj=one.energy_uj,
        shown_carbon_ng=one.carbon_ng,
    )


def record_of(
    call: Call, sums: Totals, *, outcome: str, status: int, site: str, gateway: str, now_ns: int,
    entry: Entry | None = None, error: OndolError | None = None, last: Attempt | None = None,
    user: str | None = None, clock_offset_ns: int | None = None,
) -> UsageRecord:  # fmt: skip
    """The record of a request.  A hit of the cache has the tokens that it gave, at no cost."""
    request, principal = call.request, call.principal
    if last is None and call.attempts:
        last = call.attempts[-1]
    total_ns = now_ns - call.received_ns
    return UsageRecord(
        request_id=call.request_id,
        time_ns=call.wall_ns,
        site=site,
        gateway=gateway,
        tenant=principal.tenant,
        team=principal.team,
        key_id=principal.key_id,
        route=call.route.name,
        task=request.task.value,
        outcome=outcome,
        status=status,
        data_class=call.data_class.value,
        cache=call.cache,
        model=entry.model if entry is not None else last.model if last is not None else "",
        deployment=entry.deployment if entry is not None else last.deployment if last is not None else "",
        answered_by=site if entry is not None else last.site if last is not None else "",
        usage=sums.usage,
        cost=sums.cost.amount,
        currency=sums.cost.currency,
        unpriced=sums.unpriced,
        energy_uj=sums.energy_uj,
        carbon_ng=sums.carbon_ng,
        ttft_ns=call.ttft_ns,
        total_ns=total_ns,
        overhead_ns=max(0, total_ns - call.engine_ns)
        if call.ttft_ns is None
        else call.ttft_ns - call.engine_ns,
        stream=request.stream,
        error=None if error is None else error.code,
        decision=call.decision,
        attempts=tuple(call.attempts),
        tags=call.tags,
        user=user,
        origin=principal.origin,
        clock_offset_ns=clock_offset_ns,
        unleased=() if call.reservation is None else call.reservation.unleased,
    )
