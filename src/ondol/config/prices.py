"""Price documents: every rate says where it is from and when, and budgets can be paid in their currency."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from typing import Final

from ondol.config.checks import Documents, Entry
from ondol.config.report import Report
from ondol.core.catalog import PriceDoc
from ondol.core.money import Price
from ondol.errors import ConfigError
from ondol.units import CURRENCY_SCALE

PricesOf = Callable[[Iterable[PriceDoc]], dict[str, Price]]

_RATES: Final = ("input_per_mtok", "output_per_mtok", "cached_per_mtok", "reasoning_per_mtok", "per_request")
_CHARGES: Final = ("input_per_mtok", "output_per_mtok", "per_request")  # the others are parts of these


def prices_and_exchange(
    entries: dict[str, Entry[PriceDoc]], prices_of: PricesOf, report: Report
) -> tuple[dict[str, Price], dict[tuple[str, str], str]]:
    """The prices by name, and the rates by (from, to), of all documents that are right."""
    rated: list[Entry[PriceDoc]] = []
    exchange: dict[tuple[str, str], str] = {}
    for entry in entries.values():
        if not _is_right(entry, report):
            continue
        doc = entry.doc
        if doc.exchange_from is not None and doc.rate is not None:
            pair = (doc.exchange_from, doc.currency)
            if pair in exchange:
                report.add(
                    entry.node.line, f"{entry.where}: a second rate from {pair[0]} to {pair[1]}; allowed: one"
                )
            exchange[pair] = doc.rate
            continue
        rated.append(entry)
    return _looked_up(rated, prices_of, report), exchange


def _looked_up(rated: list[Entry[PriceDoc]], prices_of: PricesOf, report: Report) -> dict[str, Price]:
    """All at once, which is quick; one by one only to learn which of them is wrong."""
    try:
        return prices_of([entry.doc for entry in rated])
    except ConfigError:
        prices: dict[str, Price] = {}
    for entry in rated:
        try:
            prices |= prices_of([entry.doc])
        except ConfigError as error:
            report.add(entry.node.at("book").line, f"{entry.where}: {error.message}")
    return prices


def check_currencies(
    docs: Documents, prices: dict[str, Price], exchange: dict[tuple[str, str], str], report: Report
) -> None:
    """Currencies are known, deployments point to prices, and budgets reach the currency of each price."""
    for budget in docs.budgets.values():
        if not _is_currency(budget, budget.doc.currency, "currency", report):
            continue
        for price in prices.values():
            pair = (price.currency, budget.doc.currency)
            if pair[0] != pair[1] and pair not in exchange:
                report.add(
                    budget.node.at("currency").line,
                    f"{budget.where}.currency: found {pair[1]}, and prices in {pair[0]}; allowed: the "
                    f"prices' currency, or a Price with exchange_from: {pair[0]}, currency: {pair[1]}, rate",
                )
                break
    for gateway in docs.gateways.values():
        _is_currency(gateway, gateway.doc.currency, "currency", report)
    for deployment in docs.deployments.values():
        name = deployment.doc.price
        if name in docs.names.get("Price", ()) and name not in prices and report.is_empty:
            report.wrong(
                deployment.node.at("price"),
                f"{deployment.where}.price",
                "a price of tokens, no exchange",
            )


def _is_currency(entry: Entry, code: str, field: str, report: Report) -> bool:  # type: ignore[type-arg]
    if code in CURRENCY_SCALE:
        return True
    report.unknown(entry.node.at(field), f"{entry.where}.{field}", code, CURRENCY_SCALE)
    return False


def _is_right(entry: Entry[PriceDoc], report: Report) -> bool:
    """Whether a price says one thing, completely."""
    doc, node, where = entry.doc, entry.node, entry.where
    is_right = _is_currency(entry, doc.currency, "currency", report)
    given = [name for name in _RATES if getattr(doc, name) is not None]
    is_exchange = doc.exchange_from is not None or doc.rate is not None
    forms = [bool(given), doc.book is not None, is_exchange]
    if forms.count(True) != 1:
        report.add(
            node.line,
            f"{where}: allowed: exactly one of rates ({', '.join(_RATES)}), book: PROVIDER/MODEL, and "
            "exchange_from with rate",
        )
        return False
    if doc.book is not None:
        return is_right
    if is_exchange:
        if doc.exchange_from is None or doc.rate is None:
            report.add(node.line, f"{where}: allowed: exchange_from and rate together")
            return False
        is_right = _is_currency(entry, doc.exchange_from, "exchange_from", report) and is_right
        if doc.exchange_from == doc.currency:
            report.wrong(node.at("exchange_from"), f"{where}.exchange_from", f"not {doc.currency} itself")
            is_right = False
    elif not any(name in _CHARGES for name in given):
        report.add(node.line, f"{where}: found only {', '.join(given)}; wanted too: {', '.join(_CHARGES)}")
        is_right = False
    if not doc.source:
        report.add(node.line, f"{where}.source: missing; allowed: where the figures are from")
        is_right = False
    if not _is_date(doc.date):
        report.add(
            node.at("date").line,
            f"{where}.date: {'missing' if not doc.date else 'not a date'}; allowed: the day that the figures "
            "were read, as 2026-01-31",
        )
        is_right = False
    return is_right


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return len(text) == len("2026-01-31")
