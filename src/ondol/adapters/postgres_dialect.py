"""What PostgreSQL wants otherwise than SQLite: words, types, settings of a connection, meanings of errors.

The driver is imported only here, and only when a connection is opened: `ondol[postgres]` brings it.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import TYPE_CHECKING, Any, Final, Literal

from ondol.errors import ConfigError, OndolError

if TYPE_CHECKING:
    import psycopg

_LOG = logging.getLogger("ondol.hub.database")

_WORDS: Final = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | --[^\n]* | /\*.*?\*/ | \? | % | \bBLOB\b""", re.VERBOSE | re.DOTALL
)

SETTINGS: Final = (
    # A sequential scan locks the whole table for the check of serialisability, and small tables would
    # always be scanned so: two sites would then undo each other's transactions.
    "SET enable_seqscan = off",
    "SET statement_timeout = '60s'",
    # A replica that froze, or whose machine is gone, in the middle of a transaction holds its locks for the second
    # time; the others wait for the first, which is longer, and so never notice.
    "SET lock_timeout = '8s'",
    "SET idle_in_transaction_session_timeout = '5s'",
)
LINK: Final[dict[str, Any]] = {
    "connect_timeout": 5, "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3,
    "tcp_user_timeout": 10_000, "application_name": "ondol-hub",
}  # fmt: skip
OLDEST: Final = 130_000
"""PostgreSQL 13 has `pg_current_xact_id_if_assigned`."""

Verdict = Literal["again", "unwell", "mistake"]

TWIN: Final = "23505"
"""A unique value is there: another transaction was quicker, or the work is wrong."""
_AGAIN: Final = ("40001", "40P01", "25P03", TWIN)
"""Serialisation, deadlock, this process slept for too long within a transaction, and a twin."""
_LOST: Final = ("08", "57P01", "57P02", "57P03")
_UNWELL: Final = ("25006", "28", "3D", "42501", "53", "55P03", "57014", "58", "XX")


@functools.lru_cache(maxsize=512)
def translate(sql: str) -> str:
    """`?` to `%s`, `%` to `%%`, BLOB to BYTEA; quoted text, quoted names and comments stay as they are."""

    def word(found: re.Match[str]) -> str:
        text = found[0]
        if text == "?":
            return "%s"
        return "BYTEA" if text == "BLOB" else text.replace("%", "%%")

    return _WORDS.sub(word, sql)


def place_of(dsn: str) -> str:
    """Server and database as a message may name them, without the password.

    Raises:
        ConfigError: the driver is missing, or this is no address of a server.
    """
    driver = _driver()
    try:
        words = driver.conninfo.conninfo_to_dict(dsn)
    except driver.ProgrammingError:
        raise ConfigError(
            "the hub's PostgreSQL address is not one. Expected a URL such as "
            "postgresql://ondol@db.example/ondol, or words such as host=db.example dbname=ondol."
        ) from None
    host = words.get("host") or words.get("hostaddr") or "localhost"
    return f"PostgreSQL database {words.get('dbname') or words.get('user') or ''!s} at {host}"


def open_connection(dsn: str) -> psycopg.Connection[Any]:
    """A connection whose transactions are SERIALIZABLE and durable.

    Raises:
        ConfigError: the driver is missing, or the server is too old.
        psycopg.Error: it cannot be reached, or does not let us in.
    """
    driver = _driver()
    # A transaction that is run again is told as a warning about its pipeline, once each.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    words = driver.conninfo.conninfo_to_dict(dsn)
    connection: psycopg.Connection[Any] = driver.connect(
        dsn, autocommit=True, **{key: value for key, value in LINK.items() if key not in words}
    )
    try:
        if connection.info.server_version < OLDEST:
            raise ConfigError(
                f"{place_of(dsn)}: found PostgreSQL {connection.info.server_version // 10_000}; expected 13 or later."
            )
        for setting in SETTINGS:
            connection.execute(setting.encode())
        _insist_on_durability(connection, dsn)
        _adapt(connection)
        connection.autocommit = False
        connection.isolation_level = driver.IsolationLevel.SERIALIZABLE
    except BaseException:
        connection.close()
        raise
    return connection


def verdict_of(error: Exception, *, is_closed: bool) -> Verdict:
    """What to do about an error: run again, tell the caller that the server is unwell, or it is our mistake."""
    if isinstance(error, OndolError):
        return "mistake"
    driver = _driver()
    if not isinstance(error, driver.Error):
        return "mistake"
    state = error.sqlstate
    if state is None:  # not the server's word: the line, or the driver's use
        return "again" if is_closed and isinstance(error, driver.OperationalError) else "mistake"
    if state in _AGAIN or state.startswith(_LOST):
        return "again"
    return "unwell" if state.startswith(_UNWELL) else "mistake"


def _insist_on_durability(connection: psycopg.Connection[Any], dsn: str) -> None:
    row = connection.execute(
        "SELECT current_setting('synchronous_commit'), current_setting('fsync')"
    ).fetchone()
    assert row is not None
    if row[0] == "off":
        connection.execute("SET synchronous_commit = on")
    if row[1] == "off":
        _LOG.warning("%s: fsync is off; a power cut will lose what sites were told is kept", place_of(dsn))


def _adapt(connection: psycopg.Connection[Any]) -> None:
    """Values as SQLite gives and takes them: sums as int, averages as float, truth as 0 and 1."""
    driver = _driver()

    class _Number(driver.adapt.Loader):  # type: ignore[misc, name-defined]  # the driver comes late
        def load(self, data: Any) -> int | float:
            text = bytes(data).decode()
            return int(text) if text.lstrip("-").isdigit() else float(text)

    class _Truth(driver.adapt.Dumper):  # type: ignore[misc, name-defined]  # the driver comes late
        oid = driver.adapters.types["int8"].oid

        def dump(self, obj: bool) -> bytes:
            return b"1" if obj else b"0"

    connection.adapters.register_loader("numeric", _Number)
    connection.adapters.register_dumper(bool, _Truth)


def _driver() -> Any:
    try:
        import psycopg
        import psycopg.conninfo
    except ImportError as error:
        raise ConfigError(
            "the hub's database is PostgreSQL, and its driver is not installed. Install `ondol[postgres]`."
        ) from error
    return psycopg
