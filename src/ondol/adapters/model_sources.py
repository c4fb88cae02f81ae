"""Where models may come from, and what a file must start with; no file is written here."""

from __future__ import annotations

import http.client
import ipaddress
import urllib.request
from typing import IO, Final
from urllib.parse import urlsplit

from ondol.errors import BadModelFile, InvalidRequest, StateError


class FetchFailed(StateError):
    """A model could not be fetched; nothing of it is kept."""

    code = "fetch_failed"
    retryable = True


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
