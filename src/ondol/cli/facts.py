"""`ondol facts`: the hub's usage as Parquet files, and questions about it in SQL."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from cyclopts import Parameter
from rich.progress import Progress

from ondol.adapters.facts import Answer, FactStore
from ondol.adapters.sqlite_transactions import SqliteReader
from ondol.cli.installation import DEFAULT_DIR, HUB, AsJson, Dir, Layout
from ondol.cli.output import console, print_json, table
from ondol.config.hub import load_hub
from ondol.core.ports import Tx
from ondol.hub import usage
from ondol.hub.schema import MIGRATIONS

T = TypeVar("T")

HubFile = Annotated[Path | None, Parameter(name="--config", help="The hub's file, instead of --dir's.")]


class _Reader(Protocol):
    def read_now(self, work: Callable[[Tx], T]) -> T: ...


def rebuild(
    *,
    again: Annotated[
        bool, Parameter(negative="", help="Make every file anew, also those that are there.")
    ] = False,
    directory: Dir = DEFAULT_DIR,
    config: HubFile = None,
    as_json: AsJson = False,
) -> int:
    """Bring the Parquet files up to what the hub has; it may run meanwhile."""
    place, store = _store(directory, config)
    reader, close = _open(place)
    screen = console(stderr=True)
    try:
        marks = [(one.gateway, one.records) for one in reader.read_now(usage.received)]
        with Progress(console=screen, disable=as_json or not screen.is_terminal, transient=True) as bar:
            task = bar.add_task("records", total=None)
            built = store.build(
                marks,
                lambda gateway, seq, limit: reader.read_now(
                    lambda tx: usage.rows_after(tx, gateway, seq, limit)
                ),
                again=again,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    finally:
        close()
    if as_json:
        print_json(built)
    else:
        print(f"{built.records} records; {built.written} files written, {built.kept} kept, in {store.folder}")
    return 0


def query(
    sql: Annotated[str, Parameter(help="One SELECT about the view `usage`.")],
    *,
    directory: Dir = DEFAULT_DIR,
    config: HubFile = None,
    as_json: AsJson = False,
) -> int:
    """Answer one SELECT about the usage of all sites, as of the last rebuild."""
    _, store = _store(directory, config)
    answer = store.query(sql)
    if as_json:
        print_json([dict(zip(answer.columns, map(_plain, row), strict=True)) for row in answer.rows])
    else:
        _show(answer)
    return 0


def _store(directory: Path, config: Path | None) -> tuple[Path, FactStore]:
    place = config or Layout(directory).config(HUB)
    return place, FactStore(place.parent / load_hub(place).data / "facts")


def _open(place: Path) -> tuple[_Reader, Callable[[], None]]:
    doc = load_hub(place)
    if doc.database:
        from ondol.adapters.database_postgres import PostgresDatabase  # an extra: not everybody has it

        server = PostgresDatabase(doc.database, migrations=MIGRATIONS, connections=1)
        return server, server.close_now
    file = SqliteReader(place.parent / doc.data / "hub.db", migrations=MIGRATIONS)
    return file, file.close


def _plain(value: Any) -> Any:
    """A value as JSON has it; a large integer stays exact, as text."""
    if isinstance(value, Decimal):
        is_small = value == value.to_integral_value() and abs(value) < 1 << 53
        return int(value) if is_small else str(value)
    return value if isinstance(value, bool | int | float | str | dict | list) or value is None else str(value)


def _show(answer: Answer) -> None:
    kinds = list(zip(*answer.rows, strict=True)) or [()] * len(answer.columns)
    made = table(
        [
            (name, all(isinstance(value, int | float | Decimal) for value in kinds[at]))
            for at, name in enumerate(answer.columns)
        ]
    )
    for row in answer.rows:
        made.add_row(*("–" if value is None else str(value) for value in row))
    screen = console()
    screen.print(made)
    if answer.cut:
        screen.print(f"only the first {len(answer.rows)} rows; ask for less", style="dim")
