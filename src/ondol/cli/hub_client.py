"""Asking a hub from the command line: TLS against the fleet's own CA, JSON in and out."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Self
from urllib.parse import urlsplit

from cyclopts import Parameter

from ondol.cli.installation import CommandFailed, Layout

TIMEOUT_S: Final = 60.0
BLOCK: Final = 1024 * 1024
HubUrl = Annotated[
    str | None,
    Parameter(
        name="--hub",
        help="The hub's address instead of --dir; its admin key in ONDOL_HUB_KEY, its CA's file in ONDOL_HUB_CA.",
    ),
]


class HubClient:
    """One hub and an admin key."""

    def __init__(self, url: str, key: str, ca_file: Path) -> None:
        """Name the hub; nothing is sent yet.

        Raises:
            CommandFailed: the CA's file cannot be read.
        """
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname:
            raise CommandFailed(f"the hub's address is {url!r}; expected https://HOST:PORT")
        self._host, self._port = parts.hostname, parts.port or 443
        self.url = f"https://{parts.netloc}"
        self.key = key
        try:
            self._tls = ssl.create_default_context(cafile=str(ca_file))
        except OSError as error:
            raise CommandFailed(
                f"{ca_file}: the hub's CA certificate cannot be read ({error.strerror or error}). "
                "It is data/ca.pem of the hub; ONDOL_HUB_CA names a copy of it."
            ) from error
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_3

    @classmethod
    def find(cls, directory: Path, hub: str | None) -> Self:
        """The hub that `--hub` names with a key from the environment, else the one that runs in `directory`.

        Raises:
            CommandFailed: nothing runs there, or the environment has no key.
        """
        if hub is None:
            layout = Layout(directory)
            running = layout.running()
            key = (layout.data("hub") / "admin.key").read_text().strip()
            return cls(running.hub.url, key, layout.data("hub") / "ca.pem")
        names = ("ONDOL_HUB_KEY", "ONDOL_HUB_CA")
        key, ca_file = (os.environ.get(name, "") for name in names)
        if not key or not ca_file:
            raise CommandFailed(
                f"--hub needs {' and '.join(names)} in the environment: the hub's admin key, and the file of its CA "
                "certificate (data/admin.key and data/ca.pem of the hub)."
            )
        return cls(hub, key, Path(ca_file))

    def get(self, path: str) -> Any:
        """The answer to a GET below /v1/hub/."""
        return self.call("GET", f"/v1/hub/{path}", None)

    def post(self, path: str, body: Any) -> Any:
        """The answer to a POST below /v1/hub/."""
        return self.call("POST", f"/v1/hub/{path}", body)

    def delete(self, path: str) -> Any:
        """The answer to a DELETE below /v1/hub/."""
        return self.call("DELETE", f"/v1/hub/{path}", None)

    def call(self, method: str, path: str, body: Any) -> Any:
        """One request; the decoded JSON of the answer.

        Raises:
            CommandFailed: the hub is not reached, or says no: with its own sentence.
        """
        data = None if body is None else json.dumps(body).encode()
        with self._asked(method, path, data, "application/json") as reply:
            return _read(reply.status, reply.read(), self.url)

    def post_bytes(self, path: str, data: bytes) -> Any:
        """The answer to a POST of bytes below /v1/hub/.  Raises: as `call`."""
        with self._asked("POST", f"/v1/hub/{path}", data, "application/octet-stream") as reply:
            return _read(reply.status, reply.read(), self.url)

    def stream(self, path: str) -> Iterator[bytes]:
        """The bytes of a GET below /v1/hub/, in pieces as they come.  Raises: as `call`."""
        with self._asked("GET", f"/v1/hub/{path}", None, "application/json") as reply:
            if reply.status != 200:
                _read(reply.status, reply.read(), self.url)
            while block := reply.read(BLOCK):
                yield block

    @contextlib.contextmanager
    def _asked(
        self, method: str, path: str, data: bytes | None, kind: str
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=self._tls)
        headers = {"authorization": f"Bearer {self.key}", "content-type": kind}
        try:
            connection.request(method, path, body=data, headers=headers)
            yield connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            raise CommandFailed(
                f"{self.url}: its certificate is not of this fleet's CA ({error.verify_message}). Is it the right hub?"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise CommandFailed(
                f"{self.url}: the hub does not answer ({str(error) or type(error).__name__})"
            ) from error
        finally:
            connection.close()


def _read(status: int, payload: bytes, url: str) -> Any:
    try:
        found = json.loads(payload)
    except ValueError as error:
        raise CommandFailed(f"{url} answered {status} without JSON; is it a hub?") from error
    if status >= 400:
        said = found.get("error", {}) if isinstance(found, dict) else {}
        raise CommandFailed(str(said.get("message", f"the hub answered {status}")))
    return found
