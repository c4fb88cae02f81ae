"""The HTTP face of a hub: RSGI in, RSGI out.  The only place in the hub that knows paths and statuses.

Everything that enters is bounded: head, size and time of a body, requests at once by address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from hmac import compare_digest
from typing import Any, Final, Protocol
from urllib.parse import parse_qsl

import msgspec

from ondol.core.catalog import Limits
from ondol.errors import Draining, InvalidRequest, NotFound, OndolError, StateUnavailable, Unauthenticated
from ondol.hub.admin import HubAdmin
from ondol.hub.service import Hub
from ondol.units import NS_PER_S
from ondol.wire import sync
from ondol.wire.guard import AddressGate, BodyMeter, HeadGuard, Refusal, json_depth_ok
from ondol.wire.statuses import status_of

BODY_MAX: Final = {"usage": 8 * 1024 * 1024, "apply": 8 * 1024 * 1024, "diff": 8 * 1024 * 1024}
BODY_MAX_OTHER: Final = 1024 * 1024
JOIN_BODY_MAX: Final = 64 * 1024
"""Of the one call that anybody may make; all others show who they are before their body is read."""
PACE: Final = Limits(body_bytes_per_s=8 * 1024, body_grace_s=15.0)
"""A body must be there after 15 s, or later by a second for each 8 KiB that have come."""
JSON_DEPTH_MAX: Final = 32
_GONE: Final = "RSGIProtocolClosed"
"""The server's error, which it does not name in public, where the client has hung up."""
_JSON: Final = [("content-type", "application/json"), ("cache-control", "no-store")]
_SYNC: Final = [("content-type", sync.CONTENT_TYPE)]
Headers = list[tuple[str, str]]


class Stopped(Exception):
    """A body was refused while it was read."""

    def __init__(self, refusal: Refusal) -> None:
        """Keep why."""
        super().__init__(refusal.message)
        self.refusal = refusal


class Files(Protocol):
    """Who answers for models: below `/v1/artifacts/` for sites, and what operators upload."""

    async def answer(self, method: str, path: str, headers: Any, proto: Any) -> None:
        """Serve one request whose caller was let in."""
        ...


class HubApp:
    """One hub's RSGI application."""

    def __init__(
        self, *, hub: Hub, admin: HubAdmin, admin_key: str, ca_pem: bytes, hosts: frozenset[str], files: Files,
        metrics: Callable[[], Awaitable[bytes]], crashed: Callable[[Exception], None], ready: Callable[[], str | None],
        requests_per_address: int = 4096,
    ) -> None:  # fmt: skip
        """Bind the parts.  `hosts` are the names that the hub is called by; `ready` gives None, or what is amiss."""
        self._hub = hub
        self._admin = admin
        self._admin_key = admin_key.encode()
        self._ca_pem = ca_pem
        self._files = files
        self._metrics = metrics
        self._crashed = crashed
        self._ready = ready
        self._guard = HeadGuard(hosts, Limits())
        self._gate = AddressGate(requests_per_address)
        self.draining = False
        self.running = 0

    async def __rsgi__(self, scope: Any, proto: Any) -> None:
        """Serve one request."""
        headers = scope.headers
        refusal = self._guard.check(
            scope.method, scope.path, scope.authority, headers.items(), headers.keys()
        )
        refusal = refusal or self._gate.enter(scope.client)
        if refusal is not None:
            _refuse(proto, refusal)
            return
        self.running += 1
        try:
            await self._serve(scope, proto)
        finally:
            self.running -= 1
            self._gate.leave(scope.client)

    async def _serve(self, scope: Any, proto: Any) -> None:
        is_sync = scope.path.startswith(sync.PREFIX)
        try:
            if self.draining and scope.path != "/healthz":
                raise Draining("this hub is stopping; ask again in a moment", retry_after_s=1.0)
            if is_sync:
                await self._sync(scope, proto, scope.path.removeprefix(sync.PREFIX))
            else:
                await self._other(scope, proto)
        except OndolError as error:
            self._fail(proto, error, is_sync=is_sync)
        except Stopped as stopped:
            refusal = stopped.refusal
            self._say(proto, refusal.status, refusal.code, refusal.message, is_sync=is_sync)
        except TimeoutError:  # of an upload, which has its own bound
            self._say(proto, 408, "body_too_slow", "the body did not come in time", is_sync=is_sync)
        except Exception as error:  # a task's top: logged, counted, and answered
            if type(error).__name__ == _GONE:
                return  # the line broke while a body was on its way
            self._crashed(error)
            self._fail(
                proto, OndolError("something went wrong in the hub; its log has the reason"), is_sync=is_sync
            )

    async def _sync(self, scope: Any, proto: Any, name: str) -> None:
        if scope.method != "POST":
            raise InvalidRequest(f"{scope.path[:64]} takes POST, found {scope.method}")
        authorization = scope.headers.get("authorization")
        if name == "join":
            body = await self._body(scope, proto, JOIN_BODY_MAX)
        else:
            self._hub.authenticate(authorization)
            body = await self._body(scope, proto, BODY_MAX.get(name, BODY_MAX_OTHER))
        if name == "watch":
            await self._watch(proto, authorization, body)
            return
        proto.response_bytes(200, _SYNC, await self._hub.handle(name, authorization, body))

    async def _watch(self, proto: Any, authorization: str | None, body: bytes) -> None:
        async with aclosing(self._hub.watch(authorization, body)) as lines:  # type: ignore[type-var]
            first = await anext(lines)  # before the head goes out: a refusal has a status of its own
            transport = proto.response_stream(200, [("content-type", "application/x-ndjson")])
            gone = asyncio.ensure_future(proto.client_disconnect())
            try:
                await transport.send_bytes(first)
                while not self.draining:
                    line = asyncio.ensure_future(anext(lines, None))
                    await asyncio.wait({line, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if not line.done():
                        line.cancel()
                        await asyncio.gather(line, return_exceptions=True)
                        return
                    said = line.result()
                    if said is None:
                        return
                    await transport.send_bytes(said)
            except RuntimeError as error:
                if type(error).__name__ != _GONE:
                    raise
            finally:
                gone.cancel()

    async def _other(self, scope: Any, proto: Any) -> None:
        path, method = scope.path, scope.method
        if path == "/healthz" and method in ("GET", "HEAD"):
            proto.response_bytes(200, _JSON, b'{"status":"ok"}')
        elif path == "/readyz" and method in ("GET", "HEAD"):
            problem = self._ready()
            if problem is not None:
                raise StateUnavailable(problem, retry_after_s=1.0)
            proto.response_bytes(200, _JSON, b'{"status":"ready"}')
        elif path == "/v1/hub/ca" and method == "GET":
            proto.response_bytes(200, [("content-type", "application/x-pem-file")], self._ca_pem)
        elif path.startswith("/v1/artifacts/"):
            await self._hub.let_in(scope.headers.get("authorization"))
            await self._files.answer(method, path, scope.headers, proto)
        else:
            await self._administration(scope, proto)

    async def _administration(self, scope: Any, proto: Any) -> None:
        path, method = scope.path, scope.method
        given = (scope.headers.get("authorization") or "").encode()
        if not compare_digest(given, b"Bearer " + self._admin_key):
            raise Unauthenticated(
                "this needs the hub's admin key: `authorization: Bearer …`, from the file data/admin.key of the hub"
            )
        if path == "/metrics" and method == "GET":
            proto.response_bytes(
                200, [("content-type", "text/plain; version=0.0.4; charset=utf-8")], await self._metrics()
            )
            return
        if path.startswith("/v1/hub/models/"):
            await self._files.answer(method, path, scope.headers, proto)
            return
        if not path.startswith("/v1/hub/"):
            raise NotFound(
                f"{method} {path[:64]} does not exist; there are /v1/hub/…, /v1/sync/…, /healthz, /metrics"
            )
        name = path.removeprefix("/v1/hub/")
        body = await self._body(scope, proto, BODY_MAX.get(name, BODY_MAX_OTHER)) if method == "POST" else b""
        if not json_depth_ok(body, JSON_DEPTH_MAX):
            raise InvalidRequest(f"the JSON nests deeper than {JSON_DEPTH_MAX} levels")
        query = dict(parse_qsl(getattr(scope, "query_string", "") or "", max_num_fields=20))
        answer = await self._admin.handle(method, name, query, body)
        proto.response_bytes(200, _JSON, answer)

    async def _body(self, scope: Any, proto: Any, limit: int) -> bytes:
        """The whole body, within its bound and its time."""
        length = scope.headers.get("content-length")
        clock = self._hub.clock
        meter = BodyMeter(msgspec.structs.replace(PACE, body_bytes=limit), clock.now_ns(), length)
        _stop(meter.begin())
        try:
            if length is not None:
                async with asyncio.timeout(meter.patience_ns(clock.now_ns(), int(length)) / NS_PER_S):
                    whole: bytes = await proto()
                _stop(meter.feed(whole) or meter.finish())
                return whole
            parts: list[bytes] = []
            chunks = aiter(proto)
            while True:
                try:
                    async with asyncio.timeout(meter.patience_ns(clock.now_ns()) / NS_PER_S):
                        # Not `anext(chunks, default)`: on granian's iterator that ends the process (CPython 3.11).
                        part = await chunks.__anext__()
                except StopAsyncIteration:
                    _stop(meter.finish())
                    return b"".join(parts)
                _stop(meter.feed(part))
                parts.append(part)
        except TimeoutError as error:
            raise Stopped(meter.too_slow()) from error

    def _fail(self, proto: Any, error: OndolError, *, is_sync: bool) -> None:
        code = (getattr(error, "why", "") or error.code) if is_sync else error.code
        self._say(
            proto, status_of(error), code, error.message, is_sync=is_sync, retry_after_s=error.retry_after_s,
            param=error.param,
        )  # fmt: skip

    def _say(
        self, proto: Any, status: int, code: str, message: str, *, is_sync: bool, retry_after_s: float | None = None,
        param: str | None = None,
    ) -> None:  # fmt: skip
        headers: Headers = (
            [] if retry_after_s is None else [("retry-after", str(max(1, -int(-retry_after_s // 1))))]
        )
        if is_sync:
            said = sync.Error(
                code=code, message=message, retry_after_s=retry_after_s, hub_ns=self._hub.clock.wall_ns()
            )
            proto.response_bytes(status, [*_SYNC, *headers], sync.encode(said))
            return
        body = msgspec.json.encode({"error": {"code": code, "message": message, "param": param}})
        proto.response_bytes(status, [*_JSON, *headers], body)


def _stop(refusal: Refusal | None) -> None:
    if refusal is not None:
        raise Stopped(refusal)


def _refuse(proto: Any, refusal: Refusal) -> None:
    body = msgspec.json.encode({"error": {"code": refusal.code, "message": refusal.message}})
    proto.response_bytes(refusal.status, [*_JSON, ("connection", "close")], body)
