"""What budgets have spent, read back from the ledger's records at start.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import tzinfo

from ondol.core.catalog import BudgetDoc
from ondol.core.exchange import Exchange, converted, rates
from ondol.core.money import Money
from ondol.core.periods import Period, period
from ondol.core.usage import UsageRecord


def earliest_ns(budgets: Mapping[str, BudgetDoc], zone: Callable[[str], tzinfo], wall_ns: int) -> int:
    """When the oldest period that still counts began; now, where there is no budget."""
    starts = [period(wall_ns, one.period, zone(one.timezone)).start_ns for one in budgets.values()]
    return min(starts, default=wall_ns)


def spent(
    records: Iterable[UsageRecord], budgets: Mapping[str, BudgetDoc], exchange: Exchange,
    zone: Callable[[str], tzinfo], *, fleet: bool = False,
) -> dict[tuple[str, str], int]:  # fmt: skip
    """Scaled units of each budget's currency by (budget, period key).

    Counts what the answers cost wherever they were paid, as the budgets did when they settled.  In a `fleet` what
    another site sent is counted there.
    """
    ratios = rates(exchange)
    zones = {name: zone(doc.timezone) for name, doc in budgets.items()}
    spans: dict[str, Period] = {}
    sums: dict[tuple[str, str], int] = {}
    for record in records:
        for name, doc in budgets.items():
            if not _covers(doc, record) or name in record.unleased or (fleet and record.origin is not None):
                continue
            span = spans.get(name)
            if span is None or not span.start_ns <= record.time_ns < span.end_ns:
                span = spans[name] = period(record.time_ns, doc.period, zones[name])
            key = span.key
            amounts = [Money(record.cost, record.currency)]
            amounts += [
                Money(one.peer_cost, one.peer_currency)
                for one in record.attempts
                if one.peer_cost is not None and one.peer_currency is not None
            ]
            total = sum(converted(amount, doc.currency, ratios) or 0 for amount in amounts)
            sums[name, key] = sums.get((name, key), 0) + total
    return sums


def _covers(doc: BudgetDoc, record: UsageRecord) -> bool:
    scope = doc.scope
    if scope.tenant is not None:
        return scope.tenant == record.tenant
    if scope.team is not None:
        return scope.team == record.team
    if scope.key is not None:
        return scope.key == record.key_id
    return any(scope.tag in (key, f"{key}={text}") for key, text in record.tags)
