"""The hub's own file: one document of the kind `Hub`."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ondol.core.fields import Name, Positive

Url = Annotated[str, msgspec.Meta(pattern=r"^https://[^\s/]+$")]


class HubDoc(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A hub.  `name` is the fleet's.

    `names` are the host names and addresses in its certificate; the first one is what invitations say, unless
    `urls` says otherwise.  `database` is empty for a SQLite file in `data`, or a `postgresql://` address that
    several replicas share; the files `hub.key`, `pepper.key`, `ca.key`, `ca.pem` and `admin.key` of the first one's
    `data` are then copied to every other before its first start.  With another of the first four it does not start.
    `credential_hours`: how long a site goes on being believed by other sites while the hub is away.
    `stale_days`: after how long without a newer list of who is out no site lets another in.  `audit_days`: how long
    the hub's own audit is kept.
    """

    name: Name
    listen: str = "127.0.0.1:8443"
    data: str = "data"
    names: tuple[str, ...] = ("localhost", "127.0.0.1")
    urls: tuple[Url, ...] = ()
    database: str = ""
    models: str = "models"
    credential_hours: Positive = 72
    stale_days: Positive = 7
    connections: Positive = 8192
    telemetry_days: Positive = 7
    audit_days: Positive = 400
