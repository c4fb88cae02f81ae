"""`ondol join`: make a site part of a fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ondol.adapters.lock import lock_directory
from ondol.adapters.site_identity import is_member, read_membership
from ondol.cli.installation import AsJson, CommandFailed
from ondol.cli.joining import join as join_fleet
from ondol.cli.output import print_json
from ondol.config.fleet import gateway_of
from ondol.core.invites import parse_token


def join(
    token: str,
    /,
    *,
    config: Annotated[Path, Parameter(help="The site's file; its data directory becomes a member.")],
    site: Annotated[str, Parameter(help="The site's name, where the token is a factory key.")] = "",
    address: Annotated[str, Parameter(help="Where other sites and clients reach this one.")] = "",
    again: Annotated[bool, Parameter(help="Leave the fleet that it is a member of.", negative="")] = False,
    as_json: AsJson = False,
) -> int:
    """Join the fleet that a token of `ondol sites invite` is for.  The site must not be running.

    Args:
        token: As the hub printed it; good once.
    """
    invite = parse_token(token)
    gateway = gateway_of(config)
    data = config.parent / gateway.data
    if is_member(data) and not again:
        known = read_membership(data)
        raise CommandFailed(
            f"{data} is site {known.site} of fleet {known.fleet} already; to join anew, add --again"
        )
    with lock_directory(data):
        reply = join_fleet(data, invite, site=site, address=address, proxy=gateway.hub.proxy)
    if as_json:
        print_json({"site": reply.site, "fleet": reply.fleet, "hub": invite.hub.urls})
        return 0
    print(
        f"joined: this is site {reply.site} of fleet {reply.fleet}; start it: ondol run site --config {config}"
    )
    return 0
