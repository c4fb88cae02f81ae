"""kill -9 at a random moment: every append that was acknowledged is there, once, in an unbroken chain."""

from __future__ import annotations

import collections
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ondol.adapters.ledger_reader import records, verify

WRITER = """
import asyncio, os, sys
from pathlib import Path
from ondol.adapters.ledger import SqliteLedger
from ondol.core.usage import UsageRecord

async def work(ledger, name):
    number = 0
    while True:
        number += 1
        request_id = f"{name}-{number}"
        await ledger.append(UsageRecord(
            request_id=request_id, time_ns=number, site="s", gateway="g", tenant="default", team="a",
            key_id="k", route="r", task="chat", outcome="completed", status=200))
        os.write(1, f"{request_id}\\n".encode())

async def main():
    loop = asyncio.get_running_loop()
    ledger = SqliteLedger(Path(sys.argv[1]), gateway="g", max_bytes=1 << 30, loop=loop)
    await asyncio.gather(*(work(ledger, f"{sys.argv[2]}-{n}") for n in range(8)))

asyncio.run(main())
"""


@pytest.mark.parametrize("rounds", [20, pytest.param(200, marks=pytest.mark.long)])
def test_what_was_acknowledged_survives_being_killed(tmp_path: Path, rounds: int) -> None:
    path = tmp_path / "ledger.db"
    moments = random.Random(20)  # moments, not secrets
    acknowledged: list[str] = []

    for number in range(rounds):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), f"round{number}"], stdout=subprocess.PIPE
        )
        try:
            assert writer.stdout is not None
            start = os.read(writer.stdout.fileno(), 64)
            time.sleep(moments.uniform(0, 0.08))
            writer.send_signal(signal.SIGKILL)
            told = start + writer.stdout.read()
        finally:
            writer.kill()
            writer.wait()
            if writer.stdout is not None:
                writer.stdout.close()
        complete = told[: told.rindex(b"\n")] if b"\n" in told else b""
        acknowledged += complete.decode().split()

        result = verify(path)
        assert result.ok, result.why

    kept = collections.Counter(record.request_id for record in records(path))
    assert len(acknowledged) > rounds
    assert [each for each in acknowledged if kept[each] != 1] == []
    assert max(kept.values()) == 1
    assert verify(path).rows == kept.total()
