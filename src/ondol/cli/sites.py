"""The parts of `ondol up` (hub and sites) as processes: started, watched, restarted, stopped in time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Literal

from ondol.cli.asking import Asker
from ondol.cli.installation import CommandFailed, Target

READY_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.03
_IDLE_S: Final = 0.1
_BACKOFF_MIN_S: Final = 0.5
_BACKOFF_MAX_S: Final = 30.0
_STEADY_S: Final = 60.0
"""A site that ran this long before it died starts its back-off anew."""
_LOG_LINES: Final = 5


class PartProcess:
    """One site, or the hub, as a child process.  It holds the child's stdin: when we are gone, it ends by itself."""

    def __init__(
        self,
        name: str,
        *,
        kind: Literal["site", "hub"],
        config: Path,
        log: Path,
        url: str,
        say: Callable[[str], None],
    ) -> None:
        """Name the part; nothing is started yet.  `say` tells the person at the terminal."""
        self.name = name
        self.url = url
        self._kind = kind
        self._called = "hub" if kind == "hub" else f"{name} site"
        self._config = config
        self._log = log
        self._say = say
        self._process: asyncio.subprocess.Process | None = None
        self._wanted = False
        self._started_s = 0.0
        # Starts and stops of the watcher and of others never overlap.
        self._changing = asyncio.Lock()

    @property
    def pid(self) -> int:
        """The process id of the child that runs, or ran last."""
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        """Start the child; it is not ready yet."""
        async with self._changing:
            await self._spawn()
            self._wanted = True

    async def _spawn(self) -> None:
        self._started_s = time.monotonic()
        descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "ondol", "run", self._kind, "--with-parent", "--config", str(self._config)),
                stdin=asyncio.subprocess.PIPE,
                stdout=descriptor,
                stderr=descriptor,
                # A group of its own: Ctrl-C in the terminal is ours alone, and we stop the sites in order.
                start_new_session=True,
            )
        finally:
            os.close(descriptor)

    async def wait_ready(self, admin_key: str | None = None) -> None:
        """Return once the site says that it can answer; with an admin's key, by its own engines.

        A site is ready as soon as any endpoint of each route is, and one elsewhere is there at once.

        Raises:
            CommandFailed: it ended, or was not ready within `READY_TIMEOUT_S`.
        """
        limit_s = time.monotonic() + READY_TIMEOUT_S
        async with Asker(Target(url=self.url, key=admin_key or "")) as asker:
            await self.wait_until(asker.is_ready)
            while admin_key is not None and (problems := await _local_problems(asker)):
                if time.monotonic() > limit_s:
                    self._say(f"the {self._called} goes on without: {'; '.join(problems)}")
                    return
                await asyncio.sleep(_POLL_S)

    async def wait_until(self, is_ready: Callable[[], Awaitable[bool]]) -> None:
        """Return once `is_ready` says so.

        Raises:
            CommandFailed: the part ended, or was not ready within `READY_TIMEOUT_S`.
        """
        limit_s = time.monotonic() + READY_TIMEOUT_S
        while not await is_ready():
            if self._process is not None and self._process.returncode is not None:
                raise CommandFailed(
                    f"the {self._called} ended while it started (exit code {self._process.returncode}); the end of "
                    f"{self._log}:\n{self._log_end()}"
                )
            if time.monotonic() > limit_s:
                raise CommandFailed(
                    f"the {self._called} was not ready within {READY_TIMEOUT_S:.0f} s; the end of "
                    f"{self._log}:\n{self._log_end()}"
                )
            await asyncio.sleep(_POLL_S)

    async def watch(self, on_restart: Callable[[], None]) -> None:
        """Start the child again when it ends by itself, later and later; runs until cancelled."""
        wait_s = _BACKOFF_MIN_S
        told = False
        while True:
            process = self._process
            if process is None or not self._is_wanted():
                await asyncio.sleep(_IDLE_S)
                continue
            code = await process.wait()
            if not self._is_wanted() or self._process is not process:
                continue
            if time.monotonic() - self._started_s > _STEADY_S:
                wait_s, told = _BACKOFF_MIN_S, False
            if not told:
                self._say(
                    f"the {self._called} ended by itself (exit code {code}) and is started again; "
                    f"see {self._log}"
                )
                told = True
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _BACKOFF_MAX_S)
            async with self._changing:
                if self._is_wanted():
                    await self._spawn()
                    on_restart()

    def _is_wanted(self) -> bool:
        # A call, because another task changes it while this one waits.
        return self._wanted

    async def stop(self, limit_s: float) -> None:
        """Ask the child to end; after `limit_s` seconds end it."""
        async with self._changing:
            self._wanted = False
            await self._end(limit_s)

    async def _end(self, limit_s: float) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(limit_s):
                await process.wait()
        except TimeoutError:
            self._say(f"the {self._called} did not end within {limit_s:.1f} s and is killed")
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _log_end(self) -> str:
        with self._log.open(encoding="utf-8", errors="replace") as file:
            return "".join(f"  {line}" for line in deque(file, _LOG_LINES)).rstrip()


async def _local_problems(asker: Asker) -> list[str]:
    """Why engines of the site itself cannot answer yet."""
    status = await asker.get("/v1/ondol/status")
    return [
        f"{one['deployment']} ({one['problem']})"
        for one in status["endpoints"]
        if one["local"] and one["problem"] is not None
    ]
