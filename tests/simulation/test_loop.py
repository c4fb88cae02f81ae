"""The virtual-time loop itself: time jumps, order is fixed, what cannot end is said."""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.simulation.loop import Deadlock, TimeUp, run


def test_an_hour_takes_no_time() -> None:
    async def work() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    assert run(work(), limit_s=4000) == 3600
    assert time.monotonic() - began < 30


def test_timers_fire_in_their_order_and_ties_the_same_way_each_time() -> None:
    async def work() -> list[str]:
        seen: list[str] = []

        async def wait(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append(name)

        await asyncio.gather(wait("late", 2), *(wait(f"tie {n}", 1) for n in range(20)), wait("soon", 0.5))
        return seen

    seen = run(work(), limit_s=10)
    assert (seen[0], seen[-1]) == ("soon", "late")
    assert run(work(), limit_s=10) == seen


def test_timeouts_and_threads_work_without_either() -> None:
    async def work() -> int:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(60)
        return await asyncio.to_thread(lambda: 7)

    assert run(work(), limit_s=10) == 7


def test_what_nobody_will_ever_wake_is_a_deadlock() -> None:
    async def work() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        run(work(), limit_s=10)


def test_what_takes_too_long_is_stopped() -> None:
    async def work() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(1)

    with pytest.raises(TimeUp):
        run(work(), limit_s=100)
