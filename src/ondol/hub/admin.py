"""What operators ask of the hub: JSON below `/v1/hub/`, with the admin key.

The documents of `diff` and `apply` are those of the fleet's files as JSON objects with `kind` and `name`; they are
checked here again, whoever checked them before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from ondol.core import fleet as fleets
from ondol.core.catalog import SiteDoc
from ondol.core.desired import plain
from ondol.core.fleet import Fleet
from ondol.core.ports import Tx
from ondol.errors import InvalidRequest, NotFound
from ondol.hub import (
    artifacts,
    audit,
    enrol,
    export,
    ingest,
    keys,
    leases,
    publish,
    rollouts,
    sessions,
    sites,
    usage,
)
from ondol.hub.enrol import Invitation
from ondol.hub.keys import NewFleetKey
from ondol.hub.service import Hub
from ondol.hub.status import SiteStatus, status, summary

Check = Callable[[Sequence[Mapping[str, Any]], Mapping[str, SiteDoc]], Awaitable[Fleet]]
"""Documents and invited sites to a checked fleet; raises ConfigError with everything that is wrong.

Seconds for a thousand sites of many kinds, so it runs elsewhere while sites are served.
"""


class Documents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `diff` and `apply` take."""

    documents: list[dict[str, Any]]
    message: str = ""
    author: str = ""


class Rollback(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `rollback` takes; without a number it is the generation before."""

    generation: int | None = None
    author: str = ""


class Invites(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `invites` takes: one site each; with `count` > 1 a factory key for sites made after the document."""

    invitations: list[Invitation]


class HubAdmin:
    """The handlers."""

    def __init__(self, hub: Hub, check: Check) -> None:
        """Bind the hub and the check of documents."""
        self._hub = hub
        self._check = check

    async def handle(self, method: str, path: str, query: Mapping[str, str], body: bytes) -> bytes:
        """The JSON answer to a request below `/v1/hub/`.

        Raises:
            OndolError: not found, or badly asked.
        """
        name, _, rest = path.partition("/")
        match (method, name, rest):
            case ("POST", "diff", ""):
                return _json(await self._diff(_read(body, Documents)))
            case ("POST", "apply", ""):
                return _json(await self._apply(_read(body, Documents)))
            case ("POST", "rollback", ""):
                return _json(await self._rollback(_read(body, Rollback)))
            case ("GET", "generations", ""):
                return _json({"data": await self._hub.database.read(lambda tx: publish.generations(tx, 100))})
            case ("GET", "documents", ""):
                return _json(await self._documents(query))
            case ("GET", "sites", ""):
                return _json({"data": await self.sites_now()})
            case ("POST", "invites", ""):
                return _json({"data": await self._invite(_read(body, Invites))})
            case ("GET", "status", ""):
                return _json(await self._status())
            case ("GET", "audit", ""):
                return _json({"data": await self._hub.database.read(lambda tx: audit.newest(tx, 500))})
            case ("GET", "usage", ""):
                return _json(await self._hub.database.read(lambda tx: usage.answer(tx, query)))
            case ("GET", "budgets", ""):
                return _json({"data": await self._hub.database.read(self._budgets)})
            case ("GET", "models", ""):
                return _json({"data": await self._hub.database.read(artifacts.offered)})
            case ("GET", "export", site) if site:
                number = export.generation_of(query.get("generation"))
                return _json(await export.export(self._hub, site, number))
        if name in ("sites", "keys", "rollouts"):
            return _json(await getattr(self, f"_{name}_call")(method, rest, body))
        raise NotFound(
            f"{method} /v1/hub/{path[:64]} does not exist; there are diff, apply, rollback, generations, documents, "
            "sites, invites, keys, rollouts, usage, budgets, models, export, audit, status"
        )

    # ---- documents

    async def _diff(self, wanted: Documents) -> dict[str, Any]:
        hub = self._hub

        def work(tx: Tx) -> tuple[int, Fleet, dict[str, SiteDoc]]:
            generation = publish.fleet_generation(tx)
            return generation, publish.fleet_at(tx, generation), sites.documents(tx)

        generation, before, invited = await hub.database.read(work)
        after = publish.with_sites(await self._check(wanted.documents, invited), invited)
        return {"generation": generation, "changes": fleets.diff(before, after), "warnings": _warnings(after)}

    async def _apply(self, wanted: Documents) -> dict[str, Any]:
        hub, now_ns = self._hub, self._hub.clock.wall_ns()
        invited = await hub.database.read(sites.documents)
        checked = await self._check(wanted.documents, invited)

        def work(tx: Tx) -> dict[str, Any]:
            before = publish.fleet_generation(tx)
            old, after = publish.fleet_at(tx, before), publish.with_sites(checked, sites.documents(tx))
            changes = fleets.diff(old, after)
            warnings = [*_warnings(after), *artifacts.missing_for(tx, wanted.documents)]
            if not changes and before:
                return {"generation": before, "changes": [], "warnings": warnings, "rollout": None}
            rollout = next(iter(after.rollouts.values()), None)
            staged = rollout is not None and before > 0
            number = publish.apply(
                tx, checked.all(), author=wanted.author, message=wanted.message, now_ns=now_ns, everywhere=not staged
            )  # fmt: skip
            started = None
            if rollout is not None and staged:
                started = rollouts.begin(tx, number, before, rollout, after, now_ns=now_ns)
            audit.note(tx, now_ns, "applied", str(number), f"{len(changes)} changes; {wanted.message}")
            return {"generation": number, "changes": changes, "warnings": warnings, "rollout": started}

        answer = await hub.database.write(work)
        await hub.look()
        return answer

    async def _rollback(self, wanted: Rollback) -> dict[str, Any]:
        now_ns = self._hub.clock.wall_ns()

        def work(tx: Tx) -> dict[str, Any]:
            rollouts.supersede(tx, now_ns=now_ns, why="rolled back by an operator")
            number, of = publish.rollback(tx, wanted.generation, author=wanted.author, now_ns=now_ns)
            audit.note(tx, now_ns, "rolled back", str(number), f"to the documents of {of}")
            return {"generation": number, "of": of}

        answer = await self._hub.database.write(work)
        await self._hub.look()
        return answer

    async def _documents(self, query: Mapping[str, str]) -> dict[str, Any]:
        asked = query.get("generation", "")
        if asked and not asked.isdecimal():
            raise InvalidRequest(f"generation: found {asked[:20]!r}, expected a number")

        def work(tx: Tx) -> dict[str, Any]:
            number = int(asked) if asked else publish.fleet_generation(tx)
            found = [plain(kind, one) for kind, one in publish.documents(tx, number)]
            return {"generation": number, "documents": found}

        return await self._hub.database.read(work)

    # ---- sites

    async def sites_now(self) -> list[SiteStatus]:
        """How every site is, by name."""
        hub = self._hub
        now_ns, mono_ns = hub.clock.wall_ns(), hub.clock.now_ns()

        def work(tx: Tx) -> list[SiteStatus]:
            reports, numbers = ingest.reports(tx), publish.numbers(tx)
            marks = {site: int(seq) for site, seq in tx.run("SELECT site, SUM(seq) FROM marks GROUP BY site")}
            return [
                status(
                    row, reports[row.name][1] if row.name in reports else None, numbers=numbers,
                    heard_ago_ns=hub.liveness.ago_ns(row.name, mono_ns, now_ns - row.heard_ns),
                    mark=marks.get(row.name, 0),
                )
                for row in sites.everyone(tx)
            ]  # fmt: skip

        return await hub.database.read(work)

    async def _sites_call(self, method: str, rest: str, _body: bytes) -> Any:
        hub, now_ns = self._hub, self._hub.clock.wall_ns()
        name, _, action = rest.rpartition("/") if rest.endswith(("/revoke", "/admit")) else (rest, "", "")
        if method == "GET" and not action:
            found = [one for one in await self.sites_now() if one.name == name]
            if not found:
                raise NotFound(f"there is no site {name[:64]!r}; GET /v1/hub/sites lists them")
            return found[0]
        if method == "POST" and action == "revoke":

            def revoke(tx: Tx) -> int:
                publish.changed(tx)
                return enrol.revoke(tx, name, hub.authority, now_ns=now_ns)

            answer: dict[str, Any] = {"site": name, "epoch": await hub.database.write(revoke)}
        elif method == "POST" and action == "admit":

            def admit(tx: Tx) -> None:
                sessions.admit(tx, name)
                audit.note(tx, now_ns, "admitted", name, "")

            await hub.database.write(admit)
            answer = {"site": name, "admitted": True}
        else:
            raise NotFound(
                f"{method} /v1/hub/sites/{rest[:64]} does not exist; there are GET, POST …/revoke, …/admit"
            )
        await hub.look()
        return answer

    async def _invite(self, wanted: Invites) -> list[dict[str, str]]:
        hub, now_ns = self._hub, self._hub.clock.wall_ns()

        def work(tx: Tx) -> list[tuple[str, str]]:
            made = enrol.invite(tx, wanted.invitations, hub.place, hub.authority, rng=hub.rng, now_ns=now_ns)
            publish.changed(tx)
            return made

        made = await hub.database.write(work)
        await hub.look()
        return [{"site": site, "token": token} for site, token in made]

    async def _status(self) -> dict[str, Any]:
        hub = self._hub
        everyone, budgets = await self.sites_now(), await hub.database.read(self._budgets)
        frozen = [f"budget {one.name} {one.period}: {one.frozen}" for one in budgets if one.frozen]
        return {
            "fleet": hub.authority.fleet, "generation": hub.numbers.generation, "epoch": hub.numbers.epoch,
            "sites": summary(everyone), "watches": hub.watches, "urls": hub.place.urls,
            "frozen": frozen,
        }  # fmt: skip

    def _budgets(self, tx: Tx) -> list[leases.FleetBudget]:
        return leases.status(tx, publish.fleet_at(tx, publish.fleet_generation(tx)).budgets.values())

    # ---- keys and rollouts

    async def _keys_call(self, method: str, rest: str, body: bytes) -> Any:
        hub, now_ns = self._hub, self._hub.clock.wall_ns()
        if method == "GET" and not rest:
            return {"data": [_shown(key) for key in await hub.database.read(keys.everything)]}
        if method == "POST" and not rest:
            wanted = _read(body, NewFleetKey)

            def create(tx: Tx) -> dict[str, Any]:
                key, text = keys.create(tx, wanted, hub.authority.pepper, rng=hub.rng, now_ns=now_ns)
                self._keys_changed(tx, now_ns)
                audit.note(tx, now_ns, "key made", key.id, f"team {key.team}")
                return _shown(key) | {"key": text}

            answer = await hub.database.write(create)
        elif method == "DELETE" and rest:

            def revoke(tx: Tx) -> dict[str, Any]:
                keys.revoke(tx, rest, now_ns)
                self._keys_changed(tx, now_ns)
                audit.note(tx, now_ns, "key revoked", rest, "")
                return {"id": rest, "revoked": True}

            answer = await hub.database.write(revoke)
        else:
            raise NotFound(
                f"{method} /v1/hub/keys/{rest[:64]} does not exist; there are GET, POST and DELETE keys/ID"
            )
        await hub.look()
        return answer

    def _keys_changed(self, tx: Tx, now_ns: int) -> None:
        """Sites fetch when the epoch rises: with it comes the new list of keys."""
        publish.changed(tx)
        enrol.new_epoch(tx, self._hub.authority, now_ns=now_ns)

    async def _rollouts_call(self, method: str, rest: str, _body: bytes) -> Any:
        hub, now_ns = self._hub, self._hub.clock.wall_ns()
        name, _, action = rest.partition("/")
        if method == "GET" and not action:
            found = await hub.database.read(rollouts.everything)
            if not rest:
                return {"data": found}
            one = [each for each in found if str(each.id) == name]
            if not one:
                raise NotFound(f"there is no rollout {name[:20]!r}; GET /v1/hub/rollouts lists them")
            return one[0]
        if method == "POST" and action in ("pause", "resume", "abort"):
            answer = await hub.database.write(lambda tx: rollouts.steer(tx, name, action, now_ns=now_ns))
            await hub.look()
            return answer
        raise NotFound(
            f"{method} /v1/hub/rollouts/{rest[:64]} does not exist; there are GET, POST …/pause|resume|abort"
        )


def _warnings(fleet: Fleet) -> list[str]:
    """What falls away, once for each sentence and at most twenty of them."""
    found: dict[str, None] = {}
    for name in fleet.sites:
        found |= dict.fromkeys(fleets.resolve(fleet, name).warnings)
    sentences = list(found)
    return sentences[:20] + ([f"… and {len(sentences) - 20} more"] if len(sentences) > 20 else [])


def _shown(key: Any) -> dict[str, Any]:
    fields = msgspec.structs.asdict(key)
    del fields["mac"]
    return fields


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value)


def _read(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"the body: {error}") from error
