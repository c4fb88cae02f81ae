"""Joining over the network: the hub is known before the token is shown, and no answer is lost for good."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.hubs import FLEET, Hub, join, member, running_hub, until, write_site
from tests.integration.test_sync_proxy import Proxy

from ondol.adapters.hub_ca import HubAuthority
from ondol.adapters.site_identity import key_to_join_with, read_membership
from ondol.cli import joining
from ondol.cli.installation import CommandFailed
from ondol.core import dsse
from ondol.core.invites import HubPlace, make_token, parse_token
from ondol.wire import sync


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with running_hub(tmp_path_factory.mktemp("fleet") / "hub") as running:
        yield running


class Impostor:
    """A server with a certificate of its own CA; says any text as the hub's CA, and notes what it is sent."""

    def __init__(
        self, folder: Path, ca_pem: bytes, *, oldest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    ) -> None:
        folder.mkdir()
        self.authority = HubAuthority.open(folder, "evil", ("127.0.0.1",))
        self.ca_pem = ca_pem
        self.heard = b""
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.maximum_version = oldest
        self.context.load_cert_chain(folder / "tls.pem", folder / "tls.key")
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self.server.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.server.accept()
                with (
                    contextlib.suppress(OSError),
                    self.context.wrap_socket(client, server_side=True) as secure,
                ):
                    head = secure.recv(65536)
                    self.heard += head
                    body = self.ca_pem if head.startswith(b"GET /v1/hub/ca ") else b""
                    secure.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.thread.join(10)


@contextlib.contextmanager
def impostor(folder: Path, ca_pem: bytes, **how: ssl.TLSVersion) -> Iterator[Impostor]:
    made = Impostor(folder, ca_pem, **how)
    try:
        yield made
    finally:
        made.close()


def redirected(token: str, *urls: str) -> str:
    """The same token as if it named these addresses."""
    invite = parse_token(token)
    return make_token(invite.id, invite.secret, HubPlace(urls=urls, ca=invite.hub.ca))


def ca_of(hub: Hub) -> bytes:
    return (hub.folder / "data" / "ca.pem").read_bytes()


def secret_of(token: str) -> bytes:
    return parse_token(token).secret.encode()


def test_one_that_shows_its_own_ca_is_sent_nothing(hub: Hub, tmp_path: Path) -> None:
    token = hub.invite("shop-own")
    with impostor(tmp_path / "evil", b"") as other:
        other.ca_pem = other.authority.ca_pem
        with pytest.raises(
            CommandFailed, match=r"is not the hub that this invitation is from.*nothing was sent"
        ):
            joining.join(tmp_path / "data", parse_token(redirected(token, other.url)))
    assert secret_of(token) not in other.heard and b"/v1/sync" not in other.heard


def test_one_that_shows_the_hubs_ca_and_has_another_certificate_is_sent_nothing(
    hub: Hub, tmp_path: Path
) -> None:
    token = hub.invite("shop-copy")
    with (
        impostor(tmp_path / "evil", ca_of(hub)) as other,
        pytest.raises(
            CommandFailed, match="its certificate is refused.*A proxy that opens TLS cannot be used"
        ),
    ):
        joining.join(tmp_path / "data", parse_token(redirected(token, other.url)))
    assert secret_of(token) not in other.heard and b"/v1/sync" not in other.heard


def test_one_that_adds_its_ca_to_the_hubs_is_sent_nothing(hub: Hub, tmp_path: Path) -> None:
    """The fingerprint is that of the first certificate of the text; the second one must not be believed."""
    token = hub.invite("shop-both")
    with impostor(tmp_path / "evil", b"") as other:
        other.ca_pem = ca_of(hub) + other.authority.ca_pem
        with pytest.raises(CommandFailed, match="its certificate is refused"):
            joining.join(tmp_path / "data", parse_token(redirected(token, other.url)))
    assert secret_of(token) not in other.heard and b"/v1/sync" not in other.heard


def test_one_that_speaks_an_old_tls_is_not_spoken_to(hub: Hub, tmp_path: Path) -> None:
    token = hub.invite("shop-old")
    with (
        impostor(tmp_path / "evil", ca_of(hub), oldest=ssl.TLSVersion.TLSv1_2) as other,
        pytest.raises(CommandFailed, match="no hub of this invitation was reached"),
    ):
        joining.join(tmp_path / "data", parse_token(redirected(token, other.url)))
    assert other.heard == b""


def test_the_next_address_is_tried_where_one_is_dead(hub: Hub, tmp_path: Path) -> None:
    token = redirected(hub.invite("shop-next"), "https://127.0.0.1:1", hub.url)
    assert joining.join(tmp_path / "data", parse_token(token)).site == "shop-next"
    assert read_membership(tmp_path / "data").hub_urls == ("https://127.0.0.1:1", hub.url)


def test_an_answer_that_was_lost_is_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    data, invite = tmp_path / "data", parse_token(hub.invite("shop-lost"))
    data.mkdir()
    # The hub has taken the token, and the site never heard of it.
    message = sync.Join(token=invite.proof, key=dsse.public_key(key_to_join_with(data)))
    assert joining._ask(joining._Way(hub.url, None), ca_of(hub), message).site == "shop-lost"
    assert joining.join(data, invite).site == "shop-lost"
    with pytest.raises(CommandFailed, match="was used"):
        joining.join(tmp_path / "other", invite)


def test_a_request_for_a_certificate_that_is_refused_does_not_use_the_token_up(
    hub: Hub, tmp_path: Path
) -> None:
    invite = parse_token(hub.invite("shop-csr"))
    message = sync.Join(
        token=invite.proof,
        key=dsse.public_key(dsse.new_private_key()),
        address="https://shop.example",
        csr=b"nonsense",
    )
    with pytest.raises(CommandFailed, match="no PEM CSR"):
        joining._ask(joining._Way(hub.url, None), ca_of(hub), message)
    assert joining.join(tmp_path / "data", invite, address="https://shop.example").certificate
    assert (tmp_path / "data" / "tls.pem").exists()


def test_a_refusal_leaves_a_member_as_it_was(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    write_site(folder, "shop-kept")
    used = hub.invite("shop-kept")
    join(folder, used)
    before = {
        path.name: path.read_bytes()
        for path in (folder / "data").iterdir()
        if path.suffix in (".key", ".json")
    }
    assert "was used" in join(folder, used, "--again", ok=False).stderr
    after = {name: (folder / "data" / name).read_bytes() for name in before}
    assert after == before


def test_a_site_leaves_one_fleet_for_another_with_a_key_of_its_own(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    write_site(folder, "shop-moved")
    join(folder, hub.invite("shop-moved"))
    first = (folder / "data" / "site.key").read_bytes()
    hub.client.post("sites/shop-moved/revoke", {})
    join(folder, hub.invite("shop-moved"), "--again")
    assert (folder / "data" / "site.key").read_bytes() != first
    assert hub.site("shop-moved")["state"] == "never"


def test_a_site_joins_through_a_proxy_that_wants_a_password(hub: Hub, tmp_path: Path) -> None:
    proxy = Proxy()
    try:
        url = f"http://shop:secret@127.0.0.1:{proxy.port}"
        reply = joining.join(tmp_path / "data", parse_token(hub.invite("shop-proxied")), proxy=url)
        assert reply.site == "shop-proxied"
        assert set(proxy.targets) == {f"127.0.0.1:{hub.port}"}
        proxy.cut = True
        with pytest.raises(CommandFailed, match="503"):
            joining.join(tmp_path / "other", parse_token(hub.invite("shop-cut")), proxy=url)
    finally:
        proxy.close()
    with pytest.raises(CommandFailed, match=r"hub\.proxy"):
        joining.join(tmp_path / "other", parse_token(hub.invite("shop-cut")), proxy="socks5://x")


def test_a_factory_key_is_bounded_and_withdrawn_from_the_command_line(hub: Hub, tmp_path: Path) -> None:
    made = hub.ondol(
        "sites", "invite", "new-kiosks", "--factory", "5", "--names", "kiosk-*", "--label", "kind=kiosk"
    )
    invite = parse_token(made.stdout.strip())
    assert joining.join(tmp_path / "one", invite, site="kiosk-1").site == "kiosk-1"
    with pytest.raises(CommandFailed, match=r"called kiosk-\*"):
        joining.join(tmp_path / "two", invite, site="bank-1")
    hub.ondol("sites", "revoke", "new-kiosks")
    with pytest.raises(CommandFailed, match="was used"):
        joining.join(tmp_path / "three", invite, site="kiosk-2")
    assert hub.site("kiosk-1")["labels"] == {"kind": "kiosk"}


def test_damaged_tokens_are_refused_without_asking_anybody(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    write_site(folder, "shop-1")
    done = join(folder, "ondoljoin_nonsense", ok=False)
    assert done.returncode == 1 and "this is no invitation" in done.stderr
    assert not (folder / "data" / "fleet.json").exists()


def test_a_key_of_the_fleet_is_good_at_its_sites_until_it_is_revoked(hub: Hub, tmp_path: Path) -> None:
    hub.apply(tmp_path / "fleet", FLEET)
    with member(hub, tmp_path / "shop", "shop-keyed") as shop:
        made = json.loads(hub.ondol("keys", "create", "app", "--route", "assistant", "--json").stdout)
        until(lambda: shop.chat("Hello", key=made["key"]).status == 200, "the site knows the key")
        assert made["key"] not in hub.ondol("keys", "list", "--json").stdout
        hub.kill()
        assert shop.chat("Hello", key=made["key"]).status == 200, "the hub is on no request's path"
        hub.restart()
        hub.ondol("keys", "revoke", made["id"])
        until(
            lambda: shop.chat("Hello", key=made["key"]).status == 401,
            "the site knows that it is out",
            limit_s=60,
        )
    done = hub.ondol("keys", "create", "boss", "--kind", "admin", ok=False)
    assert done.returncode == 1 and "of kind user" in done.stderr
    done = hub.ondol("keys", "list", "--url", "http://127.0.0.1:1", ok=False)
    assert done.returncode == 1 and "choose" in done.stderr
