"""An asyncio event loop without real time: when nobody can run, the clock jumps to the next timer.

One thread, no sockets, no waiting: an hour of a fleet's life takes as long as its Python.  The same seed gives
the same order of everything, because nothing here depends on real time, on threads or on the order of a set.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(AssertionError):
    """Nobody can run, and no timer is set: the simulated world waits for something that cannot come."""


class TimeUp(AssertionError):
    """The simulated time is over, and the work is not."""


class _NoSockets:
    """A selector that never waits: it moves the loop's clock instead."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Deadlock(f"at {self._loop.time():.3f} s nothing can run and no timer is set")
        if timeout > 0:
            self._loop.advance(timeout)
        return []

    def close(self) -> None:
        """Nothing is open."""


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop.  `time()` begins at 0 and is all the time there is."""

    def __init__(self, *, limit_s: float) -> None:
        super().__init__()
        self._virtual_s = 0.0
        self._limit_s = limit_s
        self._selector = _NoSockets(self)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._virtual_s

    def advance(self, seconds: float) -> None:
        self._virtual_s += seconds
        if self._virtual_s > self._limit_s:
            raise TimeUp(f"more than {self._limit_s:g} simulated seconds")

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list, "there are no sockets here"

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody is woken."""

    def run_in_executor(  # type: ignore[override]  # a thread would bring its own order of things
        self, executor: concurrent.futures.Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except BaseException as error:  # the waiter gets it, whatever it is
            future.set_exception(error)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """There is none."""


def run(work: Coroutine[Any, Any, T], *, limit_s: float) -> T:
    """Run `work` to its end in at most `limit_s` simulated seconds.

    Raises:
        Deadlock, TimeUp: it can never end, or did not in time.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit_s=limit_s)) as runner:
        return runner.run(work)
