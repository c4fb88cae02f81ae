"""A supervised child process: started, watched, restarted with growing pauses, ended.

It owns one process at a time and one task that watches it.  It knows nothing of models.  The invariant:
after `close()`, and after the end of this process however it comes, no child is left.

What passes between the two: one line of JSON on the child's stdin (its configuration, so no secret is in
an argument or in the environment), one line of JSON on its stdout (`{"error": "..."}`, or what it is
ready with, such as a port), then whatever `serve` speaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from typing import Any, Final, NoReturn

import msgspec

from ondol.errors import EngineUnavailable

logger = logging.getLogger("ondol.child")

Ready = Mapping[str, Any]
Serve = Callable[[Ready, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Runs while a child is ready.  When it returns or raises, the child is ended and started anew."""

# What a native library needs to find its devices and libraries, and nothing else: no keys, no proxies.
_ENVIRONMENT: Final = (
    "PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES",
)  # fmt: skip
_TAIL_BYTES: Final = 2048
_LINE_BYTES: Final = 64 * 1024
# After it is ready a child has seen prompts, so of its stderr only what says how it crashed is kept.
_CRASH_MARKS: Final = (b"GGML_ASSERT", b"terminate called", b"what():", b"CUDA error", b"out of memory")


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """Pauses between starts: `first_s`, doubled up to `limit_s`, back to the first after `stable_s` ready."""

    first_s: float = 0.5
    limit_s: float = 30.0
    stable_s: float = 30.0

    def after(self, pause_s: float, ready_s: float) -> float:
        """The pause after the one of `pause_s`, when the child was ready for `ready_s` since then."""
        return self.first_s if ready_s >= self.stable_s else min(pause_s * 2, self.limit_s)


class State(StrEnum):
    """Where a child is in its life."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    CLOSED = "closed"


class Child:
    """One supervised child process of this Python, running `module`."""

    def __init__(
        self,
        *,
        name: str,
        module: str,
        config: Mapping[str, Any],
        serve: Serve | None = None,
        start_timeout_s: float = 300.0,
        close_timeout_s: float = 1.0,
        backoff: Backoff | None = None,
    ) -> None:
        """Only keep the values; `start` starts.

        Args:
            name: how logs and sentences call it.
            module: what `python -m` runs; it follows `ondol.engines.lifeline`.
            config: what goes to the child as JSON.
            serve: see `Serve`.
            start_timeout_s: how long it may take until it is ready (a large model reads from disk).
            close_timeout_s: how long each of the three steps of ending it may take.
            backoff: pauses between starts.
        """
        self._name = name
        self._module = module
        self._config = json.dumps(dict(config)).encode() + b"\n"
        self._serve = serve
        self._start_timeout_s = start_timeout_s
        self._close_timeout_s = close_timeout_s
        self._backoff = Backoff() if backoff is None else backoff
        self._state = State.STARTING
        self._reason: str | None = None
        self._changed = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._starts = 0

    @property
    def starts(self) -> int:
        """How often a process was started."""
        return self._starts

    @property
    def pid(self) -> int | None:
        """The process that runs now, if one does."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    def problem(self) -> str | None:
        """None when it is ready, else a sentence that says why not."""
        match self._state:
            case State.READY:
                return None
            case State.STARTING:
                return f"{self._name} is starting"
            case State.CLOSED:
                return f"{self._name} is closed"
            case State.FAILED:
                return f"{self._name} failed and is started again: {self._reason}"

    def start(self) -> None:
        """Start it in the background; a second call changes nothing."""
        if self._task is None and self._state is not State.CLOSED:
            self._task = asyncio.create_task(self._supervise(), name=f"child {self._name}")

    async def ready(self) -> None:
        """Return when it is ready.  The caller bounds the time.

        Raises:
            EngineUnavailable: the start failed (another one follows by itself), or it is closed.
        """
        while self._state is State.STARTING:
            await self._changed.wait()
        if self._state is not State.READY:
            raise EngineUnavailable(self.problem() or f"{self._name} has ended")

    async def close(self) -> None:
        """End the process and wait for that, about 3 s at worst.

        If this is cancelled, the ending goes on by itself.
        """
        task, self._task = self._task, None
        self._move(State.CLOSED, None)
        if task is None:
            return
        task.cancel()
        await asyncio.wait({task})

    def _move(self, state: State, reason: str | None) -> None:
        self._state, self._reason = state, reason
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _supervise(self) -> None:
        """Start, watch, pause, for ever.  The first failure and the recovery are logged, no repeats."""
        pause_s = 0.0
        loop = asyncio.get_running_loop()
        while True:
            ready_at: list[float] = []
            self._starts += 1
            try:
                await self._run(ready_at)
            except _EndedError as ended:
                reason = str(ended)
            except OSError as error:
                reason = f"it cannot be started: {error.strerror or type(error).__name__}"
            except Exception as error:
                # The top of this task: were it to end here, the model would never come back.
                logger.exception("%s: the supervisor itself failed; it goes on", self._name)
                reason = f"the supervisor itself failed ({type(error).__name__})"
            ready_s = loop.time() - ready_at[0] if ready_at else 0.0
            pause_s = self._backoff.after(pause_s, ready_s) if pause_s else self._backoff.first_s
            if self._failures == 0:
                logger.error("%s failed and is started again with growing pauses: %s", self._name, reason)
            self._failures += 1
            self._move(State.FAILED, reason)
            await asyncio.sleep(pause_s)
            if not ready_at:
                # A start that never succeeded keeps the sentence until one does: callers get the cause.
                continue
            self._move(State.STARTING, None)

    async def _run(self, ready_at: list[float]) -> NoReturn:
        """One life of the process.  Fills `ready_at` once it is ready.

        Raises:
            _EndedError: it ended, or had to be ended; with the sentence that says why.
            OSError: it could not be started.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={key: os.environ[key] for key in _ENVIRONMENT if key in os.environ},
            # Of its own session, so that Ctrl-C reaches only the parent, which drains first.
            start_new_session=True,
            limit=_LINE_BYTES,
        )
        self._process = process
        pipes = _Pipes(process)
        tail = _Tail()
        reading = asyncio.create_task(tail.read(pipes.stderr), name=f"stderr of {self._name}")
        try:
            ready = await self._await_ready(pipes.stdin, pipes.stdout)
            tail.seen_prompts()
            await self._watch(process, pipes, ready, ready_at)
        except _EndedError as ended:
            await self._end(process, pipes)
            await asyncio.wait({reading}, timeout=self._close_timeout_s)
            raise _EndedError(f"{ended}{_exit_words(process.returncode)}{tail.words()}") from ended
        finally:
            try:
                await self._end(process, pipes)
            finally:
                # asyncio closes this when it hears of the process's end; a loop that is closing, or a wait
                # that was cancelled, may never hear of it.  There is no public way.
                process._transport.close()  # type: ignore[attr-defined]
                self._process = None
                reading.cancel()
                await asyncio.wait({reading})

    async def _await_ready(self, stdin: asyncio.StreamWriter, stdout: asyncio.StreamReader) -> Ready:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                # A child that ends without reading may still have said why.
                with contextlib.suppress(ConnectionError):
                    stdin.write(self._config)
                    await stdin.drain()
                line = await stdout.readline()
        except TimeoutError:
            raise _EndedError(f"it was not ready after {self._start_timeout_s:g} s") from None
        except ValueError:
            line = b""  # Longer than the limit of the reader.
        if not line.endswith(b"\n"):
            raise _EndedError("it ended before it was ready")
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise _EndedError("it said no JSON object, expected what it is ready with")
        if "error" in said:
            raise _EndedError(str(said["error"])[:_TAIL_BYTES])
        return said

    async def _watch(
        self, process: asyncio.subprocess.Process, pipes: _Pipes, ready: Ready, ready_at: list[float]
    ) -> NoReturn:
        """Be ready until the process or `serve` ends."""
        loop = asyncio.get_running_loop()
        exited = asyncio.create_task(process.wait(), name=f"exit of {self._name}")
        tasks: set[asyncio.Task[Any]] = {exited}
        serving: asyncio.Task[None] | None = None
        if self._serve is not None:
            # It runs its first steps before anyone who waits for `ready` wakes: tasks start in order.
            serving = asyncio.create_task(
                _awaited(self._serve(ready, pipes.stdout, pipes.stdin)), name=f"serve {self._name}"
            )
            tasks.add(serving)
        ready_at.append(loop.time())
        self._move(State.READY, None)
        try:
            wait_s = self._backoff.stable_s if self._failures else None
            done, _ = await asyncio.wait(tasks, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                logger.warning("%s is stable again after %d failures", self._name, self._failures)
                self._failures = 0
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Before any await: nobody may take it for ready while its parts are being cleared away.
            if self._state is State.READY:
                self._move(State.FAILED, "it has just ended")
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if serving is not None and serving in done and not serving.cancelled():
            error = serving.exception()
            if error is not None and not isinstance(error, (OSError, EOFError)):
                raise _EndedError(f"it spoke wrongly ({type(error).__name__})") from error
        raise _EndedError("it ended while it was in use")

    async def _end(self, process: asyncio.subprocess.Process, pipes: _Pipes) -> None:
        """End the process: close its stdin, then SIGTERM, then SIGKILL, each with a bounded wait.

        Cancelled in between, it kills at once.
        """
        try:
            # Not close(): that waits until what is buffered is read, and this child may read no more.
            # (And not twice: asyncio's transport fails on that.)
            if not pipes.stdin.transport.is_closing():
                pipes.stdin.transport.abort()
            for step in (None, signal.SIGTERM, signal.SIGKILL):
                if process.returncode is None and step is not None:
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(step)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._close_timeout_s):
                        await process.wait()
                        return
        except asyncio.CancelledError:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            raise


class _EndedError(Exception):
    """A child ended; the text says why."""


class _Pipes:
    """The three pipes of a process, present because all three were asked for."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise AssertionError("a child was started without its pipes")
        self.stdin = process.stdin
        self.stdout = process.stdout
        self.stderr = process.stderr


class _Tail:
    """The last of a child's stderr, bounded; once prompts were seen, only lines that tell of a crash."""

    def __init__(self) -> None:
        self._text = b""
        self._only_crashes = False

    def seen_prompts(self) -> None:
        self._text = b""
        self._only_crashes = True

    async def read(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while block := await stream.read(4096):
            lines = (rest + block).split(b"\n")
            # A line without an end is cut, so that no child can fill our memory.
            rest = lines.pop()[-_TAIL_BYTES:]
            for line in lines:
                self._keep(line)
        self._keep(rest)

    def _keep(self, line: bytes) -> None:
        if line and (not self._only_crashes or any(mark in line for mark in _CRASH_MARKS)):
            self._text = (self._text + b" | " + line)[-_TAIL_BYTES:]

    def words(self) -> str:
        text = self._text.decode("utf-8", "replace").strip(" |")
        printable = "".join(letter if letter.isprintable() else " " for letter in text)
        return f"; it wrote: {printable}" if printable else ""


def _exit_words(returncode: int | None) -> str:
    if returncode is None:
        return ""
    if returncode >= 0:
        return f" (exit code {returncode})"
    try:
        return f" ({signal.Signals(-returncode).name})"
    except ValueError:
        return f" (signal {-returncode})"


async def _awaited(work: Awaitable[None]) -> None:
    await work
