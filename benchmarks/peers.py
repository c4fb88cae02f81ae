"""Installs the gateways to compare with, pinned, into `.cache/bench`, and says where they are.

They never touch Ondol's own environment.  What cannot be installed is left out of the table with the reason.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.processes import StartFailed

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "bench"
INSTALL_TIMEOUT_S = 900


def litellm() -> Path:
    """The `litellm` program, installed if it is not there.

    Raises:
        StartFailed: pip could not install it.
    """
    venv = CACHE / "litellm-venv"
    program = venv / "bin" / "litellm"
    if not program.exists():
        _run([sys.executable, "-m", "venv", str(venv)], "LiteLLM's venv")
        wanted = str(HERE / "requirements-peers.txt")
        _run([str(venv / "bin" / "pip"), "install", "--quiet", "--requirement", wanted], "LiteLLM")
    return program


def litellm_version() -> str:
    """The pinned version."""
    for line in (HERE / "requirements-peers.txt").read_text().splitlines():
        if line.startswith("litellm=="):
            return line.partition("==")[2]
    raise StartFailed("requirements-peers.txt pins no litellm")


def portkey() -> tuple[Path, Path]:
    """Node and Portkey's start script, installed if it is not there.

    Raises:
        StartFailed: node or npm is missing, or npm could not install it.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise StartFailed("Portkey needs node and npm (Debian and Ubuntu: apt-get install nodejs npm)")
    folder = CACHE / "portkey"
    script = folder / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    if not script.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "package.json", folder / "package.json")
        flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
        _run([npm, "install", "--prefix", str(folder), *flags], "Portkey")
    return Path(node), script


def portkey_version() -> str:
    """The pinned version."""
    version: str = json.loads((HERE / "package.json").read_text())["dependencies"]["@portkey-ai/gateway"]
    return version


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise StartFailed(f"{what} was not installed within {INSTALL_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise StartFailed(f"{what} could not be installed: {done.stderr.strip()[-300:]}")
