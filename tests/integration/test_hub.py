"""A real hub over TLS: what it takes and refuses, and hundreds of sites that watch it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import shutil
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.hubs import FLEET, HUB, Hub, running_hub, until
from tests.sites import free_port

from ondol.adapters.link import HttpsLink
from ondol.core import dsse
from ondol.core.invites import parse_token
from ondol.core.trust import HUB as HUB_AUDIENCE
from ondol.core.trust import Trust, authorization, read_credential
from ondol.wire import sync

WATCHES = 200


class Reply(msgspec.Struct):
    """One HTTP answer."""

    status: int
    body: bytes

    @property
    def code(self) -> str:
        """The stable code of an error, of either face."""
        if self.body.startswith(b"{"):
            found: str = msgspec.json.decode(self.body)["error"]["code"]
            return found
        return sync.decode(self.body, sync.Error).code


def pinned(hub: Hub) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(hub.folder / "data" / "ca.pem"))


class Wire:
    """One connection to a hub."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._http = http.client.HTTPSConnection("127.0.0.1", hub.port, timeout=60, context=pinned(hub))

    def ask(self, method: str, path: str, body: bytes | None = None, auth: str | None = None) -> Reply:
        headers = {} if auth is None else {"authorization": auth}
        self._http.request(method, path, body=body, headers=headers)
        with self._http.getresponse() as reply:
            return Reply(reply.status, reply.read())

    def admin(self, method: str, path: str, body: Any = None) -> Reply:
        raw = None if body is None else msgspec.json.encode(body)
        return self.ask(method, path, raw, f"Bearer {self.hub.admin_key}")

    def say(self, name: str, message: sync.Message, auth: str | None = None) -> Reply:
        return self.ask("POST", sync.PREFIX + name, sync.encode(message), auth)

    def close(self) -> None:
        self._http.close()


@contextlib.contextmanager
def wire_to(hub: Hub) -> Iterator[Wire]:
    wire = Wire(hub)
    try:
        yield wire
    finally:
        wire.close()


class Member:
    """A site that has joined, by hand."""

    def __init__(self, wire: Wire, token: str, name: str) -> None:
        self.name, self.private = name, dsse.new_private_key()
        proof = parse_token(token).proof
        reply = wire.say("join", sync.Join(token=proof, key=dsse.public_key(self.private), site=name))
        assert reply.status == 200, reply.body
        self.joined = sync.decode(reply.body, sync.JoinReply)
        self.instance = f"instance{name.replace('-', '')}"

    def header(self) -> str:
        return authorization(
            self.private, self.joined.credential, site=self.name, audience=HUB_AUDIENCE, now_ns=self.joined.hub_ns
        )  # fmt: skip

    def hello(self, wire: Wire) -> sync.HelloReply:
        message = sync.Hello(
            boot=1, instance=self.instance, gateway=f"gw-{self.name}", generation=0, epoch=0, acknowledged=0,
            wall_ns=self.joined.hub_ns,
        )  # fmt: skip
        reply = wire.say("hello", message, self.header())
        assert reply.status == 200, reply.body
        return sync.decode(reply.body, sync.HelloReply)


def doc_of(name: str) -> dict[str, str]:
    return {"name": name, "tier": "edge", "region": "kr-seoul", "country": "KR", "grid_zone": "KR"}


def members(wire: Wire, count: int) -> list[Member]:
    invitation = {"doc": doc_of("shop"), "count": count + 1}
    made = wire.admin("POST", "/v1/hub/invites", {"invitations": [invitation]})
    token = msgspec.json.decode(made.body)["data"][0]["token"]
    found = [Member(wire, token, f"shop-{number}") for number in range(count)]
    for one in found:
        assert one.hello(wire).wait_s == 0
    return found


def rss_kib(hub: Hub) -> int:
    status = Path(f"/proc/{hub.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def test_the_front_door(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub, wire_to(hub) as wire:
        assert wire.ask("GET", "/healthz").status == 200
        assert wire.ask("GET", "/readyz").body == b'{"status":"ready"}'
        assert wire.ask("GET", "/v1/hub/ca").body == (hub.folder / "data" / "ca.pem").read_bytes()
        for path in ("/v1/hub/sites", "/metrics", "/v1/nothing", "/"):
            refused = wire.ask("GET", path)
            assert (refused.status, refused.code) == (401, "invalid_api_key")
        for key in ("", "Bearer", "Bearer ", f"Bearer {hub.admin_key}x", f"Basic {hub.admin_key}"):
            assert wire.ask("GET", "/v1/hub/sites", auth=key).status == 401
        hub.invite("shop-1")
        metrics = wire.admin("GET", "/metrics").body
        assert b"ondol_hub_watches 0.0" in metrics
        assert b'ondol_hub_sites{state="never"} 1.0' in metrics
        for method, path in (
            ("GET", "/v1/hub/nothing"),
            ("GET", "/v1/nothing"),
            ("PUT", "/v1/hub/apply"),
            ("GET", "/v1/hub/sites/nobody"),
            ("POST", "/v1/hub/sites/nobody/revoke"),
            ("DELETE", "/v1/hub/keys/none"),
            ("GET", "/v1/hub/rollouts/7"),
        ):
            answer = wire.admin(method, path, {} if method == "POST" else None)
            assert answer.status in (404, 405), (method, path, answer.body)
        wrong: tuple[Any, ...] = ([], {"documents": 3}, {"documents": [], "more": 1})
        for body in wrong:
            assert wire.admin("POST", "/v1/hub/apply", body).code == "invalid_request"
        nested = wire.ask("POST", "/v1/hub/apply", b"[" * 40 + b"]" * 40, f"Bearer {hub.admin_key}")
        assert "nests deeper" in nested.body.decode()
        assert wire.ask("GET", "/v1/sync/hello").code == "invalid_request"


def test_nothing_older_than_tls_1_3_is_spoken(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        old = pinned(hub)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(("127.0.0.1", hub.port)) as plain, pytest.raises(ssl.SSLError):
            old.wrap_socket(plain, server_hostname="127.0.0.1")
        with (
            socket.create_connection(("127.0.0.1", hub.port)) as plain,
            pinned(hub).wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            assert secure.version() == "TLSv1.3"


def test_secrets_of_a_hub_are_its_users_alone(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        for name in ("admin.key", "hub.key", "pepper.key", "ca.key", "tls.key", "hub.db"):
            assert (hub.folder / "data" / name).stat().st_mode & 0o077 == 0, name
        assert hub.admin_key not in hub.log


def test_who_proves_nothing_is_told_so_and_the_hubs_time(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub, wire_to(hub) as wire:
        (site,) = members(wire, 1)
        fetch = sync.Fetch(instance=site.instance)
        assert wire.say("desired", fetch, site.header()).status == 200
        credential, _, proof = site.header().partition("~")
        for forged in (
            f"{credential}~{proof[:-6]}AAAAAA",
            f"{credential[:-6]}AAAAAA~{proof}",
            f"{credential}~{credential.partition(' ')[2]}",
            "Ondol-Site ~",
        ):
            with wire_to(hub) as other:
                refused = other.say("desired", fetch, forged)
                said = sync.decode(refused.body, sync.Error)
                assert (refused.status, said.code) == (401, "invalid_api_key")
                assert said.hub_ns >= site.joined.hub_ns
        assert wire.ask("POST", "/v1/sync/desired", b"\xc1", site.header()).code == "invalid_request"
        assert wire.say("nothing", fetch, site.header()).status == 404
        stranger = sync.Fetch(instance="strangerstranger")
        assert wire.say("desired", stranger, site.header()).status == 409
        trust = Trust(fleet="test-fleet", keys=site.joined.hub_keys)
        assert read_credential(site.joined.credential, trust).site == "shop-0"


def test_a_body_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        with wire_to(hub) as wire:
            (site,) = members(wire, 1)
        header, length = site.header(), 9 * 1024 * 1024
        for head, status in (
            (f"POST /v1/sync/usage HTTP/1.1\r\nauthorization: {header}", b"413"),
            ("POST /v1/sync/usage HTTP/1.1", b"401"),
            ("POST /v1/sync/join HTTP/1.1", b"413"),
            (f"POST /v1/hub/apply HTTP/1.1\r\nauthorization: Bearer {hub.admin_key}", b"413"),
        ):
            # Not a byte of the body is sent: the answer does not wait for any.
            with (
                socket.create_connection(("127.0.0.1", hub.port), timeout=30) as plain,
                pinned(hub).wrap_socket(plain, server_hostname="127.0.0.1") as secure,
            ):
                secure.sendall(
                    f"{head}\r\nhost: 127.0.0.1:{hub.port}\r\ncontent-length: {length}\r\n\r\n".encode()
                )
                assert secure.recv(4096).split()[1] == status, head


def test_two_hundred_sites_watch(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        idle_kib = rss_kib(hub)
        with wire_to(hub) as wire:
            sites = members(wire, WATCHES)
        print(f"resident: {idle_kib // 1024} MiB idle, {rss_kib(hub) // 1024} MiB with {WATCHES} sites")
        asyncio.run(_watch_all(hub, sites, tmp_path))
        hub.restart()
        until(lambda: hub.client.get("status")["watches"] == 0, "no watch is left")


async def _watch_all(hub: Hub, sites: list[Member], folder: Path) -> None:
    """All hear of a generation, one hears that it is out, and all hear when the hub stops."""
    ca_pem = (hub.folder / "data" / "ca.pem").read_text()
    seen: dict[str, int] = {}
    ended: set[str] = set()

    async def watch(site: Member) -> None:
        link = HttpsLink([hub.url], ca_pem=ca_pem, authorization=site.header)
        body = sync.encode(sync.Watch(instance=site.instance))
        try:
            async for line in link.watch(body, silence_s=sync.SILENCE_S):
                seen[site.name] = msgspec.json.decode(line, type=sync.Announcement).generation
        finally:
            ended.add(site.name)
            await link.close()

    async def everybody(what: str, generation: int, count: int) -> None:
        async with asyncio.timeout(60):
            while sum(one == generation for one in seen.values()) < count:  # noqa: ASYNC110  # a test may look
                await asyncio.sleep(0.02)
        assert len(ended) == 0, what

    tasks = [asyncio.create_task(watch(site)) for site in sites]
    await everybody("all were told where things are", 0, len(sites))
    assert (await asyncio.to_thread(hub.client.get, "status"))["watches"] == len(sites)
    print(f"resident: {rss_kib(hub) // 1024} MiB with {len(sites)} watches")
    await asyncio.to_thread(hub.apply, folder / "fleet", FLEET)
    await everybody("all were told of the generation", 1, len(sites))
    await asyncio.to_thread(hub.client.post, "sites/shop-7/revoke", {})
    async with asyncio.timeout(30):
        await asyncio.gather(tasks[7])
    assert ended == {"shop-7"}
    await asyncio.to_thread(hub.stop)
    assert hub.process.returncode == 0
    async with asyncio.timeout(30):
        await asyncio.gather(*tasks, return_exceptions=True)


def test_a_new_certificate_is_taken_without_a_restart(tmp_path: Path) -> None:
    def serial(hub: Hub) -> object:
        with (
            socket.create_connection(("127.0.0.1", hub.port), timeout=10) as plain,
            pinned(hub).wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            found = secure.getpeercert()
            assert found is not None
            return found["serialNumber"]

    with running_hub(tmp_path / "hub") as hub:
        first = serial(hub)
        (hub.folder / "data" / "tls.pem").unlink()
        hub.process.send_signal(signal.SIGHUP)

        def renewed() -> bool:
            with contextlib.suppress(OSError):
                return serial(hub) != first
            return False

        until(renewed, "it serves with another certificate")
        hub.wait()
        assert "certificate_renewed" in hub.log


def test_a_hub_with_other_keys_leaves_the_database_alone(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        hub.invite("shop-1")
    other = tmp_path / "other"
    (other / "data").mkdir(parents=True)
    shutil.copy(tmp_path / "hub" / "data" / "hub.db", other / "data" / "hub.db")
    (other / "hub.yaml").write_text(HUB.replace("{port}", str(free_port())).replace("{more}", ""))
    stranger = Hub(other, 1)
    assert stranger.process.wait(30) == 1
    assert "belongs to another hub" in stranger.log
    assert "hub.key is" in stranger.log
    for name in ("hub.key", "pepper.key", "ca.key", "ca.pem", "admin.key"):
        shutil.copy(tmp_path / "hub" / "data" / name, other / "data" / name)
    with running_hub(other) as restored:
        assert restored.site("shop-1")["state"] == "never"
