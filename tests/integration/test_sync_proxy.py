"""A real site whose only way to a real hub is an HTTP proxy: it joins, is steered and accounted through it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.hubs import FLEET, fleet_of, join, running_hub, start_site, until
from tests.sites import HEAD, free_port


class Proxy:
    """An HTTP proxy in threads.  `targets` are what it was asked for; `cut` drops every tunnel and refuses more."""

    def __init__(self) -> None:
        self.targets: list[str] = []
        self.cut = False
        self._open: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                piece = client.recv(1)
                if not piece:
                    return
                head += piece
            target = head.split(b" ")[1].decode()
            self.targets.append(target)
            if self.cut:
                client.sendall(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
                return
            host, _, port = target.rpartition(":")
            with socket.create_connection((host, int(port))) as hub:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                self._open |= {client, hub}
                back = threading.Thread(target=_pump, args=(hub, client), daemon=True)
                back.start()
                _pump(client, hub)
                back.join()

    def hang_up(self) -> None:
        self.cut = True
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _proxy() -> Iterator[Proxy]:
    proxy = Proxy()
    try:
        yield proxy
    finally:
        proxy.close()


def test_a_site_behind_a_proxy_joins_and_loses_nothing_when_the_proxy_goes(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub, _proxy() as proxy:
        folder, port = tmp_path / "shop-1", free_port()
        folder.mkdir()
        way = f"hub: {{proxy: 'http://127.0.0.1:{proxy.port}'}}"
        text = HEAD.replace("{site}", "shop-1").replace("{port}", str(port)).replace("{gateway}", way)
        (folder / "site.yaml").write_text(text.rstrip().removesuffix("---"))
        join(folder, hub.invite("shop-1"))
        assert set(proxy.targets) == {f"127.0.0.1:{hub.port}"}
        hub.apply(tmp_path / "fleet", FLEET)
        site = start_site(folder, port)
        try:
            until(lambda: fleet_of(site)["generation"] == 1, "the generation comes through the proxy")
            assert site.chat("before").status == 200
            until(lambda: fleet_of(site)["acknowledged"] == 1, "the record went up")
            proxy.hang_up()
            until(
                lambda: "answered 503 to CONNECT" in fleet_of(site)["why"],
                "the site says what the proxy says",
            )
            assert fleet_of(site)["state"] == "away"
            assert {site.chat(f"meanwhile {number}").status for number in range(20)} == {200}
            proxy.cut = False
            until(lambda: fleet_of(site)["acknowledged"] == 21, "everything went up")
            received = hub.client.get("usage")["received"]
            assert sum(one["records"] for one in received if one["site"] == "shop-1") == 21
        finally:
            site.stop()
