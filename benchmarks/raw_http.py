"""A blocking HTTP/1.1 client that adds as little time of its own as Python allows.

It understands what the contenders send: Content-Length, chunked, or an end of the connection.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from types import TracebackType

import msgspec

RECEIVE_BYTES = 65_536


class Reply(msgspec.Struct, frozen=True):
    """Status, header (lower case, as one text) and body of one answer."""

    status: int
    header: str
    body: bytes

    def get(self, name: str) -> str | None:
        """The value of a header, or None."""
        for line in self.header.split("\r\n"):
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
        return None


class Connection:
    """One kept-alive connection, opened anew when the server has closed it."""

    def __init__(self, port: int, timeout_s: float = 30.0) -> None:
        """Connect to 127.0.0.1."""
        self._port = port
        self._timeout_s = timeout_s
        self._open()

    def _open(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=self._timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Connection:
        """The open connection."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def exchange(self, request: bytes) -> Reply:
        """Send a request and read its whole answer.

        Raises:
            OSError: the server went away before the answer was whole.
        """
        self._socket.sendall(request)
        data = self._receive()
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._receive()
        header = data[:end].decode("latin-1").lower()
        body = data[end + 4 :]
        reply = Reply(status=int(header[9:12]), header=header, body=b"")
        if (length := reply.get("content-length")) is not None:
            while len(body) < int(length):
                body += self._receive()
        elif reply.get("transfer-encoding") == "chunked":
            while not body.endswith(b"0\r\n\r\n"):
                body += self._receive()
            body = _unchunk(body)
        if reply.get("connection") == "close":
            self.close()
            self._open()
        return Reply(status=reply.status, header=header, body=body)

    def _receive(self) -> bytes:
        data = self._socket.recv(RECEIVE_BYTES)
        if not data:
            raise ConnectionError(f"port {self._port} closed the connection in the middle of an answer")
        return data

    def pieces(self, request: bytes) -> Iterator[tuple[int, bytes]]:
        """Send a request and give what arrives with its time (CLOCK_MONOTONIC, ns) until the stream's end."""
        self._socket.sendall(request)
        tail = b""
        while data := self._socket.recv(RECEIVE_BYTES):
            yield time.monotonic_ns(), data
            tail = (tail + data)[-64:]
            if tail.endswith(b"0\r\n\r\n"):
                return


def _unchunk(body: bytes) -> bytes:
    parts = []
    at = 0
    while (size_end := body.find(b"\r\n", at)) >= 0:
        size = int(body[at:size_end].partition(b";")[0], 16)
        parts.append(body[size_end + 2 : size_end + 2 + size])
        at = size_end + 2 + size + 2
    return b"".join(parts)
