"""What a durable write costs here: append 4 KiB and fdatasync, in the directory of the ledger."""

from __future__ import annotations

import os
import time
from pathlib import Path

PAGE = bytes(4096)


def fdatasync_us(directory: Path, times: int = 300) -> list[float]:
    """Microseconds of each append with its sync, sorted."""
    path = directory / "fdatasync.probe"
    taken = []
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    try:
        for _ in range(times):
            start = time.perf_counter_ns()
            os.write(file, PAGE)
            os.fdatasync(file)
            taken.append((time.perf_counter_ns() - start) / 1000)
    finally:
        os.close(file)
        path.unlink()
    return sorted(taken)
