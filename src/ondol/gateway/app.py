"""The HTTP face of a site: RSGI in, RSGI out.  The only place that knows paths and statuses.

Everything that enters is bounded here: head, size and pace of the body, depth of the JSON, requests at
once by address.  An answer goes out as the pipeline gives it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

from ondol.core.identity import Principal
from ondol.core.inference import Task
from ondol.core.ports import Clock
from ondol.errors import (
    Draining,
    Forbidden,
    InvalidRequest,
    NotFound,
    NotServed,
    OndolError,
    Unauthenticated,
    UnknownModel,
)  # fmt: skip
from ondol.gateway.admin import Admin
from ondol.gateway.call import Ask, Chunks, Headers, Whole
from ondol.gateway.idempotency import IdempotencyStore
from ondol.gateway.once import once
from ondol.gateway.pipeline import Pipeline
from ondol.gateway.policy import may_use
from ondol.gateway.reply import JSON_HEADERS
from ondol.gateway.watch import Stopped, Watch
from ondol.wire.artifacts import PREFIX as ARTIFACTS
from ondol.wire.artifacts import ArtifactFiles, parse_path, send, serve_artifact, serve_manifest
from ondol.wire.guard import AddressGate, HeadGuard, Refusal, allowed_hosts, json_depth_ok
from ondol.wire.openai_replies import NOT_SERVED, SERVED, RouteModel, error_body, models_body
from ondol.wire.statuses import status_of

TASKS: Final = {
    "/v1/chat/completions": Task.CHAT,
    "/v1/completions": Task.COMPLETION,
    "/v1/embeddings": Task.EMBEDDING,
}
_ALLOWED: Final = (
    "authorization,cache-control,content-type,idempotency-key,x-ondol-data-class,x-ondol-objective,"
    "x-ondol-max-latency-ms,x-ondol-max-cost,x-ondol-tags"
)
_EXPOSED: Final = (
    "x-ondol-request-id,x-ondol-site,x-ondol-model,x-ondol-deployment,x-ondol-cache,x-ondol-reason,"
    "x-ondol-cost,x-ondol-energy-j,x-ondol-carbon-g,x-ondol-overhead-us,x-ratelimit-limit-requests,"
    "x-ratelimit-remaining-requests,x-ratelimit-reset-requests,x-ratelimit-limit-tokens,"
    "x-ratelimit-remaining-tokens,x-ratelimit-reset-tokens,retry-after,retry-after-ms,x-should-retry,"
    "x-ondol-idempotent"
)


class Scope(Protocol):
    """What RSGI says of a request."""

    method: str
    path: str
    client: str
    authority: str | None
    headers: Any


class App:
    """One site's RSGI application."""

    def __init__(
        self, *, pipeline: Pipeline, admin: Admin, idempotency: IdempotencyStore[asyncio.Future[None]],
        clock: Clock, metrics: Callable[[], bytes], refused: Callable[[str], None], ready: Callable[[], str | None],
        crashed: Callable[[Exception], None], files: ArtifactFiles | None = None,
    ) -> None:  # fmt: skip
        """Bind the parts.  `ready` gives None, or a sentence that says what is missing.

        `files` are the models that other sites of the fleet may fetch here.
        """
        self._files = files
        self._pipeline = pipeline
        self._admin = admin
        self._idempotency = idempotency
        self._clock = clock
        self._metrics = metrics
        self._refused = refused
        self._ready = ready
        self._crashed = crashed
        self.draining = False
        self.running = 0
        self.configure()

    def configure(self) -> None:
        """Take limits, hosts and CORS from the pipeline's present view; called again after a reload."""
        gateway = self._pipeline.view.catalog.gateway
        self._limits = gateway.limits
        self._guard = HeadGuard(allowed_hosts(gateway.listen, gateway.hosts), gateway.limits)
        self._gate = AddressGate(gateway.limits.requests_per_address)
        self._cors = gateway.cors

    async def __rsgi__(self, scope: Scope, proto: Any) -> None:
        """Serve one request."""
        received_ns = self._clock.now_ns()
        headers = scope.headers
        refusal = self._guard.check(
            scope.method, scope.path, scope.authority, headers.items(), headers.keys()
        )
        refusal = refusal or self._gate.enter(scope.client)
        if refusal is not None:
            self._refuse(proto, refusal, [])
            return
        gate = self._gate
        self.running += 1
        try:
            await self._serve(scope, proto, received_ns)
        finally:
            self.running -= 1
            gate.leave(scope.client)

    async def _serve(self, scope: Scope, proto: Any, received_ns: int) -> None:
        cors = self._cors_headers(scope) if self._cors.origins else []
        task = TASKS.get(scope.path)
        try:
            if task is not None and scope.method == "POST":
                await self._inference(task, scope, proto, received_ns, cors)
            elif self._files is not None and scope.path.startswith(ARTIFACTS):
                await self._artifact(self._files, scope, proto)
            elif scope.method == "OPTIONS" and cors:
                proto.response_empty(204, [*cors, *self._preflight()])
            else:
                reply = await self._other(scope, proto)
                proto.response_bytes(reply.status, [*reply.headers, *cors], reply.body)
        except Stopped as stopped:
            self._refuse(proto, stopped.refusal, cors)
        except OndolError as error:
            self._fail(proto, error, cors)
        except Exception as error:  # a task's top: logged, counted, and answered where nothing went out yet
            self._crashed(error)
            self._fail(proto, OndolError("something went wrong in the gateway; its log has the reason"), cors)

    async def _inference(self, task: Task, scope: Scope, proto: Any, received_ns: int, cors: Headers) -> None:
        header = dict(scope.headers.items()).get
        watch = Watch(proto, self._clock)
        reply: Whole | Chunks | None = None
        try:
            # The key first: whoever has none gets no megabytes read.
            wall_ns = self._clock.wall_ns()
            principal = self._pipeline.principal(header, wall_ns)
            if self.draining:
                raise Draining(
                    "this gateway is stopping; ask another, or again in a moment", retry_after_s=2.0
                )
            raw = await watch.body(header("content-length"), self._limits, received_ns)
            if not json_depth_ok(raw, self._limits.json_depth):
                raise InvalidRequest(f"the JSON nests deeper than {self._limits.json_depth} levels")
            ask = Ask(task=task, raw=raw, header=header, received_ns=received_ns, wall_ns=wall_ns)
            key = header("idempotency-key")
            if key is None:
                reply = await self._pipeline.handle(ask, principal)
            else:
                reply = await once(self._idempotency, key, ask, principal, self._pipeline.handle)
            if isinstance(reply, Whole):
                proto.response_bytes(reply.status, [*reply.headers, *cors], reply.body)
            else:
                await self._send(proto, reply, cors)
        except asyncio.CancelledError:
            if not watch.gone:
                raise
        finally:
            watch.stop()
            if isinstance(reply, Chunks):
                reply.close()

    async def _send(self, proto: Any, reply: Chunks, cors: Headers) -> None:
        transport = proto.response_stream(200, [*reply.headers, *cors])
        send = transport.send_bytes
        try:
            async for piece in reply.pieces:
                await send(piece)
        except RuntimeError as error:
            # RSGIProtocolClosed: the client has gone; `close` then stops the engine and meters.
            if type(error).__name__ != "RSGIProtocolClosed":
                raise

    async def _artifact(self, files: ArtifactFiles, scope: Scope, proto: Any) -> None:
        """A model file for another site of the fleet, or for an administrator."""
        principal = self._pipeline.principal(scope.headers.get, self._clock.wall_ns())
        if principal.kind not in ("peer", "admin"):
            raise Forbidden("models are for other sites of the fleet")
        asked = parse_path(scope.path)
        if asked is None or scope.method not in ("GET", "HEAD"):
            raise NotFound(f"{scope.method} {scope.path[:120]}: expected GET {ARTIFACTS}sha256:…, or …/data")
        digest, data = asked
        if data:
            served = await asyncio.to_thread(serve_artifact, files, digest, scope.headers.get("range"))
        else:
            served = await asyncio.to_thread(serve_manifest, files, digest)
        send(served, scope.method, proto)

    async def _other(self, scope: Scope, proto: Any) -> Whole:
        """Everything but inference."""
        path, method = scope.path, scope.method
        if path == "/healthz" and method in ("GET", "HEAD"):
            return Whole(headers=JSON_HEADERS, body=b'{"status":"ok"}')
        if path == "/readyz" and method in ("GET", "HEAD"):
            return self._readiness()
        if path in TASKS:
            raise InvalidRequest(f"{path} takes POST, found {method}")
        first = path.split("/")[2] if path.startswith("/v1/") else ""
        if first in NOT_SERVED:
            raise NotServed(f"{method} {path} is not served by this gateway; served are: {', '.join(SERVED)}")
        if path == "/" and method in ("GET", "HEAD"):
            return Whole(
                headers=JSON_HEADERS, body=b'{"ondol":"an inference gateway","api":"/v1","health":"/healthz"}'
            )
        principal = self._pipeline.principal(scope.headers.get, self._clock.wall_ns())
        if path == "/v1/models" and method == "GET":
            return Whole(headers=JSON_HEADERS, body=models_body(self._models(principal)))
        if path.startswith("/v1/models/") and method == "GET":
            return self._model(principal, path.removeprefix("/v1/models/"))
        if path == "/metrics" and method == "GET":
            self._admin.require(principal)
            return Whole(
                headers=[("content-type", "text/plain; version=0.0.4; charset=utf-8")], body=self._metrics()
            )
        if path.startswith("/v1/ondol/"):
            body = await self._small_body(scope, proto) if method == "POST" else b""
            answer = await self._admin.handle(principal, method, path.removeprefix("/v1/ondol/"), body)
            return Whole(headers=JSON_HEADERS, body=answer)
        raise NotFound(f"{method} {path} does not exist; served are: {', '.join(SERVED)}")

    async def _small_body(self, scope: Scope, proto: Any) -> bytes:
        watch = Watch(proto, self._clock)
        try:
            return await watch.body(scope.headers.get("content-length"), self._limits, self._clock.now_ns())
        finally:
            watch.stop()

    def _readiness(self) -> Whole:
        problem = "draining" if self.draining else self._ready()
        if problem is None:
            return Whole(headers=JSON_HEADERS, body=b'{"status":"ready"}')
        body = error_body(message=problem, kind="server_error", code="not_ready")
        return Whole(status=503, headers=JSON_HEADERS, body=body)

    def _models(self, principal: Principal) -> list[RouteModel]:
        catalog = self._pipeline.view.catalog
        owner = catalog.site.name
        routes = (one for one in catalog.routes.values() if may_use(one, principal))
        return [RouteModel(id=one.name, created=0, owned_by=owner) for one in routes]

    def _model(self, principal: Principal, name: str) -> Whole:
        for one in self._models(principal):
            if one.id == name:
                return Whole(headers=JSON_HEADERS, body=msgspec.json.encode(one))
        raise UnknownModel(
            f"the model '{name[:128]}' does not exist; GET /v1/models lists what does", param="model"
        )

    def _cors_headers(self, scope: Scope) -> Headers:
        origin = scope.headers.get("origin")
        allowed = self._cors.origins
        if origin is None or not ("*" in allowed or origin in allowed):
            return []
        return [
            ("access-control-allow-origin", origin),
            ("access-control-expose-headers", _EXPOSED),
            ("vary", "origin"),
        ]

    def _preflight(self) -> Headers:
        return [
            ("access-control-allow-methods", "GET, POST, DELETE, OPTIONS"),
            ("access-control-allow-headers", _ALLOWED),
            ("access-control-max-age", str(self._cors.max_age_s)),
        ]  # fmt: skip

    def _refuse(self, proto: Any, refusal: Refusal, cors: Headers) -> None:
        self._refused(refusal.code)
        body = error_body(message=refusal.message, kind="invalid_request_error", code=refusal.code)
        proto.response_bytes(refusal.status, [*JSON_HEADERS, ("connection", "close"), *cors], body)

    def _fail(self, proto: Any, error: OndolError, cors: Headers) -> None:
        self._refused(error.code)
        status = status_of(error)
        headers: Headers = [*JSON_HEADERS, *cors, *error.headers]
        if error.retry_after_s is not None:
            headers.append(("retry-after", str(max(1, -int(-error.retry_after_s // 1)))))
            headers.append(("retry-after-ms", str(max(1, int(error.retry_after_s * 1000)))))
        if error.request_id is not None:
            headers.append(("x-ondol-request-id", error.request_id))
        if isinstance(error, Unauthenticated):
            headers.append(("www-authenticate", 'Bearer realm="ondol"'))
        if not error.retryable and status >= 400:
            headers.append(("x-should-retry", "false"))
        body = error_body(message=error.message, kind=_kind(status), code=error.code, param=error.param)
        proto.response_bytes(status, headers, body)


def _kind(status: int) -> str:
    """OpenAI's `type` of an error."""
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
