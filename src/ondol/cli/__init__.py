"""The command line: words in, an exit code out.

Exit codes: 0 done, 1 refused or failed, 2 wrong words, 130 stopped by Ctrl-C.  Each command's module is
imported only when that command runs, so that `ondol --help` does not load an engine's libraries.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from cyclopts import App

from ondol import __version__
from ondol.errors import OndolError

__all__ = ["main"]


def _build() -> App:
    app = App(
        name="ondol",
        help="AI inference where it belongs: on the device, in the shop, in the region or in the cloud.",
        version=__version__,
        result_action="return_value",
    )
    app.command("ondol.cli.up:up", name="up", help="Start an edge and a stand-in cloud on this machine.")
    app.command("ondol.cli.chat:chat", name="chat", help="Ask, and see where it ran and why.")
    app.command("ondol.cli.costs:costs", name="costs", help="Cost, energy and carbon from the ledgers.")

    run = App(name="run", help="Run one part on its own.")
    run.command("ondol.cli.run:site", name="site", help="Run one site's gateway until it is stopped.")
    app.command(run)

    keys = App(name="keys", help="API keys: make, list, revoke.")
    keys.command("ondol.cli.keys:create", name="create", help="Make a key; it is shown once.")
    keys.command("ondol.cli.keys:list_keys", name="list", help="List the keys, without their secrets.")
    keys.command("ondol.cli.keys:revoke", name="revoke", help="Revoke a key by its id.")
    app.command(keys)

    models = App(name="models", help="Model files: list, add.")
    models.command("ondol.cli.models:list_models", name="list", help="List the models in the store.")
    models.command("ondol.cli.models:add", name="add", help="Check a GGUF file, store it, deploy it.")
    app.command(models)

    ledger = App(name="ledger", help="The record of what happened and what it cost.")
    ledger.command("ondol.cli.ledger:verify", name="verify", help="Check the hash chain of every ledger.")
    app.command(ledger)

    config = App(name="config", help="A site's file.")
    config.command("ondol.cli.check:check", name="check", help="Read and check a site's file.")
    app.command(config)
    return app


def program() -> None:
    """Run the process's own command, and end the process without waiting for threads.

    The HTTP client's native threads outlive the interpreter: one exit in five was an abort after the work
    was done.
    """
    code = main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.  `argv` without the program's name, default the process's own."""
    try:
        result = _build()(list(argv) if argv is not None else None)
    except OndolError as error:
        print(f"ondol: {error.message}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader (`| head`) has seen enough.  Point stdout elsewhere, or Python complains at exit.
        sys.stdout = None
        return 1
    except OSError as error:
        print(f"ondol: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 1
    return result if isinstance(result, int) else 0
