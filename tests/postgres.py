"""A real PostgreSQL server for tests, from Debian's package: its own folder, its own socket, ended by its pid."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FAST = "-c shared_buffers=32MB -c max_connections=60 -c fsync=on -c full_page_writes=on"


def programs() -> Path | None:
    """The folder with the newest `initdb` and `postgres`, or None."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3].split(".")[0])
    )
    return found[-1].parent if found else None


class Server:
    """One server.  `dsn` is how to reach it; `kill` is a crash, `start` what comes after."""

    def __init__(self, folder: Path, bin_folder: Path, user: str | None) -> None:
        self.folder, self.bin, self.user = folder, bin_folder, user
        self.dsn = f"host={folder} port=5432 user=ondol dbname=postgres"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            [
                str(self.bin / "postgres"), "-D", str(self.folder / "data"), "-k", str(self.folder),
                "-c", "listen_addresses=", *FAST.split(),
            ],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder, start_new_session=True,
            **_as_user(self.user),
        )  # fmt: skip
        log.close()
        self._until_ready()

    def _until_ready(self) -> None:
        assert self.process is not None
        end = time.monotonic() + 60
        ask = [str(self.bin / "pg_isready"), "-q", "-h", str(self.folder), "-p", "5432"]
        while subprocess.run(ask, check=False).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"PostgreSQL did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """As a power cut without the disk: the server and all that it started, at once."""
        if self.process is None:
            return
        # The server's children have sessions of their own, so they are named by it, before it is gone.
        children = _children(self.process.pid)
        for pid in (self.process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        end = time.monotonic() + 20
        while any(map(_is_alive, children)):
            assert time.monotonic() < end, "a child of PostgreSQL outlived SIGKILL"
            time.sleep(0.005)

    def stop(self) -> None:
        """In order: connections are cut, nothing is waited for."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _as_user(user: str | None) -> dict[str, Any]:
    if user is None:
        return {}
    found = pwd.getpwnam(user)
    return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}


def _user() -> str | None:
    """The server refuses to run as root; then it runs as Debian's user for it, or as nobody."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """A fresh server.  Skips the test, with the reason, where PostgreSQL is not installed."""
    bin_folder = programs()
    if bin_folder is None:
        pytest.skip(
            "needs a PostgreSQL server: /usr/lib/postgresql/*/bin is not there (apt install postgresql)"
        )
    user = _user()
    # Not in pytest's folder: another user must be able to go there, and a socket's path is at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ondol-pg-"))
    server = Server(folder, bin_folder, user)
    try:
        if user is not None:
            shutil.chown(folder, user)
        subprocess.run(
            [
                str(bin_folder / "initdb"), "-D", str(folder / "data"), "-U", "ondol", "-A", "trust", "-E", "UTF8",
                "--locale=C.UTF-8", "--no-sync",
            ],
            check=True, capture_output=True, cwd=folder, **_as_user(user),
        )  # fmt: skip
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running_postgres() -> Iterator[str]:
    """The same, where only its address is of interest."""
    with running_server() as server:
        yield server.dsn
