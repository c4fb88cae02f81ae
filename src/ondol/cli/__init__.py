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
    app.command("ondol.cli.up:up", name="up", help="Start a hub, an edge and a stand-in cloud here.")
    app.command("ondol.cli.chat:chat", name="chat", help="Ask, and see where it ran and why.")
    app.command(
        "ondol.cli.client_proxy:client_proxy",
        name="client-proxy",
        help="Hand requests on to the first good site.",
    )
    app.command(
        "ondol.cli.simulate:simulate",
        name="simulate",
        help="What a load would cost, take and emit on a fleet.",
    )
    app.command("ondol.cli.costs:costs", name="costs", help="Cost, energy and carbon from the ledgers.")

    run = App(name="run", help="Run one part on its own.")
    run.command("ondol.cli.run:site", name="site", help="Run one site's gateway until it is stopped.")
    run.command("ondol.cli.run:hub", name="hub", help="Run one hub until it is stopped.")
    app.command(run)

    keys = App(name="keys", help="API keys: make, list, revoke.")
    keys.command("ondol.cli.keys:create", name="create", help="Make a key; it is shown once.")
    keys.command("ondol.cli.keys:list_keys", name="list", help="List the keys, without their secrets.")
    keys.command("ondol.cli.keys:revoke", name="revoke", help="Revoke a key by its id.")
    app.command(keys)

    models = App(name="models", help="Model files: list, add.")
    models.command("ondol.cli.models:list_models", name="list", help="List the models in the store.")
    models.command("ondol.cli.models:add", name="add", help="Check a GGUF file, store it, deploy it.")
    models.command("ondol.cli.publish:publish", name="publish", help="Offer a model to the fleet's sites.")
    models.command("ondol.cli.publish:withdraw", name="withdraw", help="Offer a model no longer.")
    app.command(models)
    ledger = App(name="ledger", help="The record of what happened and what it cost.")
    ledger.command("ondol.cli.ledger:verify", name="verify", help="Check the hash chain of every ledger.")
    app.command(ledger)

    config = App(name="config", help="A site's file.")
    config.command("ondol.cli.check:check", name="check", help="Read and check a site's file.")
    app.command(config)
    _fleet(app)
    return app


def _fleet(app: App) -> None:
    """The commands that ask a hub, or make a site part of a fleet."""
    app.command("ondol.cli.join:join", name="join", help="Make a site part of a fleet.")
    app.command("ondol.cli.fleet:diff", name="diff", help="What would change in the fleet.")
    app.command("ondol.cli.fleet:apply", name="apply", help="Make files what the fleet shall be.")
    app.command("ondol.cli.fleet:get", name="get", help="What the fleet is, and why not what is wanted.")
    app.command("ondol.cli.fleet:rollback", name="rollback", help="Bring back an earlier generation.")

    sites = App(name="sites", help="The sites of a fleet: invite, list, revoke, admit.")
    sites.command("ondol.cli.fleet_sites:invite", name="invite", help="Print a token to join with.")
    sites.command("ondol.cli.fleet_sites:list_sites", name="list", help="List the sites and how they are.")
    sites.command("ondol.cli.fleet_sites:revoke", name="revoke", help="Put a site out of the fleet.")
    sites.command("ondol.cli.fleet_sites:admit", name="admit", help="Lift the fence of a site.")
    app.command(sites)

    rollouts = App(name="rollouts", help="How generations come to the sites.")
    rollouts.command("ondol.cli.rollouts:list_rollouts", name="list", help="List the rollouts.")
    rollouts.command(
        "ondol.cli.rollouts:show", name="show", help="One rollout, with every verdict and its numbers."
    )
    rollouts.command("ondol.cli.rollouts:pause", name="pause", help="Stop at the present step.")
    rollouts.command("ondol.cli.rollouts:resume", name="resume", help="Go on.")
    rollouts.command("ondol.cli.rollouts:abort", name="abort", help="Go back to the generation before.")
    app.command(rollouts)

    facts = App(name="facts", help="The derived copy of all records, for questions.")
    facts.command("ondol.cli.facts:rebuild", name="rebuild", help="Write the Parquet files anew.")
    facts.command("ondol.cli.facts:query", name="query", help="Ask them in SQL.")
    app.command(facts)

    app.command("ondol.cli.archive:export", name="export", help="A site's generation as one signed file.")
    app.command("ondol.cli.archive:take_in", name="import", help="Bring such a file into a site.")


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
