"""Which machine and which versions a result belongs to."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("ondol", "granian", "pyreqwest", "uvloop", "msgspec", "apsw", "prometheus-client")


def machine() -> dict[str, str | int]:
    """CPU, cores, memory, kernel, and the versions of everything that takes part."""
    facts: dict[str, str | int] = {
        "cpu": _first("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count() or 0,
        "memory_mib": int(_first("/proc/meminfo", "MemTotal").split()[0]) // 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nginx": _say("nginx", "-v"),
        "wrk": _say("wrk", "-v"),
        "node": _say("node", "--version"),
    }
    for name in PACKAGES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "missing"
    return facts


def _first(path: str, field: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return "unknown"


def _say(program: str, option: str) -> str:
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if path is None:
        return "missing"
    done = subprocess.run([path, option], capture_output=True, text=True, check=False)
    first = (done.stdout + done.stderr).strip().splitlines()[0]
    return first.removeprefix("nginx version: ").partition(" [")[0].partition(" Copyright")[0]
