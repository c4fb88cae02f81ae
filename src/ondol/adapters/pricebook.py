"""Prices from the site's file and from the package genai-prices.

Invariant: a price is what its source says, or there is none.  What the package knows but our `Price`
cannot say (cache writes, searches, batch discounts) is named in the price's source text.

The package pulls in pydantic (about 30 MB and 0.2 s), so it is read in a short-lived child process:
`python -m ondol.adapters.pricebook`, JSON in and out.  `price_of` and `prices_of` never import it here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Final

import msgspec

from ondol.core.catalog import PriceDoc
from ondol.core.money import Price
from ondol.errors import ConfigError
from ondol.units import CURRENCY_SCALE

CHILD_TIMEOUT_S: Final = 60.0
"""It takes 0.4 s here; a loaded small device may need a hundred times that."""

_METERS: Final = {
    "input_mtok": "input",
    "output_mtok": "output",
    "cache_read_mtok": "cached",
    "output_reasoning_mtok": "reasoning",
}
_VARIABLES_KEPT: Final = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG")


class BookEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What the package says of one `provider/model`: dollars a million tokens, as decimal text."""

    id: str
    input: str
    output: str
    cached: str | None = None
    reasoning: str | None = None
    request: str = "0"
    source: str = ""
    date: str = ""


class _Reply(msgspec.Struct, frozen=True, kw_only=True):
    entry: BookEntry | None = None
    error: str | None = None


def prices_of(docs: Iterable[PriceDoc]) -> dict[str, Price]:
    """The prices of many documents, by name; those with `book` are looked up in one child process.

    Documents that are exchange rates (`exchange_from`) are left out.

    Raises:
        ConfigError: a document is not a price, or the package has none that can be expressed.
    """
    wanted = [doc for doc in docs if doc.exchange_from is None]
    books = sorted({doc.book for doc in wanted if doc.book is not None})
    entries = _ask_child(books) if books else {}
    return {doc.name: _price(doc, entries) for doc in wanted}


def price_of(doc: PriceDoc) -> Price:
    """The price of one document.  Reads `book` prices in a child process; see `prices_of` for many.

    Raises:
        ConfigError: as `prices_of`; also for an exchange rate.
    """
    if doc.exchange_from is not None:
        raise _wrong(doc, "it is an exchange rate (exchange_from), which prices no tokens")
    return prices_of([doc])[doc.name]


def _price(doc: PriceDoc, entries: dict[str, _Reply]) -> Price:
    rates = ("input_per_mtok", "output_per_mtok", "cached_per_mtok", "reasoning_per_mtok", "per_request")
    given = [name for name in rates if getattr(doc, name) is not None]
    if doc.book is not None:
        if given:
            raise _wrong(doc, f"found book and {', '.join(given)}; give one or the other")
        if doc.currency != "USD":
            raise _wrong(doc, f"found currency {doc.currency} with book, whose prices are in USD")
        reply = entries[doc.book]
        if reply.entry is None:
            raise _wrong(doc, reply.error or "no price")
        return _from_entry(doc, reply.entry)
    if doc.currency not in CURRENCY_SCALE:
        raise _wrong(doc, f"found currency {doc.currency!r}; known are {', '.join(sorted(CURRENCY_SCALE))}")
    for name in ("input_per_mtok", "output_per_mtok"):
        if getattr(doc, name) is None:
            raise _wrong(doc, f"{name} is missing; write '0' where it really costs nothing")
    for name in ("source", "date"):
        if not getattr(doc, name):
            raise _wrong(doc, f"{name} is missing; say where the figures are from, and of which day")
    return Price(
        id=f"{doc.name}@{doc.date}",
        currency=doc.currency,
        input=_scaled(doc, doc.input_per_mtok or "0"),
        output=_scaled(doc, doc.output_per_mtok or "0"),
        cached=None if doc.cached_per_mtok is None else _scaled(doc, doc.cached_per_mtok),
        reasoning=None if doc.reasoning_per_mtok is None else _scaled(doc, doc.reasoning_per_mtok),
        request=_scaled(doc, doc.per_request or "0"),
        source=doc.source,
        date=doc.date,
    )


def _from_entry(doc: PriceDoc, entry: BookEntry) -> Price:
    return Price(
        id=entry.id,
        currency="USD",
        input=_scaled(doc, entry.input),
        output=_scaled(doc, entry.output),
        cached=None if entry.cached is None else _scaled(doc, entry.cached),
        reasoning=None if entry.reasoning is None else _scaled(doc, entry.reasoning),
        request=_scaled(doc, entry.request),
        source=entry.source,
        date=entry.date,
    )


def _scaled(doc: PriceDoc, text: str) -> int:
    """An amount in the currency's smallest unit; refused where it would have to be rounded."""
    amount = Decimal(text).scaleb(CURRENCY_SCALE[doc.currency])
    if amount != amount.to_integral_value():
        places = CURRENCY_SCALE[doc.currency]
        raise _wrong(doc, f"found {text}; {doc.currency} is kept to {places} decimal places")
    return int(amount)


def _wrong(doc: PriceDoc, why: str) -> ConfigError:
    return ConfigError(f"Price {doc.name!r}: {why}.")


def _ask_child(books: list[str]) -> dict[str, _Reply]:
    """Ask a child of its own; it gets the names and no more of our environment than it needs to start."""
    try:
        done = subprocess.run(  # our own interpreter and module, no words from outside
            [sys.executable, "-m", "ondol.adapters.pricebook"],
            input=msgspec.json.encode(books),
            capture_output=True,
            timeout=CHILD_TIMEOUT_S,
            env={name: os.environ[name] for name in _VARIABLES_KEPT if name in os.environ},
            check=True,
        )
        return msgspec.json.decode(done.stdout, type=dict[str, _Reply])
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise ConfigError(f"the price book genai-prices could not be read ({last[:300]}).") from error
    except (OSError, subprocess.TimeoutExpired, msgspec.DecodeError) as error:
        raise ConfigError(f"the price book genai-prices could not be read ({error}).") from error


def look_up(book: str) -> BookEntry:
    """The entry of `provider/model`.  Imports genai-prices: for the child, and for tests.

    Of tiers the base one is taken, of prices by start date the one in force today.

    Raises:
        LookupError: no such provider or model, or a price that cannot be expressed; says what is there.
    """
    from datetime import UTC, datetime  # with the package: only the child needs them
    from importlib.metadata import version

    from genai_prices import types
    from genai_prices.data_snapshot import get_snapshot

    provider_id, slash, model_id = book.partition("/")
    if not slash or not model_id:
        raise LookupError(f"found book {book!r}; expected provider/model, as openai/gpt-4o-mini")
    snapshot = get_snapshot()
    provider = next((each for each in snapshot.providers if each.id == provider_id), None)
    if provider is None:
        raise LookupError(_nearest("provider", provider_id, [each.id for each in snapshot.providers]))
    model = provider.find_model(model_id, all_providers=snapshot.providers)
    if model is None:
        known = [each.id for each in provider.models]
        raise LookupError(_nearest(f"model of {provider_id}", model_id, known))
    now = datetime.now(UTC)
    conditions = model.prices if isinstance(model.prices, list) else []
    if any(isinstance(each.constraint, types.TimeOfDateConstraint) for each in conditions):
        raise LookupError(
            f"the price of {book} depends on the time of day, which a price here cannot say; "
            "write the dearest rates by hand, with source and date"
        )
    started = [
        each.constraint.start_date
        for each in conditions
        if isinstance(each.constraint, types.StartDateConstraint) and each.constraint.active(now)
    ]
    package = f"genai-prices {version('genai-prices')}"
    stamp = max(started).isoformat() if started else ""
    rates, notes = _rates(book, model.get_prices(now).__dict__)
    url = f", {provider.pricing_urls[0]}" if provider.pricing_urls else ""
    return BookEntry(
        id=f"{provider_id}/{model.id}@{stamp or package.replace(' ', '-')}",
        source="; ".join([f"{package}{url}", *notes]),
        date=stamp,
        **rates,
    )


def _rates(book: str, meters: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The rates that we can say, as decimal text, and notes on what was left out."""
    rates: dict[str, str] = {}
    notes, left = [], []
    for meter, value in sorted(meters.items()):
        if value is None or meter.startswith("_"):
            continue
        base = value
        if not isinstance(value, Decimal):
            base = value.base
            if meter in _METERS:
                notes.append(f"{meter}: base tier, up to {value.tiers[0].start} input tokens")
        if meter in _METERS:
            rates[_METERS[meter]] = format(base, "f")
        elif meter == "requests_kcount":
            rates["request"] = format(base / 1_000, "f")
        else:
            left.append(meter)
    if "input" not in rates:
        found = ", ".join(sorted(name for name, value in meters.items() if value is not None)) or "nothing"
        raise LookupError(f"{book} is not priced by input tokens (found {found}); write its price by hand")
    if "output" not in rates:
        rates["output"] = "0"
        notes.append("no output rate: the model writes no tokens")
    if left:
        notes.append(f"not priced here: {', '.join(left)}")
    return rates, notes


def _nearest(what: str, name: str, known: list[str]) -> str:
    from difflib import get_close_matches  # only on this path

    close = get_close_matches(name, known, n=5, cutoff=0.4)
    return f"the book has no {what} {name!r}; nearest are {', '.join(close or sorted(known)[:10])}"


def _serve() -> None:
    """The child: names on stdin, replies on stdout."""
    replies = {}
    for book in msgspec.json.decode(sys.stdin.buffer.read(), type=list[str]):
        try:
            replies[book] = _Reply(entry=look_up(book))
        except LookupError as error:
            replies[book] = _Reply(error=str(error.args[0]))
    sys.stdout.buffer.write(msgspec.json.encode(replies))


if __name__ == "__main__":
    _serve()
