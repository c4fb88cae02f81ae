"""The hub's HTTP face on bodies that come slowly, too long, or not whole; the server's side is played."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from tests.unit.hub.conftest import Fleet
from tests.unit.hub.test_admin import check

from ondol.hub import app as face
from ondol.hub.admin import HubAdmin
from ondol.hub.app import HubApp
from ondol.hub.files import HubFiles
from ondol.units import NS_PER_S
from ondol.wire import sync

pytestmark = pytest.mark.anyio
KEY = "k" * 40
HOST = "127.0.0.1:8443"


class NoFiles:
    """No artifact is here."""

    def manifest(self, digest: str) -> bytes | None:
        return None

    def find(self, digest: str) -> tuple[str, int] | None:
        return None


class Scope:
    """What the server says of a request."""

    def __init__(self, method: str, path: str, **headers: str) -> None:
        self.method, self.path, self.client, self.authority = method, path, "127.0.0.1:5", None
        self.query_string = ""
        self.headers = {"host": HOST, **{name.replace("_", "-"): text for name, text in headers.items()}}


class Proto:
    """The server's side of one request; `parts` come and then, where `hangs`, nothing more."""

    def __init__(self, *parts: bytes, hangs: bool = False) -> None:
        self._parts, self._hangs = parts, hangs
        self.status, self.body = 0, b""
        self.headers: dict[str, str] = {}

    async def __call__(self) -> bytes:
        if self._hangs:
            await asyncio.Event().wait()
        return b"".join(self._parts)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part
        if self._hangs:
            await asyncio.Event().wait()

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status, self.headers, self.body = status, dict(headers), body

    @property
    def code(self) -> str:
        found: str = msgspec.json.decode(self.body)["error"]["code"]
        return found


class RealTime:
    """The clock of the event loop, for what waits."""

    def now_ns(self) -> int:
        return int(asyncio.get_running_loop().time() * NS_PER_S)

    def wall_ns(self) -> int:
        return 1_800_000_000 * NS_PER_S


class Face:
    """A hub's face, and what was logged."""

    def __init__(self, fleet: Fleet) -> None:
        self.crashes: list[Exception] = []
        self.problem: str | None = None

        async def in_thread(work: Any, *args: Any) -> Any:
            return work(*args)

        async def metrics() -> bytes:
            return b"m 1\n"

        self.app = HubApp(
            hub=fleet.hub, admin=HubAdmin(fleet.hub, check), admin_key=KEY, ca_pem=b"pem", hosts=frozenset({HOST}),
            files=HubFiles(NoFiles(), in_thread), metrics=metrics, crashed=self.crashes.append,
            ready=lambda: self.problem,
        )  # fmt: skip

    async def __call__(self, scope: Scope, proto: Proto | None = None) -> Proto:
        proto = proto or Proto()
        await self.app.__rsgi__(scope, proto)
        assert self.app.running == 0
        return proto


@pytest.fixture
def ask(fleet: Fleet) -> Face:
    return Face(fleet)


def admin(method: str, path: str, **headers: str) -> Scope:
    return Scope(method, path, authorization=f"Bearer {KEY}", **headers)


async def test_a_body_that_stops_coming_is_given_up(
    fleet: Fleet, ask: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(face, "PACE", msgspec.structs.replace(face.PACE, body_grace_s=0.02))
    fleet.hub.clock = RealTime()
    slow = await ask(admin("POST", "/v1/hub/apply", content_length="100"), Proto(b"{", hangs=True))
    assert (slow.status, slow.code) == (408, "body_too_slow")
    slow = await ask(admin("POST", "/v1/hub/apply"), Proto(b"{", hangs=True))
    assert (slow.status, slow.code) == (408, "body_too_slow")
    slow = await ask(Scope("POST", "/v1/sync/join", content_length="100"), Proto(hangs=True))
    said = sync.decode(slow.body, sync.Error)
    assert (slow.status, said.code) == (408, "body_too_slow")
    assert said.hub_ns == fleet.hub.clock.wall_ns()


async def test_a_body_that_is_too_long_or_broke_off_is_refused(ask: Face) -> None:
    large = await ask(admin("POST", "/v1/hub/rollback"), Proto(*[b" " * 300_000] * 4))
    assert (large.status, large.code) == (413, "request_too_large")
    large = await ask(admin("POST", "/v1/hub/rollback", content_length="1048577"))
    assert large.status == 413
    for proto in (Proto(b"{}", b"", b""), Proto(b"{}")):
        length = {} if len(proto._parts) == 3 else {"content_length": "3"}
        broken = await ask(admin("POST", "/v1/hub/rollback", **length), proto)
        assert (broken.status, broken.code) == (400, "body_broken")
    whole = await ask(admin("POST", "/v1/hub/rollback"), Proto(b"{", b"}"))
    assert (whole.status, whole.code) == (404, "not_found")  # there is nothing to go back to


async def test_who_has_no_key_gets_no_body_read(ask: Face) -> None:
    for path in ("/v1/hub/apply", "/v1/sync/usage", "/v1/sync/watch", "/v1/hub/models/begin"):
        refused = await ask(Scope("POST", path, content_length="100"), Proto(hangs=True))
        assert refused.status == 401, path


async def test_a_key_of_any_bytes_is_compared_and_refused(ask: Face) -> None:
    for key in ("", "Bearer", "Bearer ", "Bearer " + KEY + " ", "bearer", "Bearer \u00fc"):
        assert (await ask(Scope("GET", "/v1/hub/sites", authorization=key))).status == 401
    assert (await ask(admin("GET", "/v1/hub/sites"))).status == 200


async def test_health_readiness_and_the_end(ask: Face) -> None:
    assert (await ask(Scope("GET", "/readyz"))).status == 200
    ask.problem = "the disk is full"
    away = await ask(Scope("GET", "/readyz"))
    assert (away.status, away.headers["retry-after"]) == (503, "1")
    assert b"the disk is full" in away.body
    ask.app.draining = True
    assert (await ask(Scope("GET", "/healthz"))).status == 200
    assert (await ask(admin("GET", "/v1/hub/sites"))).code == "draining"
    said = sync.decode((await ask(Scope("POST", "/v1/sync/hello"))).body, sync.Error)
    assert (said.code, said.retry_after_s) == ("draining", 1.0)


async def test_what_nobody_foresaw_is_answered_and_logged(ask: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(HubAdmin, "_status", broken)
    answer = await ask(admin("GET", "/v1/hub/status"))
    assert (answer.status, answer.code) == (500, "internal_error")
    assert b"secret detail" not in answer.body
    assert [str(one) for one in ask.crashes] == ["secret detail"]


async def test_a_revoked_site_gets_no_file(fleet: Fleet, ask: Face) -> None:
    site = await fleet.joined("shop-1")
    path = f"/v1/artifacts/sha256:{'0' * 64}"
    assert (await ask(Scope("GET", path))).status == 401
    assert (await ask(Scope("GET", path, authorization=site.header))).status == 404
    assert (await ask(admin("POST", "/v1/hub/sites/shop-1/revoke"), Proto(b"{}"))).status == 200
    assert (await ask(Scope("GET", path, authorization=site.header))).status == 403
