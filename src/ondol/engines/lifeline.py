"""The child's side of a supervised process: its configuration, its answers, and how it ends.

The parent holds the other end of our stdin.  When that closes, however the parent ended (also by
`kill -9`), we end.  A parent-death signal is not used: it is bound to the thread that made the child, and
fires when that thread ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import threading
from typing import Any, Final

_CONFIG_BYTES_MAX: Final = 1024 * 1024
_STDIN: Final = 0


def prepare() -> int:
    """Settle the process, and return the descriptor on which answers go to the parent.

    What native code prints on stdout goes to stderr from now on, so that it cannot mix with answers.
    A crash leaves no core file: it would hold prompts.  Ctrl-C is the parent's business.
    """
    answers = os.dup(1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return answers


def read_config() -> dict[str, Any]:
    """The configuration: one line of JSON on stdin, read byte-exact so that what follows it is left.

    Raises:
        ValueError: the line is not JSON, not an object, or passes 1 MiB.
        EOFError: the parent is gone.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(_STDIN, 1)
        if not byte:
            raise EOFError("the parent ended before it sent the configuration")
        line += byte
        if len(line) > _CONFIG_BYTES_MAX:
            raise ValueError(f"found more than {_CONFIG_BYTES_MAX} bytes of configuration")
    config = json.loads(line)
    if not isinstance(config, dict):
        raise ValueError("found no JSON object as configuration")
    return config


def say(answers: int, message: dict[str, Any]) -> None:
    """Write one line of JSON to the parent; if it is gone, end."""
    data = json.dumps(message).encode() + b"\n"
    try:
        while data:
            data = data[os.write(answers, data) :]
    except BrokenPipeError:
        os._exit(0)


def end_with_stdin() -> None:
    """Start a thread that ends this process, at once, when stdin closes."""
    threading.Thread(target=_wait_for_end, name="lifeline", daemon=True).start()


def _wait_for_end() -> None:
    with contextlib.suppress(OSError):
        while os.read(_STDIN, 4096):
            # Nothing is expected here; whatever comes is dropped.
            continue
    # Not sys.exit: that would wait for native threads, which may never end.
    os._exit(0)
