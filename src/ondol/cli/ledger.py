"""`ondol ledger verify`: does the hash chain of every ledger hold, and is its start signed?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.progress import Progress

from ondol.adapters.ledger_reader import VerifyResult
from ondol.adapters.ledger_reader import verify as verify_file
from ondol.cli.installation import DEFAULT_DIR, AsJson, Dir, Layout
from ondol.cli.output import console, print_json
from ondol.core.dsse import key_id, public_key
from ondol.errors import LedgerBroken, LedgerUnavailable, SchemaTooNew


def verify(*, directory: Dir = DEFAULT_DIR, as_json: AsJson = False) -> int:
    """Check the hash chain of every ledger; where one does not hold, say the first broken record."""
    results: list[dict[str, Any]] = []
    is_good = True
    for site, path in Layout(directory).ledgers():
        try:
            found = _verified(site, path, quiet=as_json)
        except (LedgerBroken, LedgerUnavailable, SchemaTooNew) as error:
            is_good = False
            results.append({"site": site, "file": str(path), "ok": False, "why": error.message})
            _tell(as_json, f"{site}: {error.message}", bad=True)
            continue
        is_good = is_good and found.ok
        results.append({"site": site, "file": str(path), "ok": found.ok} | msgspec.structs.asdict(found))
        _tell(as_json, _sentence(site, path, found), bad=not found.ok)
    if as_json:
        print_json({"ok": is_good, "ledgers": results})
    return 0 if is_good else 1


def _verified(site: str, path: Path, *, quiet: bool) -> VerifyResult:
    screen = console(stderr=True)
    with Progress(console=screen, disable=quiet or not screen.is_terminal, transient=True) as bar:
        task = bar.add_task(f"checking {site}", total=None)
        return verify_file(
            path, lambda done, total: bar.update(task, completed=done, total=total), keys=_keys(path)
        )


def _keys(path: Path) -> dict[str, bytes] | None:
    """The public key of the site whose ledger it is, which signs where a pruned chain starts; None without one."""
    file = path.with_name("site.key")
    if not file.is_file():
        return None
    public = public_key(file.read_bytes())
    return {key_id(public): public}


def _sentence(site: str, path: Path, found: VerifyResult) -> str:
    if found.ok:
        last = f"the last is {found.last_seq}, hash {found.last_hash[:16]}…"
        start = f" after {found.start_seq} that the hub has and that were pruned" if found.start_seq else ""
        return f"{site}: {found.rows} records hold{start}; {last}"
    return (
        f"{site}: record {found.broken_seq} of {path} is broken: {found.why}. "
        f"The {found.rows} records before it hold."
    )


def _tell(as_json: bool, text: str, *, bad: bool) -> None:
    if not as_json:
        print(text, file=sys.stderr if bad else sys.stdout)
