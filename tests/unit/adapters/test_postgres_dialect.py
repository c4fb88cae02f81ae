"""What becomes of SQL on its way to PostgreSQL, and what is said of a wrong address."""

from __future__ import annotations

import sys

import pytest

from ondol.adapters.postgres_dialect import place_of, translate, verdict_of
from ondol.errors import ConfigError, RangeRefused


@pytest.mark.parametrize(
    ("sql", "wanted"),
    [
        ("SELECT ?", "SELECT %s"),
        ("SELECT '?' || ?", "SELECT '?' || %s"),
        ("SELECT 'it''s ?', ?", "SELECT 'it''s ?', %s"),
        (
            "SELECT \"a?\" FROM t WHERE x LIKE '5%' AND y = ?",
            "SELECT \"a?\" FROM t WHERE x LIKE '5%%' AND y = %s",
        ),
        ("SELECT a % ? -- why?\n, ?", "SELECT a %% %s -- why?\n, %s"),
        ("SELECT /* ? BLOB */ ?", "SELECT /* ? BLOB */ %s"),
        ("CREATE TABLE t(a BLOB NOT NULL, b TEXT)", "CREATE TABLE t(a BYTEA NOT NULL, b TEXT)"),
        ("SELECT 'BLOB', BLOBS", "SELECT 'BLOB', BLOBS"),
    ],
)
def test_parameters_and_types_are_changed_and_quoted_text_is_not(sql: str, wanted: str) -> None:
    assert translate(sql) == wanted


def test_a_place_is_named_without_its_password() -> None:
    assert (
        place_of("postgresql://me:secret@db.example:5433/ondol") == "PostgreSQL database ondol at db.example"
    )
    with pytest.raises(ConfigError, match="Expected a URL such as") as told:
        place_of("postgresql://me:secret@[")
    assert "secret" not in str(told.value)


def test_a_missing_driver_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"Install `ondol\[postgres\]`"):
        place_of("postgresql://db.example/ondol")


def test_our_own_refusals_are_not_tried_again() -> None:
    assert verdict_of(RangeRefused("a fork"), is_closed=False) == "mistake"
    assert verdict_of(KeyError("x"), is_closed=True) == "mistake"
