"""`ondol keys`: make, list and revoke API keys: of a running site, straight in its key store, or of a fleet."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from cyclopts import Parameter

from ondol import config as configuration
from ondol.adapters.keystore import KeyRequest, SqliteKeyStore
from ondol.cli.asking import Asker
from ondol.cli.hub_client import HubClient, HubUrl
from ondol.cli.installation import DEFAULT_DIR, AsJson, CommandFailed, Dir, Url, target
from ondol.cli.output import console, print_json, table
from ondol.units import NS_PER_S

Config = Annotated[
    Path | None,
    Parameter(
        name="--config",
        help="A site's file: work on its key store, also while no gateway runs. Makes the first admin key.",
    ),
]
Fleet = Annotated[
    bool,
    Parameter(
        name="--fleet",
        negative="",
        help="A key of the fleet, at its hub: good at every site that has a route for it.",
    ),
]
_Routes = Annotated[tuple[str, ...], Parameter(name="--route", help="A route it may ask; default all.")]


def create(
    name: str,
    /,
    *,
    team: str = "default",
    kind: Literal["user", "admin", "peer"] = "user",
    routes: _Routes = (),
    expires_days: float | None = None,
    requests_per_min: int | None = None,
    tokens_per_min: int | None = None,
    config: Config = None,
    fleet: Fleet = False,
    hub: HubUrl = None,
    directory: Dir = DEFAULT_DIR,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """Make a key; its secret is shown this once and kept nowhere.

    Args:
        name: What it is for.
        team: Who shares its limits and costs.
        kind: `user` asks, `admin` administers, `peer` is another site of ours.
        expires_days: When it ends; default never.
    """
    if expires_days is not None and expires_days <= 0:
        raise CommandFailed(f"--expires-days is {expires_days}; expected more than 0.")
    expires_s = None if expires_days is None else max(1, int(expires_days * 86_400))
    expires_ns = None if expires_s is None else time.time_ns() + expires_s * NS_PER_S
    wanted = KeyRequest(
        name=name, team=team, kind=kind, routes=routes, expires_ns=expires_ns, requests_per_min=requests_per_min,
        tokens_per_min=tokens_per_min,
    )  # fmt: skip
    if fleet or hub is not None:
        made = _create_at_hub(_hub(directory, hub, config, url), wanted)
    elif config is not None:
        made = _create_in_store(config, wanted)
    else:
        body = {
            "name": name, "team": team, "kind": kind, "routes": list(routes), "expires_in_s": expires_s,
            "requests_per_min": requests_per_min, "tokens_per_min": tokens_per_min,
        }  # fmt: skip
        made = _call(directory, url, "POST", "/v1/ondol/keys", body)
    if as_json:
        print_json(made)
    else:
        print(made["key"])
        console(stderr=True).print(
            f"key {made['id']} for {name!r}, team {team!r}: shown this once, so keep it now", style="dim"
        )
    return 0


def list_keys(
    *,
    config: Config = None,
    fleet: Fleet = False,
    hub: HubUrl = None,
    directory: Dir = DEFAULT_DIR,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """List the keys of a site or of a fleet, revoked and expired ones too; secrets are never shown."""
    if fleet or hub is not None:
        rows = _hub(directory, hub, config, url).get("keys")["data"]
    else:
        rows = _list_in_store(config) if config is not None else _listed(directory, url)
    if as_json:
        print_json(rows)
        return 0
    made = table(
        [(head, False) for head in ("id", "name", "team", "kind", "routes", "made", "expires", "state")]
    )
    for one in rows:
        made.add_row(
            str(one["id"]),
            str(one.get("name", "")),
            str(one.get("team", "")),
            str(one.get("kind", "")),
            ", ".join(one.get("routes") or ()) or "all",
            _day(one.get("created_ns")),
            _day(one.get("expires_ns")),
            state(one, time.time_ns()),
        )
    console().print(made)
    return 0


def revoke(
    key_id: str,
    /,
    *,
    config: Config = None,
    fleet: Fleet = False,
    hub: HubUrl = None,
    directory: Dir = DEFAULT_DIR,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """Revoke a key: from now on nobody gets in with it.

    Args:
        key_id: The key's id, as `ondol keys list` shows it.
    """
    if fleet or hub is not None:
        _hub(directory, hub, config, url).delete(f"keys/{quote(key_id, safe='')}")
    elif config is not None:
        store = _store(config)
        try:
            found = store.revoke(key_id, time.time_ns())
        finally:
            store.close()
        if not found:
            raise CommandFailed(f"there is no key with the id {key_id!r}; `ondol keys list` shows all.")
    else:
        _call(directory, url, "DELETE", f"/v1/ondol/keys/{key_id}", None)
    if as_json:
        print_json({"id": key_id, "revoked": True})
    else:
        print(f"key {key_id} is revoked")
    return 0


def _hub(directory: Path, hub: str | None, config: Path | None, url: str | None) -> HubClient:
    if config is not None or url is not None:
        raise CommandFailed(
            "--fleet and --hub are for the fleet's keys, --config and --url for one site's: choose"
        )
    return HubClient.find(directory, hub)


def _create_at_hub(hub: HubClient, wanted: KeyRequest) -> dict[str, Any]:
    if wanted.kind != "user":
        raise CommandFailed(
            f"--kind is {wanted.kind!r}; keys of the fleet are of kind user, all others a site's own"
        )
    body = {
        "name": wanted.name, "team": wanted.team, "routes": list(wanted.routes), "expires_ns": wanted.expires_ns,
        "requests_per_min": wanted.requests_per_min, "tokens_per_min": wanted.tokens_per_min,
    }  # fmt: skip
    made: dict[str, Any] = hub.post("keys", body)
    return made


def state(key: dict[str, Any], now_ns: int) -> str:
    """Whether a listed key works: `works`, `revoked` or `expired`."""
    if key.get("revoked_ns") is not None:
        return "revoked"
    expires_ns = key.get("expires_ns")
    return "expired" if expires_ns is not None and expires_ns <= now_ns else "works"


def _call(directory: Path, url: str | None, method: str, path: str, body: dict[str, Any] | None) -> Any:
    where = target(directory, url, admin=True)

    async def call() -> Any:
        async with Asker(where) as asker:
            if method == "POST":
                return await asker.post(path, body or {})
            return await (asker.get(path) if method == "GET" else asker.delete(path))

    return asyncio.run(call())


def _listed(directory: Path, url: str | None) -> list[dict[str, Any]]:
    answer = _call(directory, url, "GET", "/v1/ondol/keys", None)
    rows: list[dict[str, Any]] = answer["data"] if isinstance(answer, dict) else answer
    return rows


def _store(config: Path) -> SqliteKeyStore:
    data = config.parent / configuration.load(config).gateway.data
    data.mkdir(parents=True, exist_ok=True)
    return SqliteKeyStore(data / "keys.db")


def _create_in_store(config: Path, wanted: KeyRequest) -> dict[str, str]:
    store = _store(config)
    try:
        key, text = store.issue(wanted, time.time_ns())
    finally:
        store.close()
    return {"id": key.id, "key": text}


def _list_in_store(config: Path) -> list[dict[str, Any]]:
    store = _store(config)
    try:
        return [
            {
                "id": one.id, "name": one.name, "team": one.team, "kind": one.kind, "routes": one.routes,
                "created_ns": one.created_ns, "expires_ns": one.expires_ns, "revoked_ns": one.revoked_ns,
            }
            for one in store.all()
        ]  # fmt: skip
    finally:
        store.close()


def _day(wall_ns: int | None) -> str:
    return "–" if not wall_ns else datetime.fromtimestamp(wall_ns / NS_PER_S, UTC).strftime("%Y-%m-%d")
