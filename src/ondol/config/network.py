"""Addresses as a configuration writes them.  The address counts, not the label."""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import SplitResult, urlsplit

_PRIVATE: Final = tuple(
    ipaddress.ip_network(block)
    for block in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7", "fe80::/10")
)  # RFC 1918, RFC 4193 and link-local; `is_private` of the standard library takes in more than that


def address_problem(url: str) -> str | None:
    """None for the address of a site, as others reach it, else what is allowed."""
    allowed = "an address of a host alone, such as https://shop-7.example:8443"
    if url_problem(url) is not None:
        return allowed
    parts = urlsplit(url)
    return None if parts.path in ("", "/") and not parts.query and not parts.fragment else allowed


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its very text; no name is looked up."""
    if host.lower().rstrip(".") == "localhost":
        return True
    address = _literal(host)
    return address is not None and address.is_loopback


def is_near(host: str) -> bool:
    """Whether a host is loopback, or a literal address of a private or link-local network."""
    if is_loopback(host):
        return True
    address = _literal(host)
    return address is not None and any(address in block for block in _PRIVATE)


def is_wildcard(host: str) -> bool:
    """Whether a bind address means every interface."""
    address = _literal(host)
    return host == "" or (address is not None and address.is_unspecified)


def split_listen(listen: str) -> tuple[str, int] | None:
    """Host (without brackets) and port of `host:port`, or None when it is not that."""
    host, colon, port = listen.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        return None
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        return (host, int(port)) if isinstance(_literal(host), ipaddress.IPv6Address) else None
    return None if not host or ":" in host or "/" in host else (host, int(port))


def url_problem(url: str) -> str | None:
    """What is wanted where an engine's address is wrong, or None when it is right."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "an address such as http://127.0.0.1:8000/v1"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "an address with http:// or https:// and a host, such as http://127.0.0.1:8000/v1"
    if any(char.isspace() for char in url) or "\\" in url:
        return "an address without spaces and backslashes"
    if parts.username is not None or parts.password is not None:
        return "an address without user or password; keys are named under keys: [{env: NAME}]"
    if parts.query or parts.fragment:
        return "an address without ? and #"
    if parts.scheme == "http" and not is_near(host_of(parts)):
        return "https:// to an address outside this machine and its private networks"
    return None


def host_of(url: str | SplitResult) -> str:
    """The host of an address that has no problem, without brackets."""
    parts = urlsplit(url) if isinstance(url, str) else url
    return parts.hostname or ""


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
