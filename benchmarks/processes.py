"""Processes that a benchmark starts: begun in their own session, watched through /proc, ended by pid.

Only what was started here is ever ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class StartFailed(Exception):
    """A contender could not be installed or started; the message says why."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Process:
    """One child process with its log in a file.

    `serving` says which processes do the work: `self` (this one alone) or `children` (nginx, whose master
    only watches).  Memory and CPU are those of the serving processes.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        serving: str = "self",
    ) -> None:
        """Start `command` with `env` added to the environment."""
        self.log = log
        self._serving = serving
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )

    def __enter__(self) -> Process:
        """The running process."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.end()

    @property
    def pid(self) -> int:
        """The process id, also after its end."""
        return self._popen.pid

    def serving_pids(self) -> list[int]:
        """The processes that do the work."""
        return _children(self.pid) if self._serving == "children" else [self.pid]

    def rss_kib(self) -> int:
        """Resident memory (VmRSS) of the serving processes, in KiB."""
        return sum(_rss_kib(pid) for pid in self.serving_pids())

    def cpu_us(self) -> int:
        """User and system time that the serving processes have used, in microseconds (10 ms steps)."""
        return sum(_cpu_us(pid) for pid in self.serving_pids())

    def alive(self) -> bool:
        """Whether it runs."""
        return self._popen.poll() is None

    def tail(self, lines: int = 3) -> str:
        """The last lines that it wrote, for a message on failure."""
        text = self.log.read_text(errors="replace").strip().splitlines()
        return " | ".join(text[-lines:])[-240:]

    def wait_until(self, ready: Callable[[], bool], *, what: str, timeout_s: float) -> None:
        """Return once `ready()` holds.

        Raises:
            StartFailed: the process ended, or the time is up.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.alive():
                raise StartFailed(f"{what} ended with code {self._popen.returncode}: {self.tail()}")
            if time.monotonic() > deadline:
                raise StartFailed(f"{what} was not ready after {timeout_s:.0f} s: {self.tail()}")
            time.sleep(0.05)

    def end(self, grace_s: float = 10.0) -> None:
        """SIGTERM, then after `grace_s` SIGKILL to the session that was started with it."""
        if self.alive():
            self._popen.send_signal(signal.SIGTERM)
            try:
                self._popen.wait(grace_s)
            except subprocess.TimeoutExpired:
                os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _rss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def _cpu_us(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1_000_000 // TICKS_PER_S
