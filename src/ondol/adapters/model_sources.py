"""Where models may come from, and what a file must start with; no file is written here."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import IO, Final
from urllib.parse import urlsplit

from ondol.errors import BadModelFile, InvalidRequest, StateError


class FetchFailed(StateError):
    """A model could not be fetched; nothing of it is kept."""

    code = "fetch_failed"
    retryable = True


_FETCH_TIMEOUT_S: Final = 30.0
_BLOCK: Final = 1024 * 1024
_KINDS: Final = (
    (b"PK\x03\x04", "a ZIP archive (PyTorch saves are; loading one can run code)"),
    (b"PK\x05\x06", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"lmgg", "the GGML format before GGUF; convert it"),
    (b"fmgg", "the GGML format before GGUF; convert it"),
    (b"tjgg", "the GGML format before GGUF; convert it"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to"),
)


def check_kind(first: bytes) -> None:
    """Refuse by content, whatever the name says, before a byte is kept.

    Raises:
        BadModelFile: the first bytes are not those of GGUF.
    """
    if first.startswith(b"GGUF"):
        return
    for magic, words in _KINDS:
        if first.startswith(magic):
            raise BadModelFile(f"found {words}; expected GGUF")
    if first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise BadModelFile("found a Python pickle, which runs code when it is loaded; expected GGUF")
    if first[:512].lstrip()[:1] == b"<":
        raise BadModelFile("found a web page; expected GGUF (does the address ask for a login?)")
    if len(first) > 8 and first[8:9] == b"{" and int.from_bytes(first[:8], "little") < 2**27:
        raise BadModelFile("found safetensors; expected GGUF (llama.cpp has a converter)")
    raise BadModelFile(f"found an unknown format that starts with {first[:4].hex()}; expected GGUF")


def check_url(url: str) -> None:
    """Refuse what is neither https, nor http on this machine.

    Raises:
        InvalidRequest: it is something else, or names a user.
    """
    parts = urlsplit(url)
    allowed = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))
    if not allowed or not parts.hostname:
        raise InvalidRequest(
            f"found the scheme {parts.scheme[:20]!r}, expected https:// (or http:// on this machine)"
        )
    if parts.username is not None:
        raise InvalidRequest("found a user name in the address, expected none: it would end up in logs")


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine, by its name or address as written."""
    if host is None:
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows only to addresses that could have been given in the first place."""

    def redirect_request(  # as the base class has it
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str,
        headers: http.client.HTTPMessage, newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        """Refuse a step down from https, and one from the network to this machine."""
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        check_url(newurl)
        if is_loopback(after.hostname) and not is_loopback(before.hostname):
            raise FetchFailed("the server redirects to this machine, which is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextlib.contextmanager
def fetching(url: str) -> Iterator[tuple[Iterator[bytes], int | None]]:
    """The blocks of what an address serves, and its size where the server says it.

    Raises (within the context too):
        InvalidRequest: as `check_url`.
        FetchFailed: the server did not give the file, or not all of it.
    """
    check_url(url)
    host = urlsplit(url).hostname
    # This machine is never reached through a proxy.
    handlers = [urllib.request.ProxyHandler({})] if is_loopback(host) else []
    opener = urllib.request.build_opener(CheckedRedirects, *handlers)
    request = urllib.request.Request(url, headers={"User-Agent": "ondol", "Accept-Encoding": "identity"})  # noqa: S310 - checked
    try:
        with opener.open(request, timeout=_FETCH_TIMEOUT_S) as response:
            length = response.headers.get("Content-Length")
            total = int(length) if length is not None and length.isascii() and length.isdigit() else None
            yield _fetched(response, total), total
    except urllib.error.HTTPError as error:
        error.close()
        raise FetchFailed(f"{host} answered with HTTP {error.code}") from error
    except urllib.error.URLError as error:
        raise FetchFailed(f"{host} cannot be reached: {error.reason}") from error
    except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise FetchFailed(f"{host} stopped in the middle ({type(error).__name__}); try again") from error


def _fetched(response: IO[bytes], total: int | None) -> Iterator[bytes]:
    done = 0
    while block := response.read(_BLOCK):
        done += len(block)
        yield block
    if total is not None and done != total:
        raise FetchFailed(f"the server sent {done} of {total} bytes; try again")
