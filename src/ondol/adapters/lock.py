"""What one process holds alone: a data directory, whose lock ends with its holder, and an address."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ondol.errors import ConfigError, DirectoryLocked


@contextmanager
def lock_directory(path: Path) -> Iterator[None]:
    """Hold the directory (made if it is missing) for this process alone, through its file `lock`.

    The file stays behind on purpose: deleting it would let two processes lock two different files of
    the same name.

    Raises:
        DirectoryLocked: another process holds it; the message has its pid.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = path / "lock"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise DirectoryLocked(
                f"{path} is in use by the process with pid {holder}. "
                "Stop that process, or give this one a directory of its own."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        os.close(descriptor)


def must_be_free(listen: str) -> None:
    """Refuse an address that somebody listens on: the server would share it (SO_REUSEPORT), not fail."""
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {listen}: {error.strerror}; stop what uses it, or change `listen` in the file"
            ) from error
