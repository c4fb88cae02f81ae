"""A folder on this disk against its model signature (`wire.model_signing`): every file is read and hashed."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ondol.adapters.staging import hash_file
from ondol.errors import BadSignature, DigestMismatch, NotFound
from ondol.wire.model_signing import (
    BUNDLE_BYTES_MAX,
    FILES_MAX,
    IGNORED,
    ModelKey,
    SignedFiles,
    compare,
    read_bundle,
)

_DEPTH_MAX: Final = 64


def verify_folder(folder: Path, signature: Path, keys: Mapping[str, ModelKey]) -> SignedFiles:
    """Who vouches for what in `folder`, once every file there is one that was signed, and none is missing.

    The signature's own file may lie in the folder.

    Raises:
        BadSignature: no key of `keys` made it, or it is broken.
        DigestMismatch: a file is missing, changed, not signed, or no regular file.
        NotFound: something cannot be read.
    """
    try:
        with signature.open("rb") as file:
            raw = file.read(BUNDLE_BYTES_MAX + 1)
        signed = read_bundle(raw, keys)
        found, odd = _walk(folder, signature)
    except OSError as error:
        raise NotFound(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error
    compare(signed, found, odd=odd)
    return signed


def vouched(signed: SignedFiles, folder: Path, file: Path) -> str:
    """`sha256:<hex>` that was signed for a file of the folder.

    Raises:
        BadSignature: the file is none of those.
    """
    name = os.path.relpath(file.resolve(), folder.resolve()).replace(os.sep, "/")
    digest = signed.files.get(name)
    if digest is None:
        raise BadSignature(f"the signature does not cover {name[:200]!r}")
    return f"sha256:{digest}"


def _walk(folder: Path, signature: Path) -> tuple[dict[str, str], list[str]]:
    found: dict[str, str] = {}
    odd: list[str] = []
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise DigestMismatch(f"{folder} is no folder, expected the one that was signed")
    pending = [(folder, 0)]
    while pending:
        here, depth = pending.pop()
        for entry in os.scandir(here):
            path = Path(entry.path)
            name = path.relative_to(folder).as_posix()
            if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
                odd.append(name)
            elif name in IGNORED or (entry.is_file() and _same(path, signature)):
                continue
            elif entry.is_dir():
                if depth >= _DEPTH_MAX:
                    raise DigestMismatch(f"found folders more than {_DEPTH_MAX} deep at {name[:200]!r}")
                pending.append((path, depth + 1))
            else:
                found[name] = hash_file(path).partition(":")[2]
            if len(found) + len(odd) > FILES_MAX:
                raise DigestMismatch(f"found more than {FILES_MAX} files in {folder}")
    return found, odd


def _same(path: Path, signature: Path) -> bool:
    return signature.exists() and path.samefile(signature)
