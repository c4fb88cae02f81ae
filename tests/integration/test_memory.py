"""The memory on the real encoder, in its real process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest

from ondol.engines.child import Backoff
from ondol.engines.memory import WAITING_MAX, MemoryEngine
from ondol.engines.memory_child import Told
from ondol.errors import EngineRejected, EngineUnavailable

pytestmark = pytest.mark.anyio

SPACE = b"a" * 32
OTHER = b"b" * 32


@pytest.fixture
async def memory() -> AsyncIterator[MemoryEngine]:
    engine = MemoryEngine(entries_max=40, exact_max=16, backoff=Backoff(first_s=0.01), timeout_s=20.0)
    try:
        async with asyncio.timeout(60):
            await engine.ready()
        yield engine
    finally:
        await engine.close()


async def test_it_finds_the_nearest_question_of_the_namespace_and_of_no_other(memory: MemoryEngine) -> None:
    await memory.add(SPACE, 1, "How do I reset my password?")
    await memory.add(SPACE, 2, "What does a parcel to Norway cost?")
    await memory.add(OTHER, 3, "How can I reset my password?")
    near = await memory.search(SPACE, "How can I reset my password?", 5)
    assert [key for key, _ in near.found] == [1, 2]
    assert 0.9 < near.found[0][1] <= 1.001
    assert near.found[1][1] < near.found[0][1]
    assert (await memory.search(b"c" * 32, "How can I reset my password?", 5)).found == ()


async def test_a_searched_question_is_added_without_encoding_it_again(memory: MemoryEngine) -> None:
    near = await memory.search(SPACE, "어떻게 가입하나요?", 3)
    await memory.add(SPACE, 7, "어떻게 가입하나요?", vector_of=near.number)
    again = await memory.search(SPACE, "어떻게 가입하나요?", 3)
    assert again.found[0][0] == 7
    assert again.found[0][1] == pytest.approx(1.0, abs=1e-3)


async def test_the_oldest_are_given_up_and_removed_ones_are_not_found(memory: MemoryEngine) -> None:
    gone: list[int] = []
    for key in range(1, 46):
        gone += await memory.add(SPACE, key, f"question number {key} about topic {key * 7}")
    assert gone == [1, 2, 3, 4, 5]
    assert memory.entries == 40
    near = await memory.search(SPACE, "question number 30 about topic 210", 40)
    keys = [key for key, _ in near.found]
    assert keys[0] == 30
    assert not set(gone) & set(keys)
    await memory.remove((30,))
    assert 30 not in [
        key for key, _ in (await memory.search(SPACE, "question number 30 about topic 210", 40)).found
    ]


async def test_a_killed_child_is_said_and_comes_back_empty(memory: MemoryEngine) -> None:
    await memory.add(SPACE, 1, "hello there")
    epoch, pid = memory.epoch, memory.child.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while memory.epoch == epoch:
            with pytest.raises(EngineUnavailable):
                while True:
                    await memory.search(SPACE, "hello", 1)
            await asyncio.sleep(0.05)
            if memory.problem() is None:
                break
    assert memory.epoch == epoch + 1
    assert (await memory.search(SPACE, "hello there", 1)).found == ()


async def test_two_answers_are_compared(memory: MemoryEngine) -> None:
    same = await memory.similarity("The shop opens at nine.", "The shop opens at nine.")
    other = await memory.similarity("The shop opens at nine.", "Bananas are rich in potassium.")
    assert same == pytest.approx(1.0, abs=1e-3)
    assert other < 0.6


@pytest.mark.parametrize("text", ["", "\ud800", "x" * 40_000], ids=["empty", "surrogate", "long"])
async def test_bad_texts_are_refused(memory: MemoryEngine, text: str) -> None:
    with pytest.raises(EngineRejected):
        await memory.search(SPACE, text, 1)


async def test_more_calls_than_the_bound_are_refused_and_the_rest_answered(memory: MemoryEngine) -> None:
    calls = [memory.search(SPACE, f"question {at}", 1) for at in range(WAITING_MAX + 5)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [one for one in results if isinstance(one, EngineUnavailable)]
    assert len(refused) == 5
    assert not [one for one in results if isinstance(one, BaseException) and one not in refused]


async def test_before_its_first_use_no_process_runs_and_a_call_says_that_it_starts() -> None:
    engine = MemoryEngine(backoff=Backoff(first_s=0.01))
    try:
        assert engine.child.starts == 0
        with pytest.raises(EngineUnavailable, match="starting"):
            await engine.search(SPACE, "hello", 1)
        async with asyncio.timeout(60):
            await engine.ready()
        assert (await engine.search(SPACE, "hello", 1)).found == ()
    finally:
        await engine.close()


async def test_vectors_of_another_width_turn_it_off(memory: MemoryEngine) -> None:
    memory._hear(Told(number=10**9, width=300))
    assert "is off" in (memory.problem() or "")
    with pytest.raises(EngineUnavailable, match="expected 512"):
        await memory.search(SPACE, "hello", 1)


async def test_a_pipe_whose_end_was_just_seen_is_an_engine_that_is_away() -> None:
    """Between the end of the child's pipe and the reader's turn, uvloop raises RuntimeError on a write."""

    class Closed:
        def write(self, _: bytes) -> None:
            raise RuntimeError("unable to perform operation; the handler is closed")

    engine = MemoryEngine()
    await engine.ready()
    try:
        engine._writer = Closed()  # type: ignore[assignment]
        with pytest.raises(EngineUnavailable, match="has just ended"):
            await engine.search(b"n", "how are you", 1)
    finally:
        await engine.close()
