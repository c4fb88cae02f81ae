"""Secrets and names that a site makes for itself: once, and then they stay."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Final

from ondol.adapters.keystore import KeyRequest, SqliteKeyStore

LOG: Final = logging.getLogger("ondol.site")


def secret_file(path: Path) -> bytes:
    """32 random bytes that stay the same, in a file that only this user can read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        secret = secrets.token_bytes(32)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
            os.fsync(file.fileno())
        return secret


def gateway_id(data: Path) -> str:
    """The name of a gateway: 12 hex digits that stay the same with its data directory."""
    return blake2b(secret_file(data / "gateway.id"), digest_size=6).hexdigest()


def first_admin_key(keys: SqliteKeyStore, data: Path, wall_ns: int) -> None:
    """A site without an admin key gets one, in `admin.key`, readable by its user alone."""
    if any(key.kind == "admin" and key.revoked_ns is None for key in keys.all()):
        return
    _, text = keys.issue(KeyRequest(team="default", kind="admin", name="first admin"), wall_ns)
    path = data / "admin.key"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text + "\n")
    LOG.info("admin_key_made", extra={"fields": {"file": str(path)}})


def request_ids() -> Callable[[], str]:
    """Ids that sort by time: 48 bits of milliseconds, then 64 random bits (as UUID version 7 does)."""
    pool = memoryview(b"")

    def new_id() -> str:
        nonlocal pool
        if len(pool) < 8:
            pool = memoryview(secrets.token_bytes(4096))
        tail, pool = pool[:8], pool[8:]
        return f"req_{time.time_ns() // 1_000_000:012x}{tail.hex()}"

    return new_id


def pseudonym(key: bytes, tenant: str, user: str) -> str:
    """What the ledger keeps of a `user`: the same for the same user of a tenant, and nobody can go back."""
    digest = blake2b(f"{tenant}\0{user}".encode(), key=key, digest_size=12)
    return "u_" + digest.hexdigest()
