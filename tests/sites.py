"""Real sites for tests: `ondol run site` in its own process, on a free port, in a temporary folder."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD = """
kind: Gateway
name: gateway
site: {site}
listen: 127.0.0.1:{port}
data: data
{gateway}
---
kind: Site
name: {site}
tier: edge
region: kr-seoul
country: KR
grid_zone: KR
---
"""

FAKE = """
kind: Model
name: helper
task: chat
---
kind: Model
name: vectors
task: embedding
---
kind: Price
name: list
input_per_mtok: 1.00
output_per_mtok: 2.00
source: made for a test
date: 2026-01-01
---
kind: Deployment
name: helper-fake
site: {site}
model: helper
engine: fake
price: list
---
kind: Deployment
name: vectors-fake
site: {site}
model: vectors
engine: fake
price: list
---
kind: Route
name: assistant
deployments: [helper-fake]
---
kind: Route
name: embedding
deployments: [vectors-fake]
"""


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago, and that no outgoing connection takes in the meantime.

    Linux gives those ports from 32768 on; what `bind` to port 0 gives is among them.
    """
    while True:
        port = 12_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


class Answer:
    """One HTTP answer: status, headers in lower case, body."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The stable code of an error."""
        found: str = self.json()["error"]["code"]
        return found


class Site:
    """One running site."""

    def __init__(
        self, folder: Path, port: int, process: subprocess.Popen[bytes], *, scheme: str = "http",
        trusted: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.port = port
        self.process = process
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.trusted = trusted

    @property
    def admin_key(self) -> str:
        return (self.folder / "data" / "admin.key").read_text().strip()

    @property
    def log(self) -> str:
        return (self.folder / "site.log").read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of the log with that event."""
        lines = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def call(
        self, method: str, path: str, body: Any = None, *, key: str | None = "", **headers: str
    ) -> Answer:
        """One request; `key` empty is the admin key, None sends none."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method)
        if key is not None:
            request.add_header("authorization", f"Bearer {key or self.admin_key}")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=60, context=self.trusted) as reply:
                return Answer(reply.status, _lower(reply.headers), reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, _lower(error.headers), error.read())

    def chat(
        self,
        text: str = "Hello",
        *,
        key: str | None = "",
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> Answer:
        """One chat request to `assistant`, or to the `model` given."""
        body = {"model": "assistant", "messages": [{"role": "user", "content": text}]} | fields
        return self.call("POST", "/v1/chat/completions", body, key=key, **(headers or {}))

    def new_key(self, **fields: Any) -> str:
        """A new key, made through the admin API."""
        answer = self.call("POST", "/v1/ondol/keys", fields)
        assert answer.status == 200, answer.body
        text: str = answer.json()["key"]
        return text

    def record(self, request_id: str) -> dict[str, Any]:
        """A request's record with its reason."""
        answer = self.call("GET", f"/v1/ondol/requests/{request_id}")
        assert answer.status == 200, answer.body
        found: dict[str, Any] = answer.json()
        return found

    def stop(self, timeout_s: float = 20) -> int:
        """End it politely; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def start(
    folder: Path,
    text: str,
    *,
    site: str = "store-1",
    port: int | None = None,
    env: dict[str, str] | None = None,
    gateway: str = "",
    scheme: str = "http",
    trusted: ssl.SSLContext | None = None,
) -> Site:
    """Start a site with HEAD and these documents, and wait until it is ready."""
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "site.yaml"
    config.write_text(
        (HEAD + text).replace("{site}", site).replace("{port}", str(port)).replace("{gateway}", gateway)
    )
    with (folder / "site.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ondol", "run", "site", "--config", str(config)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | (env or {}),
        )  # fmt: skip
    running = Site(folder, port, process, scheme=scheme, trusted=trusted)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the site ended with {process.returncode}: {running.log}")
        with contextlib.suppress(OSError):
            if running.call("GET", "/readyz", key=None).status == 200:
                return running
        time.sleep(0.05)
    process.kill()
    process.wait()
    raise AssertionError(f"the site was not ready in 60 s: {running.log}")


@contextlib.contextmanager
def running_site(
    folder: Path,
    text: str = FAKE,
    *,
    site: str = "store-1",
    env: dict[str, str] | None = None,
    gateway: str = "",
) -> Iterator[Site]:
    """A site that is stopped at the end, also when the test fails."""
    started = start(folder, text, site=site, env=env, gateway=gateway)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.stop()
