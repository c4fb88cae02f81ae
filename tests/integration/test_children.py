"""Supervised children: real processes, killed in every way."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ondol.engines.child import Backoff, Child, State
from ondol.errors import EngineUnavailable

pytestmark = pytest.mark.anyio

QUICK = Backoff(first_s=0.01, limit_s=0.05, stable_s=60.0)
ENCODER = "ondol.engines.encoder_child"


async def until(met: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not met():  # noqa: ASYNC110 - what is waited for is another process
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def process_text(pid: int | None, what: str) -> bytes:
    return Path(f"/proc/{pid}/{what}").read_bytes()


def encoder(backoff: Backoff = QUICK) -> Child:
    return Child(name="the encoder", module=ENCODER, config={"threads": 1}, backoff=backoff)


def test_pauses_double_up_to_their_limit_and_start_over_after_a_stable_time() -> None:
    backoff = Backoff(first_s=0.5, limit_s=3.0, stable_s=30.0)
    assert backoff.after(0.5, 0.0) == 1.0
    assert backoff.after(1.0, 29.9) == 2.0
    assert backoff.after(2.0, 0.0) == 3.0
    assert backoff.after(3.0, 30.0) == 0.5


async def test_a_child_that_always_fails_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ondol.child")
    child = Child(name="bad", module="this", config={}, backoff=QUICK)
    child.start()
    with pytest.raises(EngineUnavailable, match="said no JSON object"):
        await child.ready()
    await until(lambda: child.starts >= 4)
    assert child.state == "failed"
    assert "bad failed and is started again" in (child.problem() or "")
    await child.close()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert child.problem() == "bad is closed"
    assert child.pid is None


async def test_the_failure_says_what_the_child_wrote_when_it_died() -> None:
    child = Child(name="none", module="ondol.engines.no_such_module", config={}, backoff=QUICK)
    child.start()
    with pytest.raises(EngineUnavailable, match=r"exit code 1\).*No module named"):
        await child.ready()
    await child.close()


async def test_a_model_that_llama_cpp_refuses_gives_its_reason() -> None:
    config = {
        "model_path": "/nowhere/model.gguf", "alias": "m", "context_tokens": 128, "parallel": 1,
        "threads": 1, "gpu_layers": 0, "cache_ram_mib": 0, "http_threads": 2, "api_key": "k",
    }  # fmt: skip
    child = Child(name="m", module="ondol.engines.llamacpp_child", config=config, backoff=QUICK)
    child.start()
    with pytest.raises(EngineUnavailable, match="llama.cpp did not load the model"):
        await child.ready()
    await child.close()


async def test_a_killed_child_comes_back_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "ondol.child")
    child = encoder(Backoff(first_s=0.01, limit_s=0.05, stable_s=0.2))
    child.start()
    await child.ready()
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.state is State.READY and child.pid not in (None, first))
    await until(lambda: len(caplog.records) == 2)
    await child.close()
    assert "SIGKILL" in caplog.messages[0]
    assert "stable again after 1 failures" in caplog.messages[1]
    assert len(caplog.records) == 2


async def test_close_leaves_no_process_even_of_a_child_that_hears_nothing() -> None:
    child = encoder()
    child.start()
    await child.ready()
    pid = child.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await child.close()
    assert not alive(pid)


async def test_close_while_it_still_starts_leaves_no_process() -> None:
    child = encoder()
    child.start()
    await until(lambda: child.pid is not None)
    pid = child.pid
    assert pid is not None
    await child.close()
    assert not alive(pid)
    with pytest.raises(EngineUnavailable, match="is closed"):
        await child.ready()


async def test_a_close_that_is_cancelled_goes_on() -> None:
    child = encoder()
    child.start()
    await child.ready()
    pid = child.pid
    assert pid is not None
    closing = asyncio.create_task(child.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait({closing})
    assert closing.cancelled()
    await until(lambda: not alive(pid))


async def test_a_loop_that_ends_without_close_leaves_no_process() -> None:
    script = """
import asyncio
from ondol.engines.child import Child
async def main():
    child = Child(name="c", module="ondol.engines.encoder_child", config={"threads": 1})
    child.start()
    await child.ready()
    print(child.pid, flush=True)
asyncio.run(main())
"""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script], capture_output=True, timeout=30, check=True
    )
    await until(lambda: not alive(int(done.stdout)), timeout_s=3.0)


async def test_the_child_sees_no_secret_of_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENDOR_API_KEY", "very-secret")
    child = Child(name="e", module=ENCODER, config={"threads": 1, "api_key": "also-secret"}, backoff=QUICK)
    child.start()
    await child.ready()
    environment, arguments = process_text(child.pid, "environ"), process_text(child.pid, "cmdline")
    await child.close()
    assert b"secret" not in environment
    assert b"secret" not in arguments


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("moment", ["ready", "starting"])
async def test_no_child_survives_a_parent_that_is_killed(loop: str, moment: str) -> None:
    # Two children, so that one that holds an end of the other's pipe would show.
    script = f"""
import asyncio, {loop}
from ondol.engines.child import Child
async def main():
    children = [Child(name="c", module="ondol.engines.encoder_child", config={{"threads": 1}}) for _ in "ab"]
    for child in children:
        child.start()
    while not all(child.pid for child in children):
        await asyncio.sleep(0.01)
    if {moment == "ready"}:
        for child in children:
            await child.ready()
    print(*[child.pid for child in children], flush=True)
    await asyncio.sleep(60)
{loop}.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)  # noqa: ASYNC220
    assert parent.stdout is not None
    try:
        line = await asyncio.to_thread(parent.stdout.readline)
        pids = [int(pid) for pid in line.split()]
        assert len(pids) == 2
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    await until(lambda: not any(alive(pid) for pid in pids), timeout_s=3.0)
