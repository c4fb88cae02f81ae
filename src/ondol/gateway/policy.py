"""May they: the route that a caller names, who may use it, and whether limits allow it now."""

from __future__ import annotations

import difflib

from ondol.core.catalog import Catalog, RouteDoc
from ondol.core.identity import Principal
from ondol.errors import Forbidden, RateLimited, TooLarge, UnknownModel
from ondol.gateway.quota import Granted, Limited, Quotas, rate_headers


def find_route(catalog: Catalog, name: str, principal: Principal) -> RouteDoc:
    """The route of a name.

    Raises:
        UnknownModel: there is none that this caller may see; the message has the nearest names.
        Forbidden: the route exists, and the key or the team may not use it.
    """
    route = catalog.routes.get(name)
    if route is None:
        known = [one.name for one in catalog.routes.values() if may_use(one, principal)]
        near = difflib.get_close_matches(name[:128], known, n=3, cutoff=0.4) or sorted(known)[:5]
        hint = f"; nearest: {', '.join(near)}" if near else "; this key may use no route"
        raise UnknownModel(f"the model '{name[:128]}' does not exist{hint}", param="model")
    if not may_use(route, principal):
        raise Forbidden(f"this key may not use the model '{name}'; ask an administrator of team "
                        f"'{principal.team}' for a key with that route", param="model")  # fmt: skip
    return route


def may_use(route: RouteDoc, principal: Principal) -> bool:
    """Whether the key's routes and the route's teams both allow it."""
    if principal.routes and route.name not in principal.routes:
        return False
    return not route.teams or principal.team in route.teams or principal.kind == "admin"


def admit(quotas: Quotas, catalog: Catalog, principal: Principal, *, tokens: int, now_ns: int) -> Granted:
    """Take a request and its tokens from the limits of key and team.

    Raises:
        RateLimited: a limit is reached now; says when it passes.
        TooLarge: the request alone is more than the limit, so it never passes.
    """
    answer = quotas.admit(
        principal=principal, team=catalog.teams.get(principal.team), tokens=tokens, now_ns=now_ns
    )
    if isinstance(answer, Limited):
        if answer.retry_after_ns is None:
            raise TooLarge(answer.message)
        limited = RateLimited(answer.message, retry_after_s=answer.retry_after_s)
        limited.headers = rate_headers(answer)
        raise limited
    return answer
