"""Prices by hand and from the package, and clear words where there is none."""

from __future__ import annotations

import sys

import pytest

from ondol.adapters.pricebook import BookEntry, look_up, price_of, prices_of
from ondol.core.catalog import PriceDoc
from ondol.core.money import Price
from ondol.errors import ConfigError


def _doc(**changes: object) -> PriceDoc:
    values: dict[str, object] = {
        "name": "helper",
        "input_per_mtok": "0.15",
        "output_per_mtok": "0.6",
        "source": "vendor's page",
        "date": "2026-01-15",
    }
    return PriceDoc(**{**values, **changes})  # type: ignore[arg-type]  # values of one document


def test_a_price_by_hand_is_exact_and_names_its_version() -> None:
    found = price_of(_doc(cached_per_mtok="0.075", per_request="0.000000001"))

    assert found == Price(
        id="helper@2026-01-15", currency="USD", input=150_000_000, output=600_000_000, cached=75_000_000,
        request=1, source="vendor's page", date="2026-01-15",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"currency": "XAU"}, "known are EUR, JPY, KRW, USD"),
        ({"source": ""}, "source is missing"),
        ({"date": ""}, "date is missing"),
        ({"output_per_mtok": None}, "output_per_mtok is missing; write '0'"),
        ({"currency": "KRW", "input_per_mtok": "0.0000001"}, "KRW is kept to 6 decimal places"),
        ({"book": "openai/gpt-4o-mini"}, "give one or the other"),
        ({"exchange_from": "KRW", "rate": "0.0007"}, "exchange rate"),
    ],
)
def test_what_is_no_price_is_refused_with_the_reason(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=f"'helper'.*{words}"):
        price_of(_doc(**changes))


def test_the_book_is_read_in_a_child_and_its_weight_stays_there() -> None:
    weight = {"genai_prices", "pydantic"} & set(sys.modules)

    found = prices_of(
        [
            PriceDoc(name="mini", book="openai/gpt-4o-mini"),
            PriceDoc(name="rate", exchange_from="KRW", rate="0.0007"),
            _doc(),
        ]
    )

    assert set(found) == {"mini", "helper"}
    mini = found["mini"]
    assert mini.id.startswith("openai/gpt-4o-mini@")
    assert (mini.input, mini.output, mini.cached) == (150_000_000, 600_000_000, 75_000_000)
    assert "genai-prices" in mini.source
    assert {"genai_prices", "pydantic"} & set(sys.modules) == weight


def test_many_mistakes_are_told_apart() -> None:
    with pytest.raises(ConfigError, match="'x'.*no provider 'opnai'; nearest are openai"):
        price_of(PriceDoc(name="x", book="opnai/gpt-4o-mini"))
    with pytest.raises(ConfigError, match="currency EUR with book"):
        price_of(PriceDoc(name="x", book="openai/gpt-4o-mini", currency="EUR"))


def test_a_tiered_price_takes_the_base_tier_and_says_so() -> None:
    entry = look_up("google/gemini-2.5-pro")

    assert entry.input == "1.25"
    assert "input_mtok: base tier, up to 200000 input tokens" in entry.source


def test_an_embedding_model_writes_nothing_and_that_is_said() -> None:
    entry = look_up("openai/text-embedding-3-small")

    assert (entry.input, entry.output) == ("0.02", "0")
    assert "no output rate" in entry.source


def test_a_price_that_starts_on_a_day_has_that_day() -> None:
    entry = look_up("anthropic/claude-opus-4-6")

    assert isinstance(entry, BookEntry)
    assert (entry.id, entry.date) == ("anthropic/claude-opus-4-6@2026-03-13", "2026-03-13")
    assert "not priced here: cache_write" in entry.source


@pytest.mark.parametrize(
    ("book", "words"),
    [
        ("openai/gpt4o-mini", "nearest are gpt-4o-mini"),
        ("deepseek/deepseek-chat", "depends on the time of day"),
        ("openai/whisper-1", "not priced by input tokens"),
        ("openai", "expected provider/model"),
    ],
)
def test_what_the_book_cannot_say_is_refused(book: str, words: str) -> None:
    with pytest.raises(LookupError, match=words):
        look_up(book)
