"""Administration and explanation over HTTP: `/v1/ondol/…`.

A request's own explanation, feedback on it and the nearest sites are for every caller; the rest takes an admin key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec

from ondol.core.fields import Name, Positive
from ondol.core.identity import ApiKey, Principal
from ondol.core.ports import Clock, KeyStore
from ondol.core.usage import UsageRecord
from ondol.errors import Forbidden, InvalidRequest, NotFound
from ondol.gateway.books import Books
from ondol.gateway.explain import sentence
from ondol.gateway.neighbours import Neighbours
from ondol.gateway.pipeline import Pipeline
from ondol.gateway.recall import Recall
from ondol.units import NS_PER_S


class NewKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What POST /v1/ondol/keys takes."""

    name: Annotated[str, msgspec.Meta(max_length=128)] = ""
    team: Name = "default"
    tenant: Name = "default"
    kind: Literal["user", "admin", "peer"] = "user"
    routes: tuple[Name, ...] = ()
    expires_in_s: Positive | None = None
    requests_per_min: Positive | None = None
    tokens_per_min: Positive | None = None


class Feedback(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What POST /v1/ondol/requests/{id}/feedback takes."""

    right: bool


class Pair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two questions, and whether one answer fits both."""

    cached: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    asked: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    same: bool


class Teaching(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What POST /v1/ondol/semantic/{route} takes."""

    pairs: Annotated[list[Pair], msgspec.Meta(min_length=1, max_length=1000)]
    tenant: Name = "default"


class Captures(Protocol):
    """Where captured prompts are, for debugging."""

    def get(self, request_id: str, wall_ns: int) -> Any:
        """What was captured of a request, or None.  Blocks on the disk."""
        ...


Issue = Callable[[NewKey, int], tuple[ApiKey, str]]


class Admin:
    """The handlers under `/v1/ondol/`."""

    def __init__(
        self, *, pipeline: Pipeline, books: Books, keys: KeyStore, issue: Issue, clock: Clock,
        reload: Callable[[], Awaitable[str]], captures: Captures, last_used: Callable[[], dict[str, int]],
        fleet: Callable[[], Any], neighbours: Neighbours, recall: Recall,
    ) -> None:  # fmt: skip
        """Bind the parts; `issue` makes and stores a key, `reload` reads the configuration again.

        `fleet` says how the site stands with its hub, None where it has not joined one.
        """
        self._neighbours = neighbours
        self._recall = recall
        self._fleet = fleet
        self._pipeline = pipeline
        self._books = books
        self._keys = keys
        self._issue = issue
        self._clock = clock
        self._reload = reload
        self._captures = captures
        self._last_used = last_used

    def require(self, principal: Principal) -> None:
        """Raise Forbidden unless the key is an admin key."""
        if principal.kind != "admin":
            raise Forbidden("this needs the admin key; `ondol up` writes it to up.json as admin_key")

    async def handle(self, principal: Principal, method: str, path: str, body: bytes) -> bytes:
        """The JSON answer to a request below `/v1/ondol/`.

        Raises:
            OndolError: forbidden, not found, or badly asked.
        """
        name, _, rest = path.partition("/")
        if name == "requests" and rest and method == "GET":
            return await self._request(principal, rest)
        if name == "requests" and rest.endswith("/feedback") and method == "POST":
            return await self._feedback(principal, rest.removesuffix("/feedback"), body)
        if (method, path) == ("GET", "nearest"):
            return self._nearest(principal)
        self.require(principal)
        match (method, name, rest):
            case ("GET", "keys", ""):
                return msgspec.json.encode({"data": [self._shown(key) for key in self._keys.all()]})
            case ("POST", "keys", ""):
                return await self._create(body)
            case ("DELETE", "keys", key_id) if key_id:
                return await self._revoke(key_id)
            case ("GET", "status", ""):
                return msgspec.json.encode(self._status())
            case ("GET", "budgets", ""):
                return msgspec.json.encode({"data": self._books.budgets.status(self._clock.wall_ns())})
            case ("POST", "semantic", route) if route:
                return await self._teach(route, body)
            case ("POST", "reload", ""):
                return msgspec.json.encode({"status": await self._reload()})
        raise NotFound(
            f"{method} /v1/ondol/{path[:64]} does not exist; there are requests/{{id}}, requests/{{id}}/feedback, "
            "nearest, keys, status, budgets, semantic/{route}, reload"
        )

    def _nearest(self, principal: Principal) -> bytes:
        """The sites that could answer this caller, the nearest first."""
        own = self._keys.snapshot().get(principal.key_id)
        return msgspec.json.encode(
            self._neighbours.nearest(known_only_here=own is not None and not own.fleet)
        )

    async def _record(self, principal: Principal, request_id: str) -> UsageRecord:
        record = await self._books.ledger.find(request_id[:128])
        allowed = record is not None and (
            principal.kind == "admin" or (principal.tenant, principal.team) == (record.tenant, record.team)
        )
        if record is None or not allowed:
            raise NotFound(f"no request '{request_id[:64]}' of your team is in this site's ledger")
        return record

    async def _feedback(self, principal: Principal, request_id: str, body: bytes) -> bytes:
        """Whether an answer was right, as its caller says: what was learnt from it."""
        record = await self._record(principal, request_id)
        said = _decoded(body, Feedback, "the feedback")
        learnt = "nothing"
        if record.cache == "semantic" and not said.right and self._recall.complain(record.request_id):
            learnt = "the cached answer was dropped, and counts as wrong"
        return msgspec.json.encode({"request_id": record.request_id, "right": said.right, "learnt": learnt})

    async def _teach(self, route: str, body: bytes) -> bytes:
        """Take in labelled pairs of questions for the semantic cache of a route."""
        taught = _decoded(body, Teaching, "the pairs")
        doc = self._pipeline.view.catalog.routes.get(route)
        policy = doc.cache.semantic if doc is not None and doc.cache is not None else None
        if policy is None:
            raise NotFound(f"there is no route '{route[:64]}' with `cache.semantic`")
        pairs = [(one.cached, one.asked, one.same) for one in taught.pairs]
        count = await self._recall.teach(tenant=taught.tenant, route=route, policy=policy, pairs=pairs)
        return msgspec.json.encode({"route": route, "tenant": taught.tenant, "learnt": count})

    async def _request(self, principal: Principal, rest: str) -> bytes:
        request_id, _, part = rest.partition("/")
        record = await self._record(principal, request_id)
        if part == "capture":
            self.require(principal)
            found = await asyncio.to_thread(self._captures.get, record.request_id, self._clock.wall_ns())
            if found is None:
                raise NotFound("nothing was captured of this request, or its time is over")
            return msgspec.json.encode(
                {"prompt": _text(found.prompt), "answer": _text(found.answer), "expires_ns": found.expires_ns}
            )
        return msgspec.json.encode(explained(record))

    async def _create(self, body: bytes) -> bytes:
        wanted = _decoded(body, NewKey, "the new key")
        catalog = self._pipeline.view.catalog
        for route in wanted.routes:
            if route not in catalog.routes:
                raise InvalidRequest(
                    f"'routes': there is no route '{route}'; there are {', '.join(catalog.routes)}"
                )
        if wanted.team != "default" and wanted.team not in catalog.teams:
            teams = ", ".join(catalog.teams) or "none"
            raise InvalidRequest(f"'team': there is no team '{wanted.team}'; there are: default, {teams}")
        key, text = await asyncio.to_thread(self._issue, wanted, self._clock.wall_ns())
        return msgspec.json.encode(self._shown(key) | {"key": text})

    async def _revoke(self, key_id: str) -> bytes:
        if not await asyncio.to_thread(self._keys.revoke, key_id, self._clock.wall_ns()):
            raise NotFound(f"there is no key '{key_id[:64]}'; GET /v1/ondol/keys lists them")
        return msgspec.json.encode({"id": key_id, "revoked": True})

    def _shown(self, key: ApiKey) -> dict[str, Any]:
        fields = msgspec.structs.asdict(key)
        del fields["mac"]
        return fields | {"last_used_ns": self._last_used().get(key.id)}

    def _status(self) -> dict[str, Any]:
        view, now_ns = self._pipeline.view, self._clock.now_ns()
        endpoints = []
        for one in view.endpoints.values():
            expected = one.predictor.predict(
                one.name, prompt_tokens=100, output_tokens_max=400, queue_depth=0, now_ns=now_ns
            )
            endpoints.append(
                {
                    "deployment": one.name, "engine": one.terms.deployment.engine, "site": one.site.name,
                    "simulated": one.site.simulated, "model": one.model.name, "local": one.local,
                    "problem": one.engine.problem(), "breaker": one.breaker.state_sentence(now_ns),
                    "in_flight": one.in_flight, "parallel": one.parallel, "quality": one.quality,
                    "capabilities": sorted(one.engine.capabilities),
                    "price": None if one.terms.price is None else one.terms.price.id,
                    "expected_ttft_ms": round(expected.ttft_ms, 2),
                    "expected_token_ms": round(expected.per_token_ms, 3), "samples": expected.samples,
                }
            )  # fmt: skip
        site = view.catalog.site
        return {
            "site": site.name, "tier": site.tier, "region": site.region, "grid_zone": site.grid_zone,
            "simulated": site.simulated, "catalog": view.catalog.digest, "ledger": self._books.ledger.problem() or "ok",
            "cache": self._books.cache.stats(), "semantic": self._recall.status(), "endpoints": endpoints,
            "routes": {name: [e.name for e in members] for name, members in view.routes.items()},
            "fleet": self._fleet(),
        }  # fmt: skip


D = TypeVar("D")


def _decoded(body: bytes, kind: type[D], what: str) -> D:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{what}: {error}") from error


def explained(record: UsageRecord) -> dict[str, Any]:
    """A record with its reason as sentences, as GET /v1/ondol/requests/{id} gives it."""
    english, korean = sentence(record)
    code = record.decision.code if record.decision is not None else "none"
    fields: dict[str, Any] = msgspec.to_builtins(record)
    return {"reason": {"code": code, "en": english, "ko": korean}} | fields


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def expires_at(wanted: NewKey, wall_ns: int) -> int | None:
    """When a new key ends, on the wall clock."""
    return None if wanted.expires_in_s is None else wall_ns + wanted.expires_in_s * NS_PER_S
