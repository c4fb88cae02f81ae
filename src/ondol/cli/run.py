"""`ondol run`: one site or one hub, until it is told to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Parameter

from ondol import config as configuration
from ondol.config.fleet import check_fleet, gateway_of, load_joined
from ondol.config.hub import load_hub
from ondol.core.catalog import Catalog
from ondol.gateway.member import Joined
from ondol.gateway.supervisor import run_site
from ondol.hub.serve import run_hub

_GRACE_AFTER_PARENT_S: Final = 12.0


def site(
    *,
    config: Path,
    insecure: bool = False,
    with_parent: Annotated[bool, Parameter(show=False, negative="")] = False,
) -> int:
    """Run one site's gateway until SIGTERM or Ctrl-C.  SIGHUP reads its file again.

    Args:
        config: The site's file.
        insecure: Allow an address that is not loopback without TLS.
        with_parent: End when standard input closes, as it does however the parent ends.
    """
    if with_parent:
        threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()

    def load(joined: Joined | None) -> Catalog:
        if joined is None:
            return configuration.load(config, insecure=insecure)
        return load_joined(config, joined.site, joined.bodies, insecure=insecure)

    return run_site(load=load, path=config, data=config.parent / gateway_of(config).data)


def hub(
    *,
    config: Path,
    restored: Annotated[bool, Parameter(negative="")] = False,
    with_parent: Annotated[bool, Parameter(show=False, negative="")] = False,
) -> int:
    """Run one hub until SIGTERM or Ctrl-C.

    Args:
        config: The hub's file.
        restored: Its database was put back from an older copy: grant nothing new until the sites have said what they
            hold. For the first start after that, and not for the next ones.
        with_parent: End when standard input closes, as it does however the parent ends.
    """
    if with_parent:
        threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    return run_hub(load_hub(config), folder=config.parent, check=check_fleet, restored=restored)


def _end_with_parent() -> None:
    """Wait for the end of standard input, then stop this site: politely first."""
    while os.read(0, 4096):
        continue
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_AFTER_PARENT_S)
    # Nobody is left who would kill a site that hangs while it drains.
    os._exit(1)
